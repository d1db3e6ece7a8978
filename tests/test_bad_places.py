"""Barred folders, files in the way and full disks: one line that names the place and the system's reason."""

from __future__ import annotations

import ctypes
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dataset_utils.files import UNFINISHED
from dataset_utils.sealed import SUMS
from fedkdx_plugin.cli.main import main
from tests.test_resume import command, interrupt_after, outcome

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


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
        interrupt_after(patch, 16)
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


def test_a_new_run_that_ends_on_a_full_disk_says_how_to_go_on(run, shard_folder, tmp_path):
    """The first algorithm's state fits; that of the second, which keeps teachers, does not."""
    size = (run / "FedAvg-seed0" / "state.safetensors").stat().st_size + 1000
    words = f"-m cnn_small -gr 2 -jr 0.7 -ls 1 -dev cpu -algo FedAvg,FedKDX -o {tmp_path / 'new'}".split()
    done = full(size, "-data", shard_folder, *words)
    (folder,) = (tmp_path / "new").iterdir()
    assert done.returncode == 2 and f"to go on: fedkdx resume {folder}\n" in done.stderr
    assert main(["resume", str(folder)]) == 0


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
