"""What is written is read back; every kind of damage ends in one clear line."""

import io
import json
import time
import zipfile

import numpy as np
import pytest

from dataset_utils import shards
from dataset_utils.shards import ClientData, Shard, load, write
from registry.errors import UserError

ABOUT = {"name": "Made", "classes": ["a", "b", "ç"], "channels": ["x", "y"]}


def clients(count=3, seed=0):
    rng = np.random.default_rng(seed)

    def shard(n):
        return Shard(rng.normal(size=(n, 2, 1, 8)).astype(np.float32), rng.integers(0, 3, n))

    return [
        ClientData(shard(12 + k), shard(4), {"subjects": {f"s{k}": {"train": 12 + k, "test": 4}}}) for k in range(count)
    ]


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "made", ABOUT, clients())
    return tmp_path / "made"


def put(folder, change):
    """Change the manifest."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    change(manifest)
    path.write_text(json.dumps(manifest))


def pack(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def test_what_is_written_is_read_back(folder):
    made = load(folder)
    assert (made.name, made.folder, made.num_clients, made.num_classes) == ("Made", folder, 3, 3)
    assert made.class_names == ("a", "b", "ç") and made.shape == (2, 1, 8)
    for k, client in enumerate(clients()):
        for part in ("train", "test"):
            x, y = getattr(made, part)[k]
            np.testing.assert_array_equal(x, getattr(client, part).x)
            np.testing.assert_array_equal(y, getattr(client, part).y)
            assert x.dtype == np.float32 and y.dtype == np.int64
            np.testing.assert_array_equal(made.manifest["clients"][k][part]["histogram"], np.bincount(y, minlength=3))
    assert made.manifest["clients"][1]["subjects"] == {"s1": {"train": 13, "test": 4}}


def test_the_bytes_are_a_function_of_the_data(folder, tmp_path):
    time.sleep(2.1)  # zip files count time in steps of two seconds
    write(tmp_path / "again", ABOUT, clients())
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert len(files) == 7
    for file in files:
        assert (folder / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


def test_shards_are_not_compressed(folder):
    with zipfile.ZipFile(folder / "train" / "0.npz") as archive:
        assert {item.compress_type for item in archive.infolist()} == {zipfile.ZIP_STORED}


@pytest.mark.parametrize(
    "bad",
    [
        Shard(np.full((2, 2, 1, 8), np.nan, np.float32), np.zeros(2, int)),
        Shard(np.zeros((0, 2, 1, 8), np.float32), np.zeros(0, int)),
        Shard(np.zeros((2, 2, 1, 9), np.float32), np.zeros(2, int)),
        Shard(np.zeros((2, 2, 1, 8), np.float32), np.full(2, 3)),
    ],
)
def test_what_could_not_be_loaded_is_not_written(tmp_path, bad):
    good = clients(2)
    with pytest.raises(UserError, match=r"2\.npz"):
        write(tmp_path / "made", ABOUT, [*good, ClientData(good[0].train, bad, {})])
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def interrupted():
        yield from clients(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "made", ABOUT, interrupted())
    assert list(tmp_path.iterdir()) == []


GOOD = np.zeros((12, 2, 1, 8), np.float32)
LABELS = np.zeros(12, int)
OBJECTS = np.empty(12, dtype=object)
NAN = GOOD.copy()
NAN[3, 1, 0, 2:5] = np.nan
NAN[4, 0, 0, 0] = -np.inf


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "missing"),
        (b"", "not a readable shard"),
        (b"hello", "not a readable shard"),
        (pack(x=GOOD, y=LABELS)[:-100], "not a readable shard"),
        (pack(x=GOOD), "two arrays, x and y"),
        (pack(x=OBJECTS, y=LABELS), "pickled objects"),
        (pack(x=GOOD, y=OBJECTS), "pickled objects"),
        (pack(x=GOOD[:, :, 0], y=LABELS), r"shape \(12, 2, 8\), it should be .* \(n, 2, 1, 8\)"),
        (pack(x=GOOD.reshape(12, 1, 2, 8), y=LABELS), "shape"),
        (pack(x=GOOD.astype(np.float64), y=LABELS), "float64, it should be float32"),
        (pack(x=NAN, y=LABELS), "4 of 192 values are NaN or infinite"),
        (pack(x=GOOD, y=LABELS[:-1]), "12 windows, but y has 11 labels"),
        (pack(x=GOOD, y=LABELS + 0.5), "whole numbers"),
        (pack(x=GOOD, y=LABELS[:, None]), "whole numbers"),
        (pack(x=GOOD, y=LABELS + 3), "labels from 3 to 3, they should lie in 0 to 2"),
        (pack(x=GOOD, y=LABELS - 1), "labels from -1"),
        (pack(x=GOOD[:0], y=LABELS[:0]), "empty"),
        (pack(x=GOOD[:5], y=LABELS[:5]), "not the manifest's"),
        (pack(x=GOOD, y=LABELS), "not the manifest's"),
        (pack(x=GOOD + 1, y=clients()[0].train.y), "SHA-256 differs"),
    ],
)
def test_a_damaged_shard_is_named(folder, content, text):
    path = folder / "train" / "0.npz"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=text) as caught:
        load(folder)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_bare_array_is_no_shard(folder):
    np.save(folder / "test" / "2.npy", GOOD)
    (folder / "test" / "2.npy").rename(folder / "test" / "2.npz")
    with pytest.raises(UserError, match=r"2\.npz: not a readable shard"):
        load(folder)


def test_no_damaged_byte_goes_unnoticed_or_ends_in_a_traceback(folder):
    path = folder / "train" / "0.npz"
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.integers(0, len(whole), 300):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"0\.npz"):
            load(folder)
    for length in rng.integers(0, len(whole), 50):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"0\.npz"):
            load(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m.pop("format"), "not a manifest"),
        (lambda m: m.update(layout=99), "layout 99, but this version reads layout 2"),
        (lambda m: m.pop("classes"), "'classes'"),
        (lambda m: m.update(classes=[1, 2, 3]), "'classes'"),
        (lambda m: m.update(name=None), "'name'"),
        (lambda m: m.update(channels=["x"]), "'channels'"),
        (lambda m: m.update(shape=[2, 8]), "'shape'"),
        (lambda m: m.update(shape=[2, 1, 9]), "it should be"),
        (lambda m: m.update(clients=[]), "'clients'"),
        (lambda m: m["clients"].append(None), "'clients/3/train/samples'"),
        (lambda m: m["clients"].append(m["clients"][0]), r"3\.npz: missing"),
        (lambda m: m["clients"][1]["test"].update(samples=5), "'clients/1/test/histogram'"),
        (lambda m: m["clients"][1]["test"].update(histogram=[1, 2]), "'clients/1/test/histogram'"),
        (lambda m: m["clients"][1]["test"].update(histogram=[4, 0, 0]), r"1\.npz: its windows"),
        (lambda m: m["clients"][1]["test"].update(sha256=None), "'clients/1/test/sha256'"),
        (lambda m: m["clients"][1]["test"].update(sha256="0" * 64), "SHA-256"),
    ],
)
def test_a_manifest_that_disagrees_is_refused(folder, change, text):
    put(folder, change)
    with pytest.raises(UserError, match=text):
        load(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b"[1]", b"null"])
def test_a_manifest_that_is_no_json_is_refused(folder, content):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        load(folder)


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load(tmp_path / "elsewhere")
    (folder / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json: missing"):
        load(folder)


def test_the_manifest_says_what_made_it(folder):
    made = shards.read_manifest(folder)["versions"]
    assert made["numpy"] == np.__version__ and set(made) == {"python", "numpy", "scipy", "fedkdx"}


@pytest.mark.parametrize(
    "name", ["..", ".", "", " ", "../up", "a/b", "a\\b", "a\x1b[2Jb", "a\nb", "a\x00b", "x" * 101, 5, None, ["a"], {}]
)
def test_a_name_that_places_something_elsewhere_is_refused(folder, tmp_path, name):
    put(folder, lambda m: m.update(name=name))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="'name' is missing or damaged"):
        load(folder)
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match=r"'name'.*correct the data set's description"):
        write(tmp_path / "made again", {**ABOUT, "name": name}, clients())
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda m: m["classes"].__setitem__(0, "a\x1b[2J"), "'classes'"),
        (lambda m: m["classes"].__setitem__(0, "a\nb"), "'classes'"),
        (lambda m: m["channels"].__setitem__(0, ""), "'channels'"),
        (lambda m: m.update(spec=[]), "'spec'"),
        (lambda m: m.update(spec={"evaluate_on": "../x"}), "'spec'"),
        (lambda m: m.update(spec={"evaluate_on": ["test"]}), "'spec'"),
        (lambda m: m.update(spec={"train_fraction": "0.1"}), "'spec'"),
        (lambda m: m["clients"][0].update(statistics={}), "'clients/0/statistics'"),
        (lambda m: m["clients"][0].update(statistics=[1]), "'clients/0/statistics'"),
        (lambda m: m["clients"][0].update(statistics=GIVEN), "'statistics'"),  # of one client, not of the others
        (lambda m: m["clients"][0].update(statistics=GIVEN | {"mean": [0.0]}), "'clients/0/statistics'"),
        (lambda m: m["clients"][0].update(statistics=GIVEN | {"mean": [0.0, "1"]}), "'clients/0/statistics'"),
        (lambda m: m["clients"][0].update(statistics=GIVEN | {"mean": [0.0, True]}), "'clients/0/statistics'"),
        (lambda m: m["clients"][0].update(statistics=GIVEN | {"mean": [0.0, float("nan")]}), "'clients/0/statistics'"),
        (lambda m: m["clients"][0].update(statistics=GIVEN | {"mean": [0.0, 1e39]}), "'clients/0/statistics'"),
        (lambda m: m["clients"][0].update(statistics=GIVEN | {"variance": [1.0, -1.0]}), "'clients/0/statistics'"),
        (lambda m: m["clients"][0].update(statistics=GIVEN | {"variance": [1.0, float("inf")]}), "'clients/0/stat"),
        (lambda m: m["clients"][0].update(statistics=GIVEN | {"count": [96, 95]}), "'clients/0/statistics'"),
    ],
)
def test_what_others_rely_on_is_checked(folder, change, text):
    put(folder, change)
    with pytest.raises(UserError, match=text):
        load(folder)


GIVEN = {"count": [96, 96], "mean": [0.0, 1.0], "variance": [1.0, 2.0]}  # 12 windows of 8 samples


def test_statistics_are_read_back(tmp_path):
    own = [
        client._replace(about={"statistics": GIVEN | {"count": 2 * [8 * len(client.train.y)]}}) for client in clients()
    ]
    write(tmp_path / "made", ABOUT, own)
    found = load(tmp_path / "made").statistics
    assert [one.count.tolist() for one in found] == [[96, 96], [104, 104], [112, 112]]
    assert found[1].mean.tolist() == [0.0, 1.0] and found[1].variance.tolist() == [1.0, 2.0]
