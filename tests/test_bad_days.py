"""Signals and killed processes lose no work, and leave nothing behind that goes on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dataset_utils.interrupts import stopping_as_ctrl_c
from dataset_utils.sealed import Sealed
from fedkdx_plugin.cli.main import guarded, main
from tests.test_resume import command, interrupt_after, outcome

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- signals

SIGNALLED = """
import os, signal, sys
from fedkdx_plugin.cli.main import main
from dataset_utils.sealed import Sealed
from fedkdx_plugin.engine.rounds import Federation
number, more = getattr(signal, sys.argv[1]), int(sys.argv[2])
original, write, count = Federation.round, Sealed.write, iter(range(1000))
stopped = []
def round(self, index):
    record = original(self, index)
    if next(count) == 2:
        stopped.append(1)
        os.kill(os.getpid(), number)
    return record
def again(self, contents):
    for _ in range(more if stopped else 0):
        os.kill(os.getpid(), signal.SIGINT)
    write(self, contents)
Federation.round, Sealed.write = round, again
import torch
torch.set_num_threads(1)
sys.exit(main(sys.argv[3:]))
"""


def stopped(data: Path, name: str, more: int) -> subprocess.CompletedProcess:
    arguments = [name, str(more), *command(data, str(Path.cwd() / "parts"), "--backend", "sequential")]
    run = [sys.executable, "-c", SIGNALLED, *arguments]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True)


def test_a_closed_terminal_and_a_second_ctrl_c_lose_nothing(shard_folder):
    assert main(command(shard_folder, "whole", "--backend", "sequential")) == 0
    done = stopped(shard_folder, "SIGHUP", 1)
    assert done.returncode == 130 and "Traceback" not in done.stderr
    assert "stopping already, and saving" in done.stderr and "to go on: fedkdx resume" in done.stderr
    (folder,) = Path("parts").iterdir()
    assert main(["resume", str(folder)]) == 0
    assert outcome("parts") == outcome("whole")


def test_the_third_ctrl_c_ends_at_once_and_without_a_traceback(shard_folder):
    done = stopped(shard_folder, "SIGINT", 2)
    assert done.returncode == 130 and "Traceback" not in done.stderr and "to go on" not in done.stderr


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ImportError("a package that is interrupted while it is imported"), 130, "stopped\n"),
        (SystemError("returned a result with an exception set"), 130, "stopped\n"),
        (OSError(28, "No space left on device", "runs/x"), 2, "error: runs/x: No space left on device\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_error_that_an_interrupted_package_makes_of_a_signal_is_no_traceback(capsys, error, code, said):
    def command():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        except KeyboardInterrupt:
            raise error from None

    assert guarded(command) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("handler", ["SIG_DFL", "SIG_IGN"])
def test_ctrl_c_while_the_program_is_imported_leaves_no_traceback(tmp_path, handler):
    """A module that the program imports stands for any: while it is imported, Ctrl-C comes."""
    (tmp_path / "tempfile.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nprint('went on')\n")
    start = (
        f"import os, signal, sys; signal.signal(signal.SIGINT, signal.{handler}); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    run = [sys.executable, "-c", start, str(ROOT / "run.py"), "--version"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True)
    if handler == "SIG_DFL":
        assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")
    else:
        assert "went on" in ended.stdout


def test_nohup_means_it():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping_as_ctrl_c():
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_ctrl_c_in_python_says_how_to_go_on(shard_folder, monkeypatch, capsys):
    import fedkdx_plugin as fedkdx

    options = {"model": "cnn_small", "rounds": 3, "device": "cpu", "out": "runs", "join_ratio": 1}
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)
        with pytest.raises(KeyboardInterrupt):
            fedkdx.compare(shard_folder, "FedAvg", progress=False, **options)
    line = capsys.readouterr().err
    assert line.startswith("stopped; to go on: fedkdx.Experiment.resumed('runs/")
    (run,) = eval(line.partition("to go on: ")[2], {"fedkdx": fedkdx}).runs
    assert len(run.records) == 3


# ---- a parent that is killed

BUSY = """
import os, sys, time
from fedkdx_plugin.testing.made import make_federation
from baselines.fedavg import FedAvg, FedAvgClient
from registry.interface import Round
import torch
torch.set_num_threads(2)
class Slow(FedAvg):
    class Client(FedAvgClient):
        def losses(self, *_):
            os.write(1, f"{os.getpid()}\\n".encode())  # in one piece: two workers write here
            time.sleep(600)
make_federation(Slow, backend="parallel").round(Round(1, 3))
"""


def ended(pids: list[int], seconds: float = 30.0) -> bool:
    left = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    until = time.monotonic() + seconds
    while left and time.monotonic() < until:
        left = [one for one in left if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        time.sleep(0.1)
    return not left


def test_busy_workers_end_with_a_parent_that_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", BUSY], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    assert parent.pid not in workers
    parent.kill()
    parent.wait()
    assert ended(workers)


def _waits(place, parent):
    files_there = Path(place)
    sys.platform = "other"  # without the help of Linux
    from dataset_utils.interrupts import end_with

    end_with(os.getppid(), signal.SIGKILL)
    (files_there / f"{os.getpid()}").touch()
    time.sleep(600)


def _starts(place):
    multiprocessing.get_context("fork").Process(target=_waits, args=(place, os.getpid())).start()
    time.sleep(600)


def test_a_worker_watches_its_parent_on_any_system(tmp_path):
    parent = multiprocessing.get_context("fork").Process(target=_starts, args=(tmp_path,))
    parent.start()
    while not list(tmp_path.iterdir()):
        time.sleep(0.05)
    (worker,) = [int(path.name) for path in tmp_path.iterdir()]
    parent.kill()
    parent.join()
    assert ended([worker])


STARTS = """
import os, subprocess, sys, time
from dataset_utils.interrupts import ending_with
print(subprocess.Popen(ending_with(os.getpid(), ["/bin/sleep", "600"])).pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a program of its parent's end")
def test_another_program_ends_with_a_parent_that_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", STARTS], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    started = int(parent.stdout.readline())
    until = time.monotonic() + 30
    while psutil.Process(started).name() != "sleep" and time.monotonic() < until:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    assert ended([started])


def test_runs_side_by_side_save_their_state_when_their_parent_is_killed(shard_folder):
    Path("grid.yaml").write_text(
        f"title: Grid\nbase: {{data: '{shard_folder}', model: cnn_small, global_rounds: 100000, device: cpu,\n"
        f"  algorithm: [FedAvg], local_epochs: 1, out: '{Path.cwd() / 'runs'}'}}\ngrid: {{seed: [0, 1]}}\n"
    )
    run = [sys.executable, "-m", "fedkdx_plugin.cli.main", "experiment", "grid.yaml", "--jobs", "2"]
    parent = subprocess.Popen(run, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while time.monotonic() < until and len([m for m in Path().rglob("metrics.csv") if m.stat().st_size > 2000]) < 2:
        time.sleep(0.2)
    children = [child.pid for child in psutil.Process(parent.pid).children(recursive=True)]
    assert len(children) >= 2
    parent.kill()
    parent.wait()
    assert ended(children)
    states = list(Path().rglob("state.safetensors"))
    assert len(states) == 2
    for path in states:
        assert Sealed(path.parent, "").read("results.h5") and Sealed(path.parent, "").read("state.safetensors")
