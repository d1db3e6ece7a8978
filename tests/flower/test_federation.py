"""Real federations: processes of Flower on this machine, which give the bits of one process."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from fedkdx_plugin.flower.options import run_name
from fedkdx_plugin.prediction import load_model
from registry.interface import Message
from tests.conftest import same_state
from tests.test_plugin import ROOT, wheel

pytest.importorskip("flwr")
psutil = pytest.importorskip("psutil")

pytestmark = pytest.mark.flower
OURS = ("FedKDX", "FedKDX+")
OTHERS = ("FedAvg", "FedFomo", "FedMedian")
ROUNDS = "-gr 2 -jr 0.7 -ls 1 -m cnn -dev cpu".split()


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """Return this environment with the example plug-in in it."""
    work = tmp_path_factory.mktemp("plugin")
    zipfile.ZipFile(wheel(ROOT / "examples" / "fedkdx-median", work)).extractall(work / "site")
    return dict(os.environ) | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(work / "site")]), "OMP_NUM_THREADS": "1"}


def fedkdx(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "fedkdx_plugin.cli.main", *map(str, arguments)]


def run(work: Path, environment: dict[str, str], *arguments: str | Path) -> None:
    """Run the command line to its end."""
    made = subprocess.run(fedkdx(*arguments), env=environment, cwd=work, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr


def compare(work: Path, shards: Path, environment: dict[str, str], *algorithms: str) -> tuple[Path, Path]:
    """Make a comparison on Flower, and the same in one process. Returns the folders of the two."""
    command = ["-data", shards, "-algo", ",".join(algorithms), *ROUNDS]
    run(work, environment, *command, "-o", "there", "--engine", "flower")
    run(work, environment, *command, "-o", "here", "--backend", "sequential")
    (there,), (here,) = (work / "there").iterdir(), (work / "here").iterdir()
    return there, here


@pytest.fixture(scope="module")
def both(tmp_path_factory, federated_folder, environment) -> tuple[Path, Path]:
    return compare(tmp_path_factory.mktemp("both"), federated_folder, environment, *OURS)


@pytest.fixture(scope="module")
def others(tmp_path_factory, federated_folder, environment) -> tuple[Path, Path]:
    return compare(tmp_path_factory.mktemp("others"), federated_folder, environment, *OTHERS)


def server_state(place: Path) -> dict[str, torch.Tensor]:
    saved = Message.from_bytes((place / "state.safetensors").read_bytes())
    return {name: tensor for name, tensor in saved.tensors.items() if name.startswith("server/")}


def metrics(place: Path) -> list[dict[str, str]]:
    with (place / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in rows]


def assert_same_bits(there: Path, here: Path, rounds: int) -> None:
    """Compare the server's state and the metrics of two run folders."""
    ours, theirs = server_state(here), server_state(there)
    assert ours and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert len(metrics(here)) == rounds
    assert metrics(there) == metrics(here)


@pytest.mark.parametrize("algorithm", OURS)
def test_processes_give_the_bits_of_the_sequential_backend(both, algorithm):
    there, here = both
    assert there.name.rpartition("-")[0].rpartition("-")[0] == "made-cnn-test"  # by the name that the data have
    assert_same_bits(there / f"{algorithm}-seed0", here / f"{algorithm}-seed0", 2)
    for folder in both:
        assert f"{algorithm} " in (folder / "comparison.md").read_text()


@pytest.mark.parametrize("algorithm", OURS)
def test_each_site_has_the_model_of_its_client(both, algorithm):
    there, here = both
    for client in range(3):
        place = there / "sites" / str(client) / run_name(there / f"{algorithm}-seed0")
        one, other = load_model(place), load_model(here / f"{algorithm}-seed0", client)
        assert (one.client, one.round, one.network.serves) == (client, 2, other.network.serves)
        assert same_state(one.network.state_dict(), other.network.state_dict())
        assert all(np.array_equal(*scales) for scales in zip(one.scaling, other.scaling, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", OTHERS)
def test_other_algorithms_give_the_bits_of_the_sequential_backend(others, algorithm):
    there, here = others
    assert_same_bits(there / f"{algorithm}-seed0", here / f"{algorithm}-seed0", 2)


@pytest.mark.slow
def test_a_finished_federation_goes_on_to_more_rounds(both, environment, tmp_path):
    folders = []
    for name, folder in zip(("there", "here"), both, strict=True):
        folders.append(shutil.copytree(folder, tmp_path / name / folder.name))  # sites know a run by its folder's name
        run(tmp_path, environment, "resume", folders[-1], "-gr", "3")
    there, here = folders
    assert_same_bits(there / "FedKDX-seed0", here / "FedKDX-seed0", 3)
    wrong = subprocess.run(
        fedkdx("resume", there, "-gr", "2"), env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert wrong.returncode == 2 and "has 3 rounds already" in wrong.stderr


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


def test_what_lies_at_a_site_only_its_owner_can_read(both):
    there, _ = both
    written = [*(there / "sites").rglob("*"), *(there / "flower").rglob("*"), there / "FedKDX-seed0/state.safetensors"]
    assert {"site.json", "supernode.log", "superlink.log"} <= {path.name for path in written}
    assert [str(path) for path in written if path.stat().st_mode & 0o77] == []
