"""A comparison that was interrupted goes on, and ends as if it had not been."""

from __future__ import annotations

import csv
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
import torch
import yaml

from fedkdx_plugin.cli import main
from fedkdx_plugin.engine import sequential
from fedkdx_plugin.engine.rounds import Federation

ROUNDS = 4


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def command(data: Path, out: str, *more: str) -> list[str]:
    common = f"-algo Local,FedAvg,FedKDX -m cnn_small -gr {ROUNDS} -jr 0.7 -ls 1 -dev cpu -o {out}"
    return ["-data", str(data), *common.split(), *more]


def outcome(out: str) -> dict[str, object]:
    """Everything of a comparison that is not time."""
    found: dict[str, object] = {}
    for path in sorted(Path(out).glob("*/*/state.safetensors")):
        found[f"{path.parent.name} state"] = path.read_bytes()
    for path in sorted(Path(out).glob("*/*/metrics.csv")):
        rows = list(csv.DictReader(path.open()))
        found[f"{path.parent.name} metrics"] = [
            {name: value for name, value in row.items() if not name.startswith("seconds")} for row in rows
        ]
    for path in sorted(Path(out).glob("*/*/results.h5")):
        with h5py.File(path) as file:
            for name in ("views/served/client_auc", "views/served/confusion", "selected", "bytes_up"):
                found[f"{path.parent.name} {name}"] = repr(
                    file[name][:].tolist()
                )  # NaN, which clients set apart have, equals itself
    return found


def interrupt_after(monkeypatch, calls: int) -> None:
    """Press Ctrl-C during the given client's training, counted over the whole comparison."""
    original, count = sequential.train, iter(range(10**6))

    def train(*arguments):
        if next(count) == calls:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(sequential, "train", train)


# two clients a round: in the middle of the first round, between rounds, within Local, FedAvg, FedKDX, and in the last
@pytest.mark.parametrize("calls", [1, 4, 11, 18, 19, 23])
def test_ctrl_c_and_resume_end_bit_identical(shard_folder, monkeypatch, calls, capsys):
    assert main(command(shard_folder, "whole")) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, calls)
        assert main(command(shard_folder, "parts")) == 130
    (folder,) = Path("parts").iterdir()
    assert f"fedkdx --resume {folder}" in capsys.readouterr().err
    assert main(["--resume", str(folder)]) == 0
    assert outcome("parts") == outcome("whole")


def test_clients_set_apart_stay_the_same(shard_folder, monkeypatch):
    """And so does who predicts at each client, which FedKDX has chosen on held-out windows."""
    more = "--unseen 1 --late 0.5@3 --rare 0.5@0.5 --set serve=both --set teacher_init=student".split()
    assert main(command(shard_folder, "whole", *more)) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 7)
        assert main(command(shard_folder, "parts", *more)) == 130
    (folder,) = Path("parts").iterdir()
    assert main(["--resume", str(folder)]) == 0
    assert outcome("parts") == outcome("whole")


def test_several_interruptions(shard_folder, monkeypatch):
    assert main(command(shard_folder, "whole")) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        assert main(command(shard_folder, "parts")) == 130
    (folder,) = Path("parts").iterdir()
    for calls in (3, 7):
        with monkeypatch.context() as patch:
            interrupt_after(patch, calls)
            assert main(["--resume", str(folder)]) == 130
    assert main(["--resume", str(folder)]) == 0
    assert outcome("parts") == outcome("whole")


KILLED = """
import os, signal, sys
from fedkdx_plugin.cli import main
from fedkdx_plugin.engine import results
from fedkdx_plugin.engine.rounds import Federation
results.CHECKPOINT_SECONDS = 0  # a checkpoint after every round
original, count = Federation.round, iter(range(1000))
def round(self, index):
    if next(count) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, index)
Federation.round = round
import torch
torch.set_num_threads(int(sys.argv[2]))
main(sys.argv[3:])
"""


@pytest.mark.parametrize(("round", "backend"), [(2, "sequential"), (5, "parallel"), (9, "parallel"), (10, "stacked")])
def test_kill_9_and_resume_end_bit_identical(shard_folder, round, backend):
    threads = 2 if backend == "parallel" else 1
    torch.set_num_threads(threads)
    assert main(command(shard_folder, "whole", "--backend", backend)) == 0
    root = Path(__file__).parent.parent
    arguments = [str(round), str(threads), *command(shard_folder, str(Path.cwd() / "parts"), "--backend", backend)]
    run = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=root, capture_output=True)
    assert run.returncode == -signal.SIGKILL, run.stderr
    (folder,) = Path("parts").iterdir()
    assert main(["--resume", str(folder)]) == 0
    assert outcome("parts") == outcome("whole")


def test_resuming_what_is_finished_trains_nothing(shard_folder, monkeypatch, capsys):
    assert main(command(shard_folder, "whole")) == 0
    (folder,) = Path("whole").iterdir()
    before, table = outcome("whole"), (folder / "comparison.md").read_text()
    monkeypatch.setattr(Federation, "round", lambda *_: pytest.fail("a round was run"))
    assert main(["--resume", str(folder)]) == 0
    assert outcome("whole") == before
    assert (folder / "comparison.md").read_text() == table


@pytest.fixture
def stopped(shard_folder, monkeypatch) -> Path:
    """A comparison interrupted in FedAvg's third round."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, 12)
        assert main(command(shard_folder, "runs")) == 130
    (folder,) = Path("runs").iterdir()
    return folder


def refused(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_a_damaged_checkpoint_is_refused(stopped, capsys, damage):
    state = stopped / "FedAvg-seed0" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-10] if damage is None else damage)
    line = refused(capsys, "--resume", str(stopped))
    assert "FedAvg-seed0" in line
    assert "damaged" in line


def test_a_checkpoint_of_another_configuration_is_refused(stopped, capsys):
    config = stopped / "config.yaml"
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"batch_size": 7}))
    assert "another configuration" in refused(capsys, "--resume", str(stopped))


def test_a_checkpoint_of_another_algorithm_is_refused(stopped, capsys):
    (stopped / "FedAvg-seed0" / "state.safetensors").write_bytes(
        (stopped / "Local-seed0" / "state.safetensors").read_bytes()
    )
    assert "another configuration" in refused(capsys, "--resume", str(stopped))


def test_damaged_results_are_refused(stopped, capsys):
    (stopped / "FedAvg-seed0" / "results.h5").write_bytes(b"no hdf5")
    assert "damaged" in refused(capsys, "--resume", str(stopped))


def test_what_cannot_be_resumed(stopped, capsys):
    assert "no comparison there" in refused(capsys, "--resume", "nowhere")
    assert "no other option, such as join_ratio" in refused(capsys, "--resume", str(stopped), "-jr", "0.5")
