"""Signals, killed processes, full disks and barred folders: nothing is lost, and one line says what is wrong."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from dataset_utils import files, sealed
from dataset_utils.files import UNFINISHED, replacing
from dataset_utils.interrupts import stopping_as_ctrl_c
from dataset_utils.sealed import SUMS, Sealed
from fedkdx_plugin.cli.main import main
from registry.errors import UserError
from tests.test_resume import command, interrupt_after, outcome

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ---- sealed folders


class PowerCut(BaseException):
    pass


def test_a_power_cut_at_any_moment_leaves_files_that_match(tmp_path, monkeypatch):
    """Of every file the content before or the new one is there, and is accepted."""
    original = files.replacing
    for moment in range(10):
        for after in (False, True):  # the file has its place already, or not yet
            folder = Sealed(tmp_path / f"{moment}{after}", "")
            folder.write({"a": b"1", "b": b"1"})
            count = iter(range(100))

            def cut(path, private=False, count=count, moment=moment, after=after):
                now = next(count)
                if now == moment and not after:
                    raise PowerCut
                return _cutting(original(path, private), now == moment)

            with monkeypatch.context() as patch:
                patch.setattr(sealed, "replacing", cut)
                if moment < 5:  # checksums, three files, checksums
                    with pytest.raises(PowerCut):
                        folder.write({"a": b"2", "b": b"2", "c": b"2"})
                else:
                    folder.write({"a": b"2", "b": b"2", "c": b"2"})
            found = [folder.read(name) for name in "ab"]
            assert found in ([b"1", b"1"], [b"2", b"1"], [b"2", b"2"])
            assert not folder.holds("c") or folder.read("c") == b"2"
            folder.write({"a": b"3", "b": b"3", "c": b"3"})
            assert [folder.read(name) for name in "abc"] == [b"3"] * 3
            assert "#" not in (folder.folder / SUMS).read_text()


class _cutting:
    """`replacing`, after which the power is cut."""

    def __init__(self, inner, last):
        self.inner, self.last = inner, last

    def __enter__(self):
        return self.inner.__enter__()

    def __exit__(self, *why):
        self.inner.__exit__(*why)
        if self.last:
            raise PowerCut


def test_the_checksums_are_those_of_sha256sum(tmp_path):
    Sealed(tmp_path, "").write({"a.txt": b"one", "b.bin": bytes(range(256))})
    done = subprocess.run(["sha256sum", "-c", SUMS], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "a.txt: OK\nb.bin: OK\n"


def test_sealed_files_are_removed_with_their_checksums_only(tmp_path):
    folder = Sealed(tmp_path, "leave it")
    folder.write({"a": b"1", "b": b"2"})
    folder.remove("a")
    assert not folder.holds("a") and folder.read("b") == b"2"
    (tmp_path / "b").unlink()
    with pytest.raises(UserError, match="b: missing, it was removed; put it back, or leave it"):
        folder.holds("b")


def test_new_files_may_be_private_and_old_ones_keep_their_permissions(tmp_path):
    folder = Sealed(tmp_path, "", ["state"])
    folder.write({"state": b"1", "results": b"1"})
    usual = 0o666 & ~_umask()
    assert [mode(tmp_path / name) for name in ("state", "results", SUMS)] == [0o600, usual, usual]
    (tmp_path / "state").chmod(0o640)
    folder.write({"state": b"2"})
    assert mode(tmp_path / "state") == 0o640


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


KILLED = """
import os, signal, sys
from pathlib import Path
from dataset_utils.files import replacing
with replacing(Path(sys.argv[1])) as part:
    part.write_text("half")
    os.kill(os.getpid(), getattr(signal, sys.argv[2]))
