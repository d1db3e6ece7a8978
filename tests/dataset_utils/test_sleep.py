"""dataset_utils.sources.sleep, on made files, and on the real ones where FEDKDX_TEST_DATA names their folder."""

import zipfile
from pathlib import Path

import numpy as np
import pytest

from dataset_utils.sources.sleep import SLEEP
from registry.errors import UserError


def table(rows_each=50, postures=(0, 5, 11), seed=0):
    """Postures recorded in another order than they stand in."""
    rng = np.random.default_rng(seed)
    rows = rows_each * len(postures)
    posture = np.repeat(np.array(postures, float), rows_each)
    start = rng.permutation(len(postures)) * 1e9
    time = np.repeat(start, rows_each) + np.tile(np.arange(rows_each) * 20_000.0, len(postures))
    return np.column_stack([time, rng.normal(size=(rows, 3)), posture])


def save(folder, **tables):
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in tables.items():
        np.save(folder / f"{name}.npy", values)
    return folder


def test_folder_and_zip_read_alike(tmp_path):
    folder = save(tmp_path / "data" / "raw" / "SLEEP", subject_01=table(), subject_02=table(seed=1))
    source = SLEEP()
    path = source.find(None, tmp_path / "data", False)
    assert path == folder
    assert [p.name for p in source.files(path)] == ["subject_01.npy", "subject_02.npy"]
    loaded = list(source.load(path))
    with zipfile.ZipFile(tmp_path / "SLEEP.zip", "w") as zipped:
        for file in folder.iterdir():
            zipped.write(file, f"SLEEP/{file.name}")
    path = source.find(tmp_path, tmp_path / "none", False)
    zipped = list(source.load(tmp_path / "SLEEP.zip"))
    for one, other in zip(loaded, zipped, strict=True):
        np.testing.assert_array_equal(one.signals, other.signals)

    assert [(r.subject, set(r.labels)) for r in loaded[:3]] == [("01", {0}), ("01", {5}), ("01", {11})]
    np.testing.assert_array_equal(loaded[1].signals, table()[50:100, 1:4])
    np.testing.assert_allclose(loaded[1].time, np.arange(50) * 0.02, atol=1e-9)  # seconds


def test_a_clock_that_runs_backwards_cuts(tmp_path):
    values = table(postures=(3,))
    values[20, 0] += 1e12
    folder = save(tmp_path / "SLEEP", subject_14=values)
    assert [len(r.labels) for r in SLEEP().load(folder)] == [21, 29]


def test_not_there(tmp_path):
    with pytest.raises(UserError, match=r"SLEEP is not in .*cannot be downloaded.*SLEEP\.zip"):
        SLEEP().find(None, tmp_path, True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((10, 4)), r"shape \(10, 4\)"),
        (np.zeros((0, 5)), r"shape \(0, 5\)"),
        (np.zeros((10, 5), int), "type int"),
        (np.full((10, 5), np.nan), "a time is missing"),
        (np.full((10, 5), 12.0), "not one of 0 to 11"),
        (np.full((10, 5), 1.5), "not one of 0 to 11"),
        (np.array([{}], dtype=object), "holds pickled objects"),
    ],
)
def test_damaged_files(tmp_path, values, message):
    folder = save(tmp_path / "SLEEP", subject_03=values)
    with pytest.raises(UserError, match=rf"subject_03\.npy.*{message}"):
        list(SLEEP().load(folder))


def test_truncated_file(tmp_path):
    folder = save(tmp_path / "SLEEP", subject_03=table())
    path = folder / "subject_03.npy"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"subject_03\.npy: is damaged, its header announces"):
        list(SLEEP().load(folder))


def test_real_files(real_data):
    recordings = list(SLEEP().load(SLEEP().find(real_data("SLEEP.zip"), Path(), False)))
    assert len({r.subject for r in recordings}) == 15
    assert sum(len(r.labels) for r in recordings) == 15 * 36_000
    counts = np.bincount(np.concatenate([r.labels for r in recordings]))
    np.testing.assert_array_equal(counts, np.full(12, 45_000))
    assert all((np.diff(r.time) > 0).all() for r in recordings)
