"""Files with checksums: whole after a power cut, refused where they were damaged, private where asked."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from dataset_utils import files, sealed
from dataset_utils.files import UNFINISHED, replacing
from dataset_utils.sealed import SUMS, Sealed
from registry.errors import UserError

ROOT = Path(__file__).parents[2]


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