"""


def test_what_a_killed_process_has_left_is_removed_by_the_next_write(tmp_path):
    run = [sys.executable, "-c", KILLED, str(tmp_path / "file")]
    assert subprocess.run([*run, "SIGKILL"], cwd=ROOT).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(UNFINISHED)
    waiting = subprocess.Popen([*run, "SIGSTOP"], cwd=ROOT)  # another one is at work
    try:
        while psutil.Process(waiting.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.05)
        with replacing(tmp_path / "other") as part:
            part.write_text("whole")
        assert not left.exists()
        assert len([path for path in tmp_path.iterdir() if path.name.startswith(UNFINISHED)]) == 1
    finally:
        waiting.send_signal(signal.SIGCONT)
    assert waiting.wait() == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "other"]


def test_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(files.os, "fsync", lambda file: done.append(str(Path(f"/proc/self/fd/{file}").readlink())))
    with replacing(tmp_path / "file") as part:
        part.write_text("x")
        inside = str(part)
    assert done == [inside, str(tmp_path)]


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
            print(os.getpid(), flush=True)
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


# ---- barred folders and full disks


def refused(capsys, *argv: object) -> str:
    capsys.readouterr()
    assert main([str(word) for word in argv]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and len(lines[0]) < 800
    return lines[0]


class _Header(ctypes.Structure):
    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


@pytest.fixture
def barred() -> Iterator[None]:
    """Let permissions hold for root, too, who has two capabilities (<linux/capability.h>) to read and write all."""
    header, caps = _Header(0x20080522, 0), (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice
    libc = ctypes.CDLL(None)
    assert libc.capget(ctypes.byref(header), caps) == 0
    before = caps[0]
    caps[0] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(ctypes.byref(header), caps) == 0
    try:
        yield
    finally:
        caps[0] = before
        assert libc.capset(ctypes.byref(header), caps) == 0


@pytest.fixture
def run(shard_folder, tmp_path, monkeypatch) -> Path:
    """Return the experiment folder of a comparison that was stopped in its second run."""
    out = tmp_path / "runs"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 12)
        assert main(command(shard_folder, str(out))) == 130
    (folder,) = out.iterdir()
    return folder


FILES = ["results.h5", "state.safetensors", "config.yaml", "environment.json", SUMS]


def test_files_that_may_not_be_read_are_not_called_damaged(run, barred, capsys):
    for name in FILES:
        path = run / "FedAvg-seed0" / name
        before = mode(path)
        path.chmod(0)
        line = refused(capsys, "resume", run)
        path.chmod(before)
        assert line == f"error: {path}: cannot be read (Permission denied)"


def test_a_folder_that_may_not_be_entered_or_written(run, barred, capsys):
    folder = run / "FedAvg-seed0"
    folder.chmod(0)
    for argv in (["resume", run], ["resume", folder], ["report", folder], ["predict", folder, "x.csv"]):
        line = refused(capsys, *argv)
        assert "cannot be read (Permission denied)" in line and str(folder) in line and "damaged" not in line
    folder.chmod(0o500)
    assert "cannot be written (Permission denied)" in refused(capsys, "resume", run)
    folder.chmod(0o700)
    run.chmod(0o500)
    assert "cannot be written (Permission denied)" in refused(capsys, "resume", run)
    run.chmod(0o700)


def test_an_unreadable_folder_is_skipped_and_said_in_a_report(run, barred, capsys):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    folder = run / "FedAvg-seed0"
    folder.chmod(0)
    assert main(["report", str(run)]) == 0  # of Local, which is finished
    assert f"skipped: {run.name}/FedAvg-seed0: {folder}" in capsys.readouterr().err
    folder.chmod(0o700)


def test_folders_with_models_are_private(run):
    assert [mode(path) for path in (run / "FedAvg-seed0", run / "FedAvg-seed0" / "state.safetensors")] == [0o700, 0o600]


LONG, NAME = "a/" * 2500, "b" * 300


@pytest.mark.parametrize("out", [LONG, NAME, "file", "file/deep", "/dev/null/deep", "/proc/nothing"])
def test_places_that_cannot_be_written(shard_folder, capsys, out):
    Path("file").write_text("mine")
    assert "cannot be" in refused(capsys, *command(shard_folder, out))
    assert Path("file").read_text() == "mine"
    assert [path.name for path in Path().iterdir()] == ["file"]


@pytest.mark.parametrize("path", [LONG, NAME, "file", "file/deep", "nul\0", ""])
@pytest.mark.parametrize("word", ["report", "resume", "predict", "export", "experiment", "run"])
def test_places_that_cannot_be_read(capsys, word, path):
    Path("file").write_text("a: [\n")
    more = {"predict": ["x.csv"], "export": ["--format", "onnx"]}.get(word, [])
    argv = ["run", "--config", path] if word == "run" else [word, path, *more]
    refused(capsys, *argv)


def test_a_file_is_said_to_be_one(capsys):
    Path("plain.txt").write_text("text")
    assert refused(capsys, "report", "plain.txt") == "error: plain.txt: is a file; give a folder of runs"
    assert refused(capsys, "predict", "plain.txt", "x.csv") == "error: plain.txt: is a file; give a run folder"


FULL = """
import resource, signal, sys
from fedkdx_plugin.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(sys.argv[2:]))
"""


def full(size: int, *argv: object) -> subprocess.CompletedProcess:
    run = [sys.executable, "-c", FULL, str(size), *map(str, argv)]
    return subprocess.run(run, cwd=ROOT, capture_output=True, text=True)


def test_a_full_disk_loses_no_checkpoint(run, shard_folder):
    """The state, the largest file, does not fit any more; then there is room again."""
    assert main(command(shard_folder, "whole")) == 0
    before = {name: (run / "FedAvg-seed0" / name).read_bytes() for name in ("results.h5", "state.safetensors")}
    done = full(len(before["state.safetensors"]) // 2, "resume", run)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.endswith("state.safetensors: cannot be written (File too large)")
    assert not list(run.rglob(f"{UNFINISHED}*"))
    assert main(["resume", str(run)]) == 0
    shutil.copytree(run, "parts/again")
    assert outcome("parts") == outcome("whole")


@pytest.mark.parametrize("words", [["list"], ["--help"], ["--version"], ["data", "describe", "--help"]])
def test_a_full_standard_output_is_an_error(words):
    with Path("/dev/full").open("w") as out:
        run = [sys.executable, "-m", "fedkdx_plugin.cli.main", *words]
        done = subprocess.run(run, cwd=ROOT, stdout=out, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "error: standard output: No space left on device\n")


def test_a_pipe_that_nobody_reads_ends_quietly():
    run = [sys.executable, "-m", "fedkdx_plugin.cli.main", "list"]
    process = subprocess.Popen(run, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert (process.wait(), process.stderr.read()) == (141, "")


def test_a_student_that_nobody_uses_is_said(shard_folder, capsys):
    assert main([*command(shard_folder, "runs"), "-gr", "1", "-sm", "cnn"]) == 0
    assert "-sm cnn: ignored by Local, FedAvg, which have no student model\n" in capsys.readouterr().err
