"""Real federations: processes of Flower on this machine. Minutes; run with -m flower."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from registry.interface import Message
from tests.test_plugin import ROOT, wheel

pytest.importorskip("flwr")
psutil = pytest.importorskip("psutil")

pytestmark = pytest.mark.flower
ALGORITHMS = ("FedAvg", "FedKDX", "FedFomo", "FedMedian")
ROUNDS = "-gr 2 -jr 0.7 -ls 1 -m cnn -dev cpu".split()


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """Return this environment with the example plug-in in it."""
    work = tmp_path_factory.mktemp("plugin")
    zipfile.ZipFile(wheel(ROOT / "examples" / "fedkdx-median", work)).extractall(work / "site")
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(work / "site")]), "OMP_NUM_THREADS": "1"}


def fedkdx(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "fedkdx_plugin.cli.main", *map(str, arguments)]


def compare(out: Path, shards: Path, environment: dict[str, str], *more: str) -> Path:
    """Run the command line to its end. Returns the comparison's folder."""
    command = fedkdx("-data", shards, "-algo", ",".join(ALGORITHMS), "-o", out, *ROUNDS, *more)
    run = subprocess.run(command, env=environment, cwd=out.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (folder,) = out.iterdir()
    return folder


@pytest.fixture(scope="module")
def both(tmp_path_factory, federated_folder, environment) -> tuple[Path, Path]:
    """One comparison on Flower, and the same in one process."""
    work = tmp_path_factory.mktemp("both")
    there = compare(work / "there", federated_folder, environment, "--engine", "flower")
    return there, compare(work / "here", federated_folder, environment, "--backend", "sequential")


def server_state(place: Path) -> dict[str, torch.Tensor]:
    saved = Message.from_bytes((place / "state.safetensors").read_bytes())
    return {name: tensor for name, tensor in saved.tensors.items() if name.startswith("server/")}


def figures(place: Path) -> list[dict[str, str]]:
    with (place / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in rows]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_processes_give_the_bits_of_the_sequential_backend(both, algorithm):
    there, here = (folder / f"{algorithm}-seed0" for folder in both)
    ours, theirs = server_state(here), server_state(there)
    assert ours and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert len(figures(here)) == 2
    assert figures(there) == figures(here)


def test_nothing_is_left_running(both):
    there, _ = both
    for process in psutil.process_iter():
        try:
            assert str(there) not in " ".join(process.cmdline())
        except psutil.Error:
            continue


def test_private_state_lies_at_the_sites_alone(both):
    there, _ = both
    at_sites = [path for path in (there / "sites").rglob("*.safetensors") if "FedKDX" in str(path)]
    assert {path.parent.name for path in at_sites} <= {f"client-{id}" for id in range(3)}
    teachers = {
        name
        for path in at_sites
        for name in Message.from_bytes(path.read_bytes()).tensors
        if name.startswith("kept/teacher")
    }
    assert teachers
    assert not any("teacher" in name for name in server_state(there / "FedKDX-seed0"))
