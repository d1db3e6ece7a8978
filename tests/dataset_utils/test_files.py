"""Files that are either whole or not there."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys

import pytest

from dataset_utils.files import private_files, replacing, sha256
from registry.errors import UserError


def test_a_file_and_a_folder_appear_whole(tmp_path):
    with replacing(tmp_path / "deep" / "file.txt") as part:
        part.write_text("new")
        assert not (tmp_path / "deep" / "file.txt").exists()
    assert (tmp_path / "deep" / "file.txt").read_text() == "new"
    with replacing(tmp_path / "folder") as part:
        (part / "sub").mkdir(parents=True)
    assert (tmp_path / "folder" / "sub").is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "folder"]


def test_an_old_file_is_replaced_only_in_the_end(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    with replacing(path) as part:
        part.write_text("new")
    assert path.read_text() == "new"


@pytest.mark.parametrize(
    ("number", "says"), [(errno.ENOSPC, "the disk is full"), (errno.EROFS, "cannot be written"), (errno.EIO, "cannot")]
)
def test_a_failing_disk_is_one_line_and_leaves_nothing(tmp_path, number, says):
    with pytest.raises(UserError, match=says) as error, replacing(tmp_path / "file.txt") as part:
        part.write_text("half")
        raise OSError(number, "as the system says")
    assert str(tmp_path / "file.txt") in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="taken"), replacing(tmp_path / "taken" / "file.txt"):
        pytest.fail("there is no place to write to")


def test_sha256_is_that_of_the_bytes(tmp_path):
    content = bytes(range(256)) * 9000
    (tmp_path / "file").write_bytes(content)
    assert sha256(tmp_path / "file") == hashlib.sha256(content).hexdigest()


def test_private_files_are_their_owners_alone_and_what_is_there_keeps_its_permissions(tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    old.chmod(0o755)
    with private_files():
        (old / "new").mkdir()
        with replacing(old / "new" / "file") as part:
            part.write_bytes(b"1")
        subprocess.run([sys.executable, "-c", "import sys; open(sys.argv[1], 'w')", old / "theirs"], check=True)
    after = tmp_path / "after"
    after.touch()
    modes = [path.stat().st_mode & 0o777 for path in (old, old / "new", old / "new" / "file", old / "theirs")]
    assert modes == [0o755, 0o700, 0o600, 0o600]
    assert after.stat().st_mode & 0o777 == 0o666 & ~current_umask()


def current_umask() -> int:
    os.umask(mask := os.umask(0))
    return mask
