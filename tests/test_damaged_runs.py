"""Files of run folders that were damaged, exchanged or removed: one clear line within seconds, or the right numbers."""

from __future__ import annotations

import csv
import json
import random
import shutil
import time
from pathlib import Path

import h5py
import pytest
import torch
import yaml

import fedkdx_plugin as fedkdx
from dataset_utils.sealed import SUMS
from fedkdx_plugin.cli.main import main
from fedkdx_plugin.results import run_folder, runs
from registry.interface import Message
from tests.sealing import reseal
from tests.test_resume import interrupt_after

ROUNDS = 3
RUN = "FedAvg-seed0"
SEALED = ["config.yaml", "environment.json", "results.h5", "state.safetensors", SUMS]
FREE = ["metrics.csv", "log.txt"]  # which are written anew, or only added to
SECONDS = 20.0


def command(data: Path, out: Path, *more: str) -> list[str]:
    common = f"-algo FedAvg -m cnn_small -gr {ROUNDS} -jr 1 -ls 1 -dev cpu --backend sequential"
    return ["-data", str(data), *common.split(), "-o", str(out), *more]


def made(data: Path, out: Path, *more: str) -> Path:
    assert main(command(data, out, *more)) == 0
    (folder,) = out.iterdir()
    return folder


@pytest.fixture(scope="module")
def whole(shard_folder, tmp_path_factory) -> Path:
    """Return the experiment folder of a finished run."""
    torch.set_num_threads(1)
    return made(shard_folder, tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def stopped(shard_folder, tmp_path_factory) -> Path:
    """Return the experiment folder of a run that was stopped in its last round."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 7)
        assert main(command(shard_folder, out)) == 130
    (folder,) = out.iterdir()
    return folder


def numbers(folder: Path) -> list[dict[str, str]]:
    rows = csv.DictReader((folder / RUN / "metrics.csv").open())
    return [{name: value for name, value in row.items() if not name.startswith("seconds")} for row in rows]


def state(folder: Path) -> bytes:
    return (folder / RUN / "state.safetensors").read_bytes()


def resumed(folder: Path, capsys) -> str:
    """Resume; return the line of the error, '' where it went on to its end."""
    capsys.readouterr()
    began = time.monotonic()
    code = main(["resume", str(folder)])
    assert time.monotonic() - began < SECONDS
    err = capsys.readouterr().err
    assert code in (0, 2) and "Traceback" not in err, err
    if code == 0:
        return ""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def flip(path: Path, seed: int, count: int) -> None:
    rng, content = random.Random(seed), bytearray(path.read_bytes())
    for _ in range(count):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("name", [*SEALED, *FREE, "manifest.json", "../experiment.yaml", f"../{SUMS}"])
@pytest.mark.parametrize("kind", ["whole", "stopped"])
def test_flipped_bits_are_found_or_do_not_matter(kind, name, count, whole, request, tmp_path, capsys):
    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "copy")
    path = (folder / RUN / name).resolve()
    unread = name in (*FREE, "manifest.json") or (kind == "whole" and name == "state.safetensors")
    before = path.read_bytes()
    flip(path, count + sum(map(ord, name)), count)
    line = resumed(folder, capsys)
    if line:
        assert path.name in line and not unread
        assert "put" in line or "remove" in line  # what to do
        path.write_bytes(before)  # as the line says
        assert resumed(folder, capsys) == ""
    else:
        assert unread or name.endswith(SUMS)
        if kind == "whole":  # where nothing was made anew
            path.write_bytes(before)
    assert numbers(folder) == numbers(whole)
    assert state(folder) == state(whole)


@pytest.mark.parametrize("name", SEALED)
@pytest.mark.parametrize("how", ["cut", "empty", "gone"])
@pytest.mark.parametrize("kind", ["whole", "stopped"])
def test_files_cut_short_emptied_or_removed(kind, how, name, request, tmp_path, capsys):
    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "copy")
    path = folder / RUN / name
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-7] if how == "cut" else b"")
    line = resumed(folder, capsys)
    unread = kind == "whole" and name == "state.safetensors"
    anew = name == "environment.json" and how == "gone"
    assert name in line or (unread and not line) or anew


def test_a_damaged_hdf5_is_never_opened(whole, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(whole, tmp_path / "copy")
    flip(folder / RUN / "results.h5", 0, 20)
    monkeypatch.setattr(h5py, "File", lambda *_: pytest.fail("libhdf5 was given a damaged file"))
    assert "results.h5: damaged or exchanged" in resumed(folder, capsys)
    assert main(["report", str(folder)]) == 2
    assert "results.h5: damaged or exchanged" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [OverflowError, IndexError, UnicodeDecodeError("utf-8", b"", 0, 1, "x")])
def test_whatever_the_library_raises_of_results_is_one_line(whole, stopped, tmp_path, capsys, monkeypatch, kind):
    """A length of more than 64 bits in the file is an OverflowError; the checksums fit."""

    def fails(*_):
        raise kind

    monkeypatch.setattr(runs, "read_results", fails)
    monkeypatch.setattr(run_folder, "read_results", fails)
    with pytest.raises(fedkdx.UserError, match=r"results\.h5: damaged \("):
        fedkdx.load_runs(whole)
    assert "results.h5: damaged (" in resumed(shutil.copytree(stopped, tmp_path / "copy"), capsys)


def test_hdf5_meets_no_disk(shard_folder, tmp_path, monkeypatch):
    """On a full one libhdf5 may end the process."""
    original, places = h5py.File, []
    monkeypatch.setattr(h5py, "File", lambda name, *more: (places.append(name), original(name, *more))[1])
    made(shard_folder, tmp_path)
    assert places and not any(isinstance(place, (str, Path)) for place in places)


def test_nan_in_a_state_is_found(stopped, tmp_path, capsys):
    folder = shutil.copytree(stopped, tmp_path / "copy")
    path = folder / RUN / "state.safetensors"
    saved = Message.from_bytes(path.read_bytes())
    tensors = {name: tensor * float("nan") for name, tensor in saved.tensors.items()}
    path.write_bytes(Message(tensors, saved.meta).to_bytes())
    assert "state.safetensors: damaged or exchanged, its SHA-256 is not that in SHA256SUMS" in resumed(folder, capsys)


@pytest.fixture(scope="module")
def other(shard_folder, tmp_path_factory) -> Path:
    """Return the experiment folder of a run with another seed, stopped a round earlier than `stopped`."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("other")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 4)
        assert main([*command(shard_folder, out), "--seed", "1"]) == 130
    (folder,) = out.iterdir()
    return folder


def test_files_of_another_seed_are_refused_by_what_they_say(stopped, other, tmp_path, capsys):
    """Even where the checksums were made anew."""
    for name, says in (
        ("results.h5", "results.h5: of another run than config.yaml (seed: 1 and 0)"),
        ("state.safetensors", "state.safetensors: a checkpoint of another configuration"),
        ("config.yaml", "of another run than"),
    ):
        folder = shutil.copytree(stopped, tmp_path / name)
        shutil.copy(other / f"{RUN[:-1]}1" / name, folder / RUN)
        assert f"{name}: damaged or exchanged" in resumed(folder, capsys)
        reseal(folder / RUN)
        assert says in resumed(folder, capsys)


def test_the_folder_of_another_run_in_place_of_a_finished_one_is_refused(shard_folder, whole, tmp_path, capsys):
    other = made(shard_folder, tmp_path / "other", "--seed", "1")
    folder = shutil.copytree(whole, tmp_path / "copy")
    shutil.rmtree(folder / RUN)
    shutil.copytree(other / f"{RUN[:-1]}1", folder / RUN)
    assert "of another run than FedAvg (seed: 1 and 0)" in resumed(folder, capsys)


def test_results_of_an_earlier_round_are_refused(stopped, shard_folder, tmp_path, capsys):
    out = tmp_path / "early"
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 4)
        assert main(command(shard_folder, out)) == 130
    (early,) = out.iterdir()
    folder = shutil.copytree(stopped, tmp_path / "copy")
    shutil.copy(early / RUN / "results.h5", folder / RUN)
    assert "results.h5: damaged or exchanged" in resumed(folder, capsys)
    reseal(folder / RUN)
    assert "results.h5: of round 1, and state.safetensors of round 2" in resumed(folder, capsys)


