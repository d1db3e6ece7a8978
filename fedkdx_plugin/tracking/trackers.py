"""Trackers by name."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence

from fedkdx_plugin.tracking.callbacks import Callback
from registry.errors import UserError


def trackers(names: Sequence[str]) -> list[Callback]:
    """Make the trackers of `--track`. Raises UserError where a package is missing."""
    found: list[Callback] = []
    for name in dict.fromkeys(names):
        module = importlib.import_module(f"fedkdx_plugin.tracking.{name}")
        for package in module.PACKAGES:
            if importlib.util.find_spec(package) is None:
                raise UserError(f"--track {name} needs a package: pip install {package}")
        found.append(module.Tracker())
    return found
