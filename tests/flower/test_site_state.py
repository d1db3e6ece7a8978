"""A site's private state on its disk: whole, private, of its run, client and round, or refused by name."""

from __future__ import annotations

import shutil
import stat
from pathlib import Path

import pytest
import torch

from dataset_utils.sealed import SUMS, Sealed
from fedkdx_plugin.configuration.config import from_dict
from fedkdx_plugin.experiments.experiment import Experiment
from fedkdx_plugin.flower.options import run_name
from fedkdx_plugin.flower.protocol import Request
from fedkdx_plugin.flower.site import StateFolder
from registry import catalog
from registry.errors import UserError
from registry.interface import Message, Round
from tests.sealing import reseal

KEPT, MEMORY = {"model.weight": torch.arange(4.0)}, {"mean": torch.ones(2)}


@pytest.fixture
def folder(tmp_path) -> StateFolder:
    made = StateFolder(tmp_path / "state", "run", 3)
    for round in (1, 2):
        made.save(round, KEPT, {name: round * tensor for name, tensor in MEMORY.items()}, round)
    return made


def wrong(folder: StateFolder, round: int = 2) -> str:
    with pytest.raises(UserError) as error:
        folder.load(round)
    return str(error.value)


def test_it_is_read_as_it_was_written_and_for_its_owner_alone(folder):
    kept, memory, trained = folder.load(2)
    assert torch.equal(kept["model.weight"], KEPT["model.weight"]) and memory["mean"].tolist() == [2, 2]
    assert trained == 2
    for place in (folder.folder, folder.folder.parent, folder.folder.parent.parent):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder.folder / "2.safetensors").stat().st_mode) == 0o600


def test_a_folder_that_exists_keeps_its_permissions(tmp_path):
    (tmp_path / "state").mkdir(mode=0o750)
    StateFolder(tmp_path / "state", "run", 3)
    assert stat.S_IMODE((tmp_path / "state").stat().st_mode) == 0o750


def test_settled_states_are_removed_with_their_checksums(folder):
    folder.settle(2, 2)
    assert folder.rounds() == [2] and "1.safetensors" not in (folder.folder / SUMS).read_text()
    assert folder.load(2)[2] == 2


@pytest.mark.parametrize("place", range(0, 200, 7))
def test_a_flipped_bit_is_found(folder, place):
    path = folder.folder / "2.safetensors"
    content = bytearray(path.read_bytes())
    content[place % len(content)] ^= 1 << place % 8
    path.write_bytes(content)
    assert (
        f"{path}: damaged or exchanged, its SHA-256 is not that in SHA256SUMS (which may be the damaged one); put a "
        in wrong(folder)
    )
    assert folder.load(1)[2] == 1


def test_state_of_another_round_or_client_is_refused_by_what_it_says(folder, tmp_path):
    shutil.copy(folder.folder / "1.safetensors", folder.folder / "2.safetensors")
    assert "damaged or exchanged" in wrong(folder)
    reseal(folder.folder)
    assert "is of run, client-3, round 1, not run, client-3, round 2" in wrong(folder)
    other = StateFolder(tmp_path / "state", "run", 4)
    other.save(2, KEPT, MEMORY, 1)
    shutil.copy(other.folder / "2.safetensors", folder.folder)
    reseal(folder.folder)
    assert "is of run, client-4, round 2, not run, client-3, round 2" in wrong(folder)


def test_missing_state_says_what_is_there(folder):
    Sealed(folder.folder, "").remove("2.safetensors")
    assert "missing; the server goes on from round 2, this site has state of rounds: 1" in wrong(folder)


def accepted(tmp_path: Path, name: str) -> None:
    """Bring a run's name to a site, and make its folder there."""
    sent = Request(name, 3, Round(1, 2, 1.0)).to_message()
    run = Request.from_message(Message.from_bytes(sent.to_bytes())).run
    assert StateFolder(tmp_path / "state", run, 3).folder == tmp_path / "state" / name / "client-3"


def test_the_runs_of_every_algorithm_have_names_that_sites_accept(tmp_path):
    names = [entry.name for entry in catalog.entries("algorithms")]
    assert {"FedKDX+", "FedKD+"} <= set(names)
    options = {"data": str(tmp_path / "Gerät 2+b (neu)"), "out": str(tmp_path), "times": 2}
    experiment = Experiment.comparison(from_dict(options | {"algorithm": names}, ""))
    experiment.make_folder()
    assert len(experiment.runs) == 2 * len(names)
    for run in experiment.runs:
        accepted(tmp_path, run_name(experiment.place(run)))


@pytest.mark.parametrize("parent", ["mine (2)", "long" * 60, "数" * 90, "back\\slash", "new\nline", " blank"])
def test_a_renamed_experiment_folder_gives_a_name_that_sites_accept(tmp_path, parent):
    accepted(tmp_path, run_name(Path(parent) / "FedKDX+-seed0"))


def test_long_names_that_differ_stay_different():
    one, other = (run_name(Path("long" * 60) / f"FedAvg-seed{seed}") for seed in (0, 1))
    assert one != other


@pytest.mark.parametrize(
    "run", ["", ".", "..", ".hidden", "../up", "a/b", "a\\b", "c:d", "line\nbreak", "nul\0", "end.", "l" * 101, 7, None]
)
def test_a_name_that_is_no_plain_folder_is_refused_before_anything_is_made(tmp_path, run):
    with pytest.raises(UserError, match="a run cannot be called"):
        StateFolder(tmp_path / "state", run, 3)
    assert not (tmp_path / "state").exists()