def test_a_state_that_was_removed_is_said_to_be_missing(stopped, tmp_path, capsys):
    folder = shutil.copytree(stopped, tmp_path / "copy")
    (folder / RUN / "state.safetensors").unlink()
    assert f"{RUN}/state.safetensors: missing, it was removed; put it back" in resumed(folder, capsys)
    shutil.copy(stopped / RUN / "state.safetensors", folder / RUN)
    assert resumed(folder, capsys) == ""


def test_an_environment_that_was_removed_is_said_to_be_missing(whole, stopped, tmp_path, capsys):
    """Such a run looks as if it had not begun; made again, it would replace what there is."""
    for before in (whole, stopped):
        folder = shutil.copytree(before, tmp_path / before.name)
        (folder / RUN / "environment.json").unlink()
        kept = (folder / RUN / "results.h5").read_bytes()
        says = f"{RUN}/environment.json: missing, it was removed; put it back"
        assert says in resumed(folder, capsys)
        assert (folder / RUN / "results.h5").read_bytes() == kept
        assert main(["report", str(folder)]) == 2
        assert says in capsys.readouterr().err
        shutil.copy(before / RUN / "environment.json", folder / RUN)
        assert resumed(folder, capsys) == ""


def test_a_folder_of_an_earlier_format_is_refused_by_its_number(stopped, whole, tmp_path, capsys):
    folder = shutil.copytree(stopped, tmp_path / "copy")
    path = folder / RUN / "environment.json"
    environment = json.loads(path.read_text())
    path.write_text(json.dumps(environment | {"format": 2}))
    reseal(folder / RUN)
    line = resumed(folder, capsys)
    assert "a run folder of format 2, and this version goes on with format 3; go on with fedkdx 0.1.0" in line
    path.write_text(json.dumps(environment | {"format": 4}))
    reseal(folder / RUN)
    assert "a run folder of format 4, and this version reads 1 to 3; update fedkdx" in resumed(folder, capsys)
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"format": 2}))
    reseal(folder)
    assert "has format 2, and this version resumes format 3" in resumed(folder, capsys)
    finished = shutil.copytree(whole, tmp_path / "finished")  # of a format without checksums
    path = finished / RUN / "environment.json"
    path.write_text(json.dumps(environment | {"format": 2}))
    (finished / RUN / SUMS).unlink()
    assert len(fedkdx.load_runs(finished).runs) == 1


