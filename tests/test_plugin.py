"""Packaging: the wheel, installed elsewhere, and the example plug-in beside it."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def call(*command: str | Path, cwd: Path) -> str:
    run = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def wheel(source: Path, work: Path) -> Path:
    """Build a wheel of a copy of `source`, so that nothing is left in the tree."""
    copy = work / f"source-{source.name}"
    skip = shutil.ignore_patterns(".git", ".venv", "data", "runs", "*.egg-info", "build", "__pycache__")
    shutil.copytree(source, copy, ignore=skip)
    out = work / f"wheel-{source.name}"
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    call(*pip, "-w", out, copy, cwd=work)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> list[Path]:
    work = tmp_path_factory.mktemp("wheels")
    return [wheel(ROOT, work), wheel(ROOT / "examples" / "fedkdx-median", work)]


@pytest.fixture(scope="module")
def scratch(wheels, tmp_path_factory) -> Path:
    """Return an environment with both wheels installed, whose dependencies come from the tests' environment."""
    home = tmp_path_factory.mktemp("scratch")
    call(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    python = home / "bin" / "python"
    call(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", *wheels, cwd=home)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home


def fedkdx(scratch: Path, *arguments: str) -> str:
    elsewhere = scratch / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    return call(scratch / "bin" / "fedkdx", *arguments, cwd=elsewhere)


def test_the_wheel_has_the_packages_and_nothing_else(wheels):
    names = zipfile.ZipFile(wheels[0]).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith((".dist-info", ".data"))} == {
        "baselines",
        "dataset_utils",
        "fedkdx_plugin",
        "registry",
    }
    ours = {path.relative_to(ROOT).as_posix() for top in tops for path in (ROOT / top).rglob("*.py")}
    assert ours == {name for name in names if name.endswith(".py")}
    others = {name for name in names if not name.endswith(".py") and ".dist-info/" not in name}
    folder = ROOT / "fedkdx_plugin" / "configuration" / "presets"
    presets = {path.relative_to(ROOT).as_posix() for path in folder.glob("*.yaml")}
    experiments = {path.name for path in (ROOT / "experiments").glob("*.yaml")}
    assert presets and presets == {name for name in others if "/presets/" in name}
    assert experiments == {name.rpartition("/")[2] for name in others if name.endswith(".yaml")} - {
        Path(name).name for name in presets
    }


def test_installed_it_knows_experiments_and_presets(scratch):
    planned = fedkdx(scratch, "--experiment", "table2", "--preset", "tuned", "--dry-run")
    assert "SLEEP: FedKDX +CTL+NKD" in planned


def test_installed_it_lists_the_plug_in(scratch):
    listed = fedkdx(scratch, "--list")
    assert "fedkdx-median 0.1.0" in listed
    assert "Takes the coordinate-wise median" in listed
    assert "arXiv:1803.01498" in listed
    assert "BROKEN" not in listed


def test_the_plug_ins_algorithm_runs_beside_fedavg(scratch):
    out = fedkdx(scratch, *["-data", "SPAR", "-algo", "FedAvg,fedmedian", "-m", "mlp", "-gr", "2", "-dev", "cpu"])
    rows = [line.split("|")[1].strip() for line in out.splitlines() if line.startswith("| Fed")]
    assert rows == ["FedAvg", "FedMedian"]
    (folder,) = (scratch / "elsewhere" / "runs").iterdir()
    assert '"origin": "fedkdx-median 0.1.0"' in (folder / "FedMedian-seed0" / "environment.json").read_text()
