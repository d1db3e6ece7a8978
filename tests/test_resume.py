"""A comparison that was interrupted goes on, and ends as if it had not been."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml

from fedkdx_plugin.cli.main import main
from fedkdx_plugin.engine.backends import sequential
from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.results import run_folder
from fedkdx_plugin.results.runs import Run, read
from registry.interface import Message
from tests.conftest import same_state
from tests.sealing import reseal

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


# three clients a round of Local, two of the others: in the middle of the first round, between rounds, within Local,
# FedAvg, FedKDX, and in the last
@pytest.mark.parametrize("calls", [1, 3, 7, 15, 23, 27])
def test_ctrl_c_and_resume_end_bit_identical(shard_folder, monkeypatch, calls, capsys):
    assert main(command(shard_folder, "whole")) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, calls)
        assert main(command(shard_folder, "parts")) == 130
    (folder,) = Path("parts").iterdir()
    assert f"fedkdx resume {folder}" in capsys.readouterr().err
    assert main(["--resume", str(folder)]) == 0
    assert outcome("parts") == outcome("whole")


@pytest.mark.parametrize("calls", [0, 2, 5, 10, 11])
def test_ctrl_c_while_the_end_of_a_round_is_noted(shard_folder, monkeypatch, calls):
    """Its record never goes without the state of the same round: the next would be made from the one before."""
    assert main(command(shard_folder, "whole")) == 0
    original, count = Federation.save, iter(range(10**6))

    def save(federation):
        if next(count) == calls:
            raise KeyboardInterrupt
        return original(federation)

    with monkeypatch.context() as patch:
        patch.setattr(Federation, "save", save)
        assert main(command(shard_folder, "parts")) == 130
    (folder,) = Path("parts").iterdir()
    assert main(["--resume", str(folder)]) == 0
    assert outcome("parts") == outcome("whole")


def test_clients_set_apart_stay_the_same(shard_folder, monkeypatch):
    """And so does who predicts at each client, which with FedKDX+ is a mixture of the client's own."""
    more = "--unseen 1 --late 0.5@3 --rare 0.5@0.5 -algo Local,FedAvg,FedKDX+".split()
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
from fedkdx_plugin.cli.main import main
from fedkdx_plugin.results import run_folder
from fedkdx_plugin.engine.rounds import Federation
run_folder.CHECKPOINT_SECONDS = 0  # a checkpoint after every round
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
    """Run a comparison that is interrupted in FedAvg's third round."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, 16)
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
    file = stopped / "experiment.yaml"
    content = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(content | {"base": content["base"] | {"batch_size": 7}}))
    assert "experiment.yaml: damaged or exchanged" in refused(capsys, "--resume", str(stopped))
    reseal(stopped)
    assert "of another run than Local (batch_size: 32 and 7)" in refused(capsys, "--resume", str(stopped))
    shutil.rmtree(stopped / "Local-seed0")
    assert "of another run than FedAvg (batch_size: 32 and 7)" in refused(capsys, "--resume", str(stopped))


def test_a_checkpoint_of_another_algorithm_is_refused(stopped, capsys):
    (stopped / "FedAvg-seed0" / "state.safetensors").write_bytes(
        (stopped / "Local-seed0" / "state.safetensors").read_bytes()
    )
    assert "damaged or exchanged" in refused(capsys, "--resume", str(stopped))
    reseal(stopped / "FedAvg-seed0")
    assert "a checkpoint of another configuration; " in refused(capsys, "--resume", str(stopped))


def test_damaged_results_are_refused(stopped, capsys):
    (stopped / "FedAvg-seed0" / "results.h5").write_bytes(b"no hdf5")
    assert "damaged" in refused(capsys, "--resume", str(stopped))


def test_what_cannot_be_resumed(stopped, capsys):
    assert "nowhere: no such folder" in refused(capsys, "--resume", "nowhere")
    assert "no experiment there" in refused(capsys, "--resume", str(stopped.parent))
    assert "unrecognized arguments: -jr 0.5" in refused(capsys, "--resume", str(stopped), "-jr", "0.5")
    said = refused(capsys, "resume", str(stopped), "-lr", "0.1")
    assert said.endswith("arguments: -lr 0.1; options are those of the start, and of these only -gr may change")
    assert "did you mean --slurm?" in refused(capsys, "resume", str(stopped), "--slrum", "time=1")
    many = refused(capsys, "resume", *[str(stopped / "a folder of a long name")] * 50)
    assert len(many) < 250 and many.endswith("...; see --help")


def test_the_folder_of_one_run_stands_for_its_comparison(stopped, capsys):
    assert main(["--resume", str(stopped / "FedAvg-seed0")]) == 0
    assert sorted(path.name for path in stopped.iterdir() if path.is_dir()) == [
        "FedAvg-seed0",
        "FedKDX-seed0",
        "Local-seed0",
    ]
    assert (stopped / "comparison.md").is_file() and not list(stopped.glob("*/*-seed0"))


def test_a_comparison_of_an_earlier_version_is_refused_by_name(stopped, capsys):
    (stopped / "experiment.yaml").rename(stopped / "config.yaml")
    assert "made by an earlier version" in refused(capsys, "resume", str(stopped))


def test_a_run_without_its_experiment_is_said_to_be_one(stopped, tmp_path, capsys):
    (stopped / "FedAvg-seed0").rename(tmp_path / "lonely")
    assert "a run without its experiment" in refused(capsys, "--resume", str(tmp_path / "lonely"))


def test_resuming_goes_on_to_more_rounds(shard_folder, capsys):
    """As an unbroken run, where nothing depends on the number of rounds in all; and the folder says what was done."""
    more = ["-gr", str(ROUNDS + 3)]
    algorithms = ["-algo", "Local,FedAvg"]
    assert main([*command(shard_folder, "whole"), *algorithms, *more]) == 0
    assert main([*command(shard_folder, "parts"), *algorithms]) == 0
    (folder,) = Path("parts").iterdir()
    capsys.readouterr()
    assert main(["--resume", str(folder), *more]) == 0
    assert f"{ROUNDS + 3} rounds instead of {ROUNDS}" in capsys.readouterr().out
    assert yaml.safe_load((folder / "experiment.yaml").read_text())["base"]["global_rounds"] == ROUNDS + 3
    for name in ("Local", "FedAvg"):
        run = folder / f"{name}-seed0"
        assert yaml.safe_load((run / "config.yaml").read_text())["global_rounds"] == ROUNDS + 3
        assert json.loads((run / "environment.json").read_text())["planned_rounds"] == [ROUNDS, ROUNDS + 3]
    one, other = outcome("parts"), outcome("whole")
    for name in one:
        if "state" not in name:
            assert one[name] == other[name], name
    (whole,) = Path("whole").iterdir()
    for name in ("Local", "FedAvg"):
        states = [
            Message.from_bytes((at / f"{name}-seed0" / "state.safetensors").read_bytes()) for at in (folder, whole)
        ]
        assert same_state(dict(states[0].tensors), dict(states[1].tensors))
    assert main(["--resume", str(folder)]) == 0  # as it is now: nothing to do
    assert outcome("parts") == one


def test_fewer_rounds_than_there_are_is_refused(shard_folder, capsys):
    assert main([*command(shard_folder, "runs"), "-algo", "Local"]) == 0
    (folder,) = Path("runs").iterdir()
    assert f"has {ROUNDS} rounds already; -gr 2 would be fewer" in refused(capsys, "--resume", str(folder), "-gr", "2")


def test_a_finished_run_that_is_refused_more_rounds_stays_finished(shard_folder, monkeypatch, capsys):
    assert main([*command(shard_folder, "runs"), "-algo", "Local"]) == 0
    (folder,) = Path("runs").iterdir()
    before, failed = outcome("runs"), folder / "Local-seed0" / "failed.txt"
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "__version__", "0.0.0")
        said = refused(capsys, "--resume", str(folder), "-gr", str(ROUNDS + 1))
        assert "a checkpoint of another version of fedkdx; " in said
    assert not failed.exists() and isinstance(read(folder / "Local-seed0"), Run)
    failed.write_text("what a call before has left\n")
    assert main(["--resume", str(folder)]) == 0  # its rounds are all there, so that it has not failed
    assert not failed.exists() and outcome("runs") == before


def test_a_relative_path_resumes_from_another_folder(tmp_path, monkeypatch):
    """The user's own data, the shards made of them and the folder of runs are all named relative to where it began."""
    rng = np.random.default_rng(0)
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    for folder in (here / "mine", elsewhere):
        folder.mkdir(parents=True)
    for subject in "abc":
        rows = [f"{x:.4f},{y:.4f},{('rest', 'walk')[i // 600]}" for i, (x, y) in enumerate(rng.normal(size=(1200, 2)))]
        (here / "mine" / f"{subject}.csv").write_text("\n".join(["x,y,activity", *rows]) + "\n")
    text = "name: Mine\nfolder: mine\nrate: 50\nwindow: 1.0\ncolumns: [x, y]\nlabel: activity\n"
    (here / "mine.yaml").write_text(text)
    monkeypatch.chdir(here)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 16)
        assert main(command("mine.yaml", "runs")) == 130
    (folder,) = Path("runs").iterdir()
    monkeypatch.chdir(elsewhere)
    assert main(["--resume", f"../here/{folder}"]) == 0
    assert Path.cwd() == elsewhere and not list(elsewhere.iterdir())
    assert (here / folder / "comparison.md").is_file()
    assert len([path for path in (here / "data" / "Mine").iterdir() if path.is_dir()]) == 1


