"""Files are known by their contents, and read again only where something about them changed."""

import json
import os
import time

import pytest

from dataset_utils import origin
from dataset_utils.origin import hashed, plain
from registry.errors import UserError

ABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # of "abc", FIPS 180-2, appendix B.1


@pytest.fixture
def file(tmp_path):
    (tmp_path / "a.csv").write_text("abc")
    time.sleep(2 * origin.TICK / 1e9)  # what has just been written is not trusted
    return tmp_path / "a.csv"


@pytest.fixture
def reads(monkeypatch):
    """Files that were read to be hashed."""
    seen, original = [], origin.sha256
    monkeypatch.setattr(origin, "sha256", lambda path: seen.append(path.name) or original(path))
    return seen


def test_a_file_is_read_once(file, tmp_path, reads):
    for _ in range(3):
        assert hashed([file], tmp_path / "cache.json") == {file: ABC}
    assert reads == ["a.csv"]


def test_a_file_of_the_same_size_and_time_is_read_again(file, tmp_path, reads):
    hashed([file], tmp_path / "cache.json")
    before = file.stat()
    file.write_text("xyz")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert hashed([file], tmp_path / "cache.json") != {file: ABC} and len(reads) == 2


def test_another_file_in_its_place_is_read(file, tmp_path, reads):
    hashed([file], tmp_path / "cache.json")
    before = file.stat()
    (tmp_path / "b.csv").write_text("xyz")
    os.utime(tmp_path / "b.csv", ns=(before.st_atime_ns, before.st_mtime_ns))
    (tmp_path / "b.csv").replace(file)
    assert hashed([file], tmp_path / "cache.json") != {file: ABC} and len(reads) == 2


def test_what_was_just_written_is_not_trusted_next_time(tmp_path, reads, monkeypatch):
    monkeypatch.setattr(origin, "TICK", 10**12)
    (tmp_path / "a.csv").write_text("abc")
    for _ in range(2):
        hashed([tmp_path / "a.csv"], tmp_path / "cache.json")
    assert len(reads) == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"[" * 100_000, b'{"x": 1}', None])
def test_a_damaged_cache_costs_time_alone(file, tmp_path, reads, content):
    cache = tmp_path / "cache.json"
    hashed([file], cache)
    if content is None:
        entry = json.loads(cache.read_text())[str(file.resolve())]
        content = json.dumps({str(file.resolve()): entry | {"sha256": 5}}).encode()
    cache.write_bytes(content)
    assert hashed([file], cache) == {file: ABC} and len(reads) == 2


def test_a_cache_that_cannot_be_written_costs_time_alone(file, tmp_path):
    (tmp_path / "no folder").write_text("")
    assert hashed([file], tmp_path / "no folder" / "cache.json") == {file: ABC}


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"none\.csv: cannot be read"):
        hashed([tmp_path / "none.csv"], tmp_path / "cache.json")


def test_a_file_that_grows_while_it_is_read_is_refused(file, tmp_path, monkeypatch):
    original = origin.sha256

    def meanwhile(path):
        found = original(path)
        path.write_text("longer than before")
        return found

    monkeypatch.setattr(origin, "sha256", meanwhile)
    with pytest.raises(UserError, match="changes while it is being read"):
        hashed([file], tmp_path / "cache.json")


def test_whatever_a_yaml_holds_becomes_json():
    values = {1: ("a", None), "b": {2.5: float("nan"), True: b"x"}}
    assert plain(values) == {"1": ["a", None], "b": {"2.5": "nan", "True": "b'x'"}}
    assert list(plain({"z": 1, "a": 2})) == ["z", "a"]