def test_another_machine_is_said_and_noted(stopped, tmp_path, capsys):
    folder = shutil.copytree(stopped, tmp_path / "copy")
    path = folder / RUN / "environment.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"threads": 7, "fused": "never"}))
    reseal(folder / RUN)
    assert main(["resume", str(folder)]) == 0
    said = "resumed after round 2 with threads 1 instead of 7, fused"
    assert said in capsys.readouterr().err
    assert said in (folder / RUN / "log.txt").read_text()
    (note,) = json.loads((folder / RUN / "environment.json").read_text())["resumed"]
    assert said in note


def test_another_version_of_a_plug_in_is_refused():
    settings = {"seed": 0}
    about = {"data": {"manifest_sha256": "0"}, "versions": {"fedkdx": "1", "torch": "2"}, "code": "3"}
    one, other = ({"plugins": {"Foo": f"foo {version}"}} for version in ("1.0", "1.1"))
    assert run_folder.identity(settings, about | one) != run_folder.identity(settings, about | other)


def test_a_damaged_folder_does_not_keep_the_others_from_a_report(whole, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    place = tmp_path / "runs"
    good, bad = (shutil.copytree(whole, place / name) for name in ("good", "bad"))
    flip(bad / RUN / "results.h5", 1, 5)
    flip(bad / "experiment.yaml", 1, 50)
    nowhere = tmp_path / "nowhere"
    assert main(["report", str(nowhere), str(good), str(bad), "-o", str(tmp_path / "report")]) == 0
    err = capsys.readouterr().err
    assert f"skipped: {nowhere}: no such folder" in err
    assert f"skipped: bad/{RUN}: {bad / RUN}/results.h5: damaged or exchanged" in err
    assert "damaged or exchanged" in (tmp_path / "report" / "report.md").read_text()
    flip(good / "experiment.yaml", 1, 50)
    assert main(["report", str(good)]) == 0
    assert f"skipped: {good}/experiment.yaml: damaged" in capsys.readouterr().err
    assert main(["report", str(bad)]) == 2
