"""What a visitor relies on: the README's commands, the style, the tree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_ci_runs_exactly_the_readmes_test_command():
    (command,) = (line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.endswith("-m pytest"))
    assert f"```sh\n{command}\n```" in (ROOT / "README.md").read_text()


def test_ruff_finds_nothing():
    for arguments in (["check"], ["format", "--check"]):
        run = subprocess.run([sys.executable, "-m", "ruff", *arguments, "."], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout


def test_the_top_level_is_the_agreed_one():
    allowed = {"setup.cfg", "fedkdx_plugin", "registry", "baselines", "dataset_utils", "run.py", "tests"}
    allowed |= {"README.md", "pyproject.toml", "docs", "examples", "benchmarks", "experiments", ".ci", ".gitignore"}
    allowed |= {"LICENSE", "CITATION.cff", "CHANGELOG.md", "CONTRIBUTING.md", "Dockerfile", ".dockerignore", ".github"}
    allowed |= {".pre-commit-config.yaml"}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode == 0:
        assert {name.partition("/")[0] for name in tracked.stdout.splitlines()} <= allowed