TERMINATED = """
import os, signal, sys
from fedkdx_plugin.cli.main import main
from fedkdx_plugin.engine.rounds import Federation
original, count = Federation.round, iter(range(1000))
def round(self, index):
    record = original(self, index)
    if next(count) == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGTERM)
    return record
Federation.round = round
import torch
torch.set_num_threads(int(sys.argv[2]))
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize(("round", "backend"), [(2, "sequential"), (6, "parallel"), (9, "parallel")])
def test_sigterm_ends_like_ctrl_c(shard_folder, round, backend):
    threads = 2 if backend == "parallel" else 1
    torch.set_num_threads(threads)
    assert main(command(shard_folder, "whole", "--backend", backend)) == 0
    root = Path(__file__).parent.parent
    arguments = [str(round), str(threads), *command(shard_folder, str(Path.cwd() / "parts"), "--backend", backend)]
    run = subprocess.run([sys.executable, "-c", TERMINATED, *arguments], cwd=root, capture_output=True, text=True)
    assert run.returncode == 130 and "Traceback" not in run.stderr
    (folder,) = Path("parts").iterdir()
    assert f"to go on: fedkdx resume {folder.absolute()}" in run.stderr
    assert main(["--resume", str(folder)]) == 0
    assert outcome("parts") == outcome("whole")


def test_sigterm_while_shards_are_made_leaves_nothing(tmp_path):
    program = """
import os, signal, sys
from dataset_utils import generate, scaling
generate.scaling.statistics = lambda x: os.kill(os.getpid(), signal.SIGTERM)
sys.exit(generate.main(sys.argv[1:]))
"""
    arguments = ["-data", "SPAR", "--data-root", str(tmp_path / "data")]
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", program, *arguments], cwd=root, capture_output=True, text=True)
    assert run.returncode == 130 and run.stderr == "interrupted: nothing was left half-written\n"
    assert not list((tmp_path / "data" / "SPAR").iterdir())


def test_whoever_calls_main_keeps_a_signal_handler_of_their_own(capsys):
    def mine(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, mine)
    try:
        assert main(["--resume", "nowhere"]) == 2
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
