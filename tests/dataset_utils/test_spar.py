"""dataset_utils.sources.spar, on the file that seglearn carries."""

import subprocess
import sys

import numpy as np
import pytest

from dataset_utils.sources.spar import CHANNELS, LABELS, SPAR
from fedkdx_plugin.testing import check_source
from registry.errors import UserError


@pytest.fixture(scope="module")
def recordings():
    pytest.importorskip("seglearn")
    source = SPAR()
    return list(source.load(source.find(None, None, False)))


def test_whole_data_set(recordings):
    assert len(recordings) == 140
    assert sum(len(r.labels) for r in recordings) == 244_102
    assert {r.subject for r in recordings} == {str(n) for n in range(1, 11)}
    assert all(r.signals.shape == (len(r.labels), 6) and r.time is None for r in recordings)
    pairs = [(r.subject, int(r.labels[0])) for r in recordings]
    assert all(pairs.count(pair) == 2 for pair in pairs) and len(set(pairs)) == 70  # both sides
    assert [int(subject) for subject, _ in pairs] == sorted(int(subject) for subject, _ in pairs)


def test_same_as_numpys_own_reader(recordings):
    source = SPAR()
    data = np.load(source.find(None, None, False), allow_pickle=True).item()
    order = np.argsort(data["subject"], kind="stable")
    for recording, index in zip(recordings, order, strict=True):
        np.testing.assert_array_equal(recording.signals, data["X"][index])
        assert set(recording.labels) == {data["y"][index]}
    assert len(source.classes) == len(data["y_labels"])
    assert source.classes[data["y_labels"].index("ER")] == "external rotation"


def test_what_every_source_must_do():
    pytest.importorskip("seglearn")
    check_source(SPAR, skip={"check_shards": "takes seconds, and every run on SPAR makes them"})


def test_gravity_is_in_the_acceleration(recordings):
    strength = np.concatenate([np.linalg.norm(r.signals[:, :3], axis=1) for r in recordings])
    assert 0.9 < np.median(strength) < 1.2  # g, of an arm that moves


def test_seglearn_is_not_imported():
    pytest.importorskip("seglearn")
    code = (
        "import sys; from dataset_utils.sources.spar import SPAR; s = SPAR(); "
        "next(iter(s.load(s.find(None, None, False)))); assert 'seglearn' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_not_installed(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install seglearn"):
        SPAR().find(None, None, False)


def save(path, **changes):
    data = {
        "X": [np.zeros((5, 6)), np.ones((4, 6))],
        "y": np.array([0, 6]),
        "subject": np.array([2, 1]),
        "side": np.zeros(2),
        "y_labels": LABELS,
        "X_labels": CHANNELS,
    }
    np.save(path, np.array(data | changes, dtype=object), allow_pickle=True)
    return path


def test_raw_file_or_its_folder(tmp_path):
    path = save(tmp_path / "watch_dataset.npy")
    for raw in (path, tmp_path):
        found = SPAR().find(raw, tmp_path, False)
        assert [r.subject for r in SPAR().load(found)] == ["1", "2"]
        assert SPAR().files(found) == [path]
    with pytest.raises(UserError, match=r"there is no such file; .*pip install seglearn"):
        SPAR().find(tmp_path / "none.npy", tmp_path, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": np.array([0, 7])}, "do not fit"),
        ({"y": np.array([0])}, "do not fit"),
        ({"X": [np.zeros((5, 6)), np.zeros((5, 3))]}, r"not a float array of \(samples, 6\)"),
        ({"y_labels": LABELS[::-1]}, "labels or channels"),
    ],
)
def test_foreign_files(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        list(SPAR().load(save(tmp_path / "a.npy", **changes)))


def test_another_npy(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(UserError, match="is not seglearn's"):
        list(SPAR().load(tmp_path / "a.npy"))
