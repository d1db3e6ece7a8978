"""Type hints hold: mypy with the settings of pyproject.toml finds nothing."""

from __future__ import annotations

import configparser
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("baselines", "dataset_utils", "fedkdx_plugin", "registry")


@pytest.mark.skipif(importlib.util.find_spec("mypy") is None, reason="mypy is not installed")
def test_mypy_finds_nothing(tmp_path):
    torch = re.search(r"^torch==(\S+)", (ROOT / "tests" / "constraints.txt").read_text(), re.MULTILINE)[1]
    if importlib.metadata.version("torch").partition("+")[0] != torch:
        pytest.skip(f"libraries' own types differ between their versions: checked with torch {torch}")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_others_see_the_type_hints(package):
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    assert (ROOT / package / "py.typed").is_file()
    assert "py.typed" in setup["options.package_data"][package].split()
