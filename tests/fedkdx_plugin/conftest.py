"""The compiled operations for vectors of each size."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path
from unittest import mock

import pytest

from fedkdx_plugin.native import library
from tests.fedkdx_plugin import watch_runs

X86 = {"x86_64", "AMD64"}
PROCESSORS = {  # options for vectors of other sizes than this processor's, which runs them as well
    "as it is": None,
    "8 floats": ("-mavx2", "-mfma", "-mno-avx512f"),
    "4 floats": (),
}


@pytest.fixture(scope="session")
def compile(tmp_path_factory):
    """Compiles the library with these options, once."""

    @cache
    def made(options: tuple[str, ...]) -> Path:
        path = tmp_path_factory.mktemp("library") / "fused.so"
        library.make(os.environ.get("CC", "cc"), path, [options])
        return path

    return made


@pytest.fixture(scope="module", params=PROCESSORS)
def processor(request, compile):
    """Install the library for each size of vectors."""
    options = PROCESSORS[request.param]
    if options is None:
        yield
        return
    if platform.machine() not in X86:
        pytest.skip("other vectors are those of another family")
    found = library.opened(compile(options))
    with mock.patch.object(library, "operations", lambda: found):
        yield


@pytest.fixture(scope="session")
def watch(tmp_path_factory):
    """Finished runs on recordings of a watch; tests that change files copy the run first."""
    return watch_runs.make(tmp_path_factory.mktemp("watch"))
