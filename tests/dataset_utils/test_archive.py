"""dataset_utils.sources.archive: folders and zips alike; damaged and dangerous zips refused."""

import io
import stat
import struct
import zipfile

import pytest

from dataset_utils.sources.archive import open_archive
from registry.errors import UserError

KEY = "train/a*.txt"
FILES = {
    "train/a1.txt": b"one",
    "train/a2.txt": b"two",
    "test/b.txt": b"three" * 100,
    "train/deep/a3.txt": b"no",
}


def zip_bytes(files, prefix="", **kwargs) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, **kwargs) as zipped:
        for name, contents in files.items():
            zipped.writestr(prefix + name, contents)
    return buffer.getvalue()


def layouts(tmp_path):
    for above in ("", "Data/", "x/Data/"):
        folder = tmp_path / f"folder{len(above)}"
        for name, contents in FILES.items():
            path = folder / above / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents)
        yield folder
        flat = tmp_path / f"flat{len(above)}.zip"
        flat.write_bytes(zip_bytes(FILES | {"__MACOSX/train/a9.txt": b"no"}, ""))
        yield flat
        deep = tmp_path / f"deep{len(above)}.zip"
        deep.write_bytes(zip_bytes(FILES, above))
        yield deep
        nested = tmp_path / f"nested{len(above)}.zip"
        nested.write_bytes(zip_bytes({"readme.txt": b"", "inner data.zip": deep.read_bytes()}))
        yield nested


def test_all_layouts_read_alike(tmp_path):
    for path in layouts(tmp_path):
        with open_archive(path, KEY) as archive:
            assert archive.match(KEY) == ["train/a1.txt", "train/a2.txt"], path
            assert archive.match("test/*.txt") == ["test/b.txt"]
            assert archive.size("test/b.txt") == 500
            with archive.open("train/a2.txt") as file:
                assert file.read() == b"two"
            with pytest.raises(UserError, match=r"none\.txt"), archive.open("none.txt"):
                pass


def test_nothing_is_written_beside_the_zip(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(zip_bytes({"inner.zip": zip_bytes(FILES)}))
    with open_archive(path, KEY) as archive, archive.open("train/a1.txt") as file:
        file.read()
    assert list(tmp_path.iterdir()) == [path]


def read_damaged(archive, name):
    with pytest.raises(UserError, match=f"'{name}' in it is damaged"), archive.open(name) as file:
        file.read()


@pytest.mark.parametrize(
    "name",
    ["../out.txt", "/abs.txt", "C:/x.txt", "c:x.txt", "a/../../out.txt", "a\\..\\b.txt", "\\\\host\\x"],
)
def test_unsafe_paths_are_refused(tmp_path, name):
    path = tmp_path / "a.zip"
    path.write_bytes(zip_bytes(FILES | {name: b"x"}))
    with (
        pytest.raises(UserError, match=r"a\.zip: refused, it holds the unsafe path"),
        open_archive(path, KEY),
    ):
        pass


def test_symbolic_links_are_refused(tmp_path):
    path = tmp_path / "a.zip"
    link = zipfile.ZipInfo("train/a0.txt")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    path.write_bytes(zip_bytes(FILES))
    with zipfile.ZipFile(path, "a") as zipped:
        zipped.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match="symbolic link"), open_archive(path, KEY):
        pass


def patched_directory(contents: bytes, name: str, offset: int, value: bytes) -> bytes:
    """Make a zip whose central directory states something else about the member `name`."""
    at = contents.rindex(name.encode()) - 46 + offset
    return contents[:at] + value + contents[at + len(value) :]


def test_zip_bombs_are_refused_before_anything_is_read(tmp_path):
    path = tmp_path / "bomb.zip"
    declared = struct.pack("<I", 0xFFFFFFF0)
    bomb = patched_directory(zip_bytes(FILES), "test/b.txt", 24, declared)
    path.write_bytes(bomb)
    with pytest.raises(UserError, match="zip bomb"), open_archive(path, KEY):
        pass
    path.write_bytes(zip_bytes({"inner.zip": bomb}))
    with pytest.raises(UserError, match="zip bomb"), open_archive(path, KEY):
        pass


def test_a_size_that_lies_is_found_while_reading(tmp_path):
    path = tmp_path / "liar.zip"
    path.write_bytes(patched_directory(zip_bytes(FILES), "test/b.txt", 24, struct.pack("<I", 10)))
    with open_archive(path, KEY) as archive:
        read_damaged(archive, "test/b.txt")


def test_encrypted_and_oddly_packed_zips(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(patched_directory(zip_bytes(FILES), "test/b.txt", 8, b"\x01\x00"))
    with pytest.raises(UserError, match="encrypted"), open_archive(path, KEY):
        pass
    path.write_bytes(patched_directory(zip_bytes(FILES), "test/b.txt", 10, b"\x63\x00"))
    with pytest.raises(UserError, match="unusual"), open_archive(path, KEY):
        pass


def test_damage(tmp_path):
    path = tmp_path / "a.zip"
    good = zip_bytes({**FILES, "train/a4.txt": bytes(range(256)) * 50})
    for bad in (b"", b"<html>not a zip</html>", good[: len(good) // 2]):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"a\.zip: is no zip, or a damaged one"), open_archive(path, KEY):
            pass
    at = good.index(b"train/a4.txt") + 30
    path.write_bytes(good[:at] + bytes(byte ^ 255 for byte in good[at : at + 20]) + good[at + 20 :])
    with (
        open_archive(path, KEY) as archive,
        pytest.raises(UserError, match=r"'train/a4.txt' in it is damaged"),
        archive.open("train/a4.txt") as file,
    ):
        file.read()
    path.write_bytes(zip_bytes({"inner.zip": good[: len(good) // 2]}))
    with pytest.raises(UserError, match="damaged"), open_archive(path, KEY):
        pass


def test_another_data_set(tmp_path):
    path = tmp_path / "a.zip"
    path.write_bytes(zip_bytes({"other.txt": b""}))
    with pytest.raises(UserError, match=r"no 'train/a\*\.txt' in this zip"), open_archive(path, KEY):
        pass
    with pytest.raises(UserError, match=r"in this folder"), open_archive(tmp_path, KEY):
        pass
    with pytest.raises(UserError, match="cannot be read"), open_archive(tmp_path / "none.zip", KEY):
        pass
