"""A library of compiled operations that are wrong by a percent."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from fedkdx_plugin.native import library


def wrong_library(folder: Path, edits: Mapping[str, tuple[str, str]]) -> ctypes.CDLL:
    """Return the operations made of edited files.

    Args:
        folder: to make them in; must not exist.
        edits: of a file's name, a text that stands in it once, and what comes in its place.
    """
    shutil.copytree(library.FOLDER, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for name, (old, new) in edits.items():
        text = (folder / name).read_text(encoding="utf-8")
        assert text.count(old) == 1
        (folder / name).write_text(text.replace(old, new), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "FOLDER", folder)
        library.make(os.environ.get("CC", "cc"), folder / "wrong.so")
    return library.opened(folder / "wrong.so")
