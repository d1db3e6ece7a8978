"""A recording is cut into the very windows that the shards of the same data hold."""

from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pytest
import yaml

from dataset_utils import generate, shards
from dataset_utils.files import yaml_text
from dataset_utils.spec import ShardSpec
from fedkdx_plugin.prediction import load_model
from fedkdx_plugin.prediction.recordings import Cutter
from registry.errors import UserError
from tests.fedkdx_plugin.watch_runs import CLASSES, recording, shards_of

N = 300


@pytest.mark.parametrize("client", range(3))
def test_the_original_file_gives_the_windows_and_predictions_of_the_shards(watch, client):
    predictor = load_model(watch.run("federated", "FedKDX"), client)
    data = shards_of(predictor.run)
    cut, found = predictor.windows(watch.csv(client)), predictor.predict(watch.csv(client))
    place = {x.tobytes(): n for n, x in enumerate(cut.x)}
    assert len(place) == len(cut.x) > len(data.train[client].y) + len(data.test[client].y)  # those without a label, too
    for shard in (data.train[client], data.test[client]):
        rows = [place[x.tobytes()] for x in shard.x]
        same = predictor.predict_windows(shard.x)
        np.testing.assert_allclose(found.probabilities[rows], same.probabilities, atol=1e-6)
        assert [found.labels[row] for row in rows] == same.labels
    assert any("too long to interpolate" in note for note in found.notes)
    begins = cut.time[:, 0]
    assert not ((begins > 14.0) & (begins < 17.49)).any()  # no samples from 15.0 to 17.5 s


@pytest.mark.parametrize(("comparison", "algorithm"), [("client", "FedKDX"), ("minmax", "FedAvg")])
def test_the_clients_own_scaling_is_applied(watch, comparison, algorithm):
    predictor = load_model(watch.run(comparison, algorithm), 2)
    shard = shards_of(predictor.run).test[2]
    scaled = {x.tobytes() for x in predictor.scaled(predictor.windows(watch.csv(2)).x)}
    assert {x.tobytes() for x in shard.x} <= scaled
    other = load_model(watch.run(comparison, algorithm), 1)
    assert not {x.tobytes() for x in other.scaled(other.windows(watch.csv(2)).x)} & scaled


def test_a_file_needs_neither_labels_nor_a_name_of_the_data_set(watch, tmp_path):
    predictor = load_model(watch.run("federated", "FedAvg"))
    odd = tmp_path / "monday [1].csv"
    pd.read_csv(watch.csv(1)).drop(columns="activity").to_csv(odd, index=False, sep=";")
    one, other = predictor.windows(watch.csv(1)), predictor.windows(odd)
    np.testing.assert_array_equal(one.x, other.x)
    assert set(other.recordings) == {"monday [1].csv"}


def test_an_array_is_resampled_and_filtered_as_a_file_is(watch, tmp_path):
    predictor = load_model(watch.run("federated", "FedAvg"))
    table = recording(0).loc[2000:3999].drop(columns=["activity"])
    table["t"] -= 20
    table.to_csv(tmp_path / "part.csv", index=False)
    array = table[["ax", "ay", "az", "hr"]].to_numpy().T
    by_file, by_array = predictor.predict(tmp_path / "part.csv"), predictor.predict(array, rate=100)
    np.testing.assert_allclose(by_array.probabilities, by_file.probabilities, atol=1e-6)
    np.testing.assert_array_equal(by_array.time, by_file.time)
    assert by_array.time[:3].tolist() == [[0.0, 1.0], [0.5, 1.5], [1.0, 2.0]]
    assert len(by_array.labels) == 39  # 20 s, a window of 1 s every 0.5 s


def cutter_of(root, table=None, drop=(), **changes) -> Cutter:
    """Make what cuts for a run on a described folder with the files a.csv and b.csv, of ax and ay at 50 Hz."""
    values = {
        **{"name": "plain", "folder": "rec", "rate": 50, "window": 1.0, "columns": ["ax", "ay"], "label": "y"},
        **changes,
    }
    values = {key: value for key, value in values.items() if key not in drop}
    (root / "rec").mkdir()
    for k, name in enumerate("ab"):
        (plain(k) if table is None else table(k)).to_csv(root / "rec" / f"{name}.csv", index=False)
    (root / "plain.yaml").write_text(yaml.safe_dump(values))
    return run_on(root, shards_from(root / "plain.yaml"))


def shards_from(description):
    """Return the folder of the shards of a described data set."""
    spec = ShardSpec(str(description), min_samples=1)
    return generate.prepare(spec, description.parent / "data", None, False, lambda _: None)


def run_on(root, folder) -> Cutter:
    """As a run's folder has it."""
    run = root / "run"
    run.mkdir()
    shutil.copy(folder / "manifest.json", run)
    manifest = shards.read_manifest(folder)
    (run / "description.yaml").write_text(yaml_text(manifest["description"]))
    return Cutter(run, manifest)


def plain(k: int) -> pd.DataFrame:
    """Row n holds n and 1000 k - n; a hundred rows each of the first, the second and the third class."""
    rows = np.arange(N)
    return pd.DataFrame({"ax": rows, "ay": 1000 * k - rows, "y": np.array(CLASSES)[rows // 100]})


def test_windows_by_hand(tmp_path):
    cutter = cutter_of(tmp_path, overlap=0.2)
    signals = np.arange(2 * 130.0).reshape(2, 130)
    cut = cutter.array(signals, 50)
    assert cut.x.dtype == np.float32
    np.testing.assert_array_equal(cut.x[:, :, 0], [signals[:, a : a + 50] for a in (0, 40, 80)])
    np.testing.assert_allclose(cut.time, [[0.0, 1.0], [0.8, 1.8], [1.6, 2.6]])
    signals[1, 60:62], signals[0, 70:] = np.nan, np.nan  # short: interpolated; to the end: cut off
    np.testing.assert_array_equal(cutter.array(signals, 50).x[:, :, 0], [np.arange(260.0).reshape(2, 130)[:, :50]])
    signals[1, 5:45] = np.nan  # 0.8 s, longer than max_gap
    with pytest.raises(UserError, match=r"holds no window of 50 samples \(1 s\) without a gap"):
        cutter.array(signals, 50)


def test_columns_of_subject_and_session_tell_recordings_apart(tmp_path):
    def table(k):
        return plain(k).assign(who=np.repeat(["eva", "finn"], N // 2), day=np.repeat([1, 2, 3, 4], N // 4))

    cutter = cutter_of(tmp_path, table, subject={"column": "who"}, session={"column": "day"}, overlap=0.0)
    cut = cutter.file(tmp_path / "rec" / "b.csv")
    assert cut.recordings == tuple(f"b.csv ({part})" for part in ("eva, 1", "eva, 2", "finn, 3", "finn, 4"))
    np.testing.assert_array_equal(cut.x[:, 0, 0, 0], [0, 75, 150, 225])
    plain(1).drop(columns="y").to_csv(tmp_path / "one.csv", index=False)
    cut = cutter.file(tmp_path / "one.csv")
    assert cut.recordings == ("one.csv",) * 6


def test_files_of_several_sensors_are_merged(tmp_path):
    rec = tmp_path / "rec"
    for who in ("S1", "S2"):
        (rec / who).mkdir(parents=True)
        time = np.arange(N) / 50
        pd.DataFrame({"t": time, "ax": np.arange(N), "y": np.array(CLASSES)[np.arange(N) // 100]}).to_csv(
            rec / who / "acc.csv", index=False
        )
        pd.DataFrame({"t": time[::2] + 1, "hr": 60 + time[::2]}).to_csv(rec / who / "hr.csv", index=False)
    streams = [
        {"files": "*/acc.csv", "columns": ["ax"], "rate": 50, "time": "t", "label": "y"},
        {"files": "*/hr.csv", "columns": ["hr"], "rate": 25, "time": "t"},
    ]
    values = {"name": "two", "folder": "rec", "rate": 50, "window": 1.0, "subject": "folder", "streams": streams}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(values))
    folder = shards_from(tmp_path / "two.yaml")
    cutter = run_on(tmp_path, folder)
    shutil.copytree(rec / "S1", tmp_path / "new" / "somebody")
    acc = tmp_path / "new" / "somebody" / "acc.csv"
    pd.read_csv(acc).drop(columns="y").to_csv(acc, index=False)
    cut = cutter.file(tmp_path / "new")
    made = shards.load(folder)
    assert set(cut.recordings) == {"somebody"}
    assert {x.tobytes() for part in (made.train[0], made.test[0]) for x in part.x} == {x.tobytes() for x in cut.x}
    np.testing.assert_allclose(cut.time[:2], [[1.0, 2.0], [1.5, 2.5]])
    with pytest.raises(UserError, match="no such folder with a file of each of the description's streams"):
        cutter.file(acc)


@pytest.mark.parametrize("timed", [False, True])
def test_a_table_for_a_data_set_without_a_description_of_files(tmp_path, timed):
    manifest = {
        **{"name": "theirs", "classes": ["a", "b"], "channels": ["acc", "ecg"], "description": {"classes": ["a", "b"]}},
        "recorded": {"channels": ["acc", "ecg"], "acceleration": []},
        "preprocessing": {"rate": 50.0, "window": 50, "overlap": 0.0, "median": 0, "lowpass": 0, "gravity": 0},
        "counts": {"recordings": [{"name": "one"}]},
    }
    rows = np.arange(150)
    table = pd.DataFrame({"ecg": -rows, "note": "x", "acc": rows})
    if timed:
        table.insert(0, "time", 7 + rows / 50 + (rows >= 70))  # a second is missing after row 69
    table.to_csv(tmp_path / "one.csv", index=False)
    cut = Cutter(tmp_path, manifest).file(tmp_path / "one.csv")
    firsts = [0, 70] if timed else [0, 50, 100]
    np.testing.assert_array_equal(cut.x[:, 0, 0, 0], firsts)
    np.testing.assert_array_equal(cut.x[:, 1, 0, 0], [-first for first in firsts])
    np.testing.assert_allclose(cut.time[:, 0], [7.0, 9.4] if timed else [0.0, 1.0, 2.0])


def wrong(ask, *arguments) -> str:
    with pytest.raises(UserError) as error:
        ask(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_recordings_that_cannot_be_cut(tmp_path):
    cutter = cutter_of(tmp_path)
    assert "without a gap" in wrong(cutter.array, np.zeros((2, 49)), 50)
    assert "has 25 Hz, and the run's data 50 Hz without resampling" in wrong(cutter.array, np.zeros((2, 100)), 25)
    assert "shape (2, time), a row for each of ax, ay; not float64 of shape (100, 2)" in wrong(
        cutter.array, np.zeros((100, 2)), 50
    )
    assert "above 0, not -1" in wrong(cutter.array, np.zeros((2, 100)), -1)
    assert "infinite values in channel ay" in wrong(cutter.array, np.array([[0.0] * 60, [np.inf] * 60]), 50)
    assert "there is no such file" in wrong(cutter.file, tmp_path / "missing.csv")
    assert "there is no such file" in wrong(cutter.file, tmp_path / "rec")
    (tmp_path / "odd.csv").write_text("ax,az\n1,2\n")
    assert "'ay'" in wrong(cutter.file, tmp_path / "odd.csv")
    (tmp_path / "text.csv").write_text("ax,ay\n1,2\n3,four\n")
    assert "line 3, column 'ay': 'four' is no number" in wrong(cutter.file, tmp_path / "text.csv")


def test_files_have_their_own_rate_and_arrays_none(watch):
    predictor = load_model(watch.run("federated", "FedAvg"))
    assert "leave the rate out" in wrong(predictor.predict, watch.csv(0), 50)
    assert "the rate of an array is missing" in wrong(predictor.predict, np.zeros((4, 200)))


def test_data_whose_windows_are_not_cut_here(tmp_path, shard_folder):
    manifest = shards.read_manifest(shard_folder)
    assert "does not say how its windows were cut; use predict_windows" in wrong(Cutter, tmp_path, manifest)
    made = {
        **{"recorded": {"channels": ["x"], "acceleration": []}, "name": "made", "counts": {"recordings": []}},
        "preprocessing": {"rate": 50.0, "window": 50, "overlap": 0.5},
    }
    assert "came cut into windows" in wrong(Cutter, tmp_path, manifest | made)
    made |= {"counts": {"recordings": [{}]}, "preprocessing": made["preprocessing"] | {"before": 0.2}}
    assert "around labelled events" in wrong(Cutter, tmp_path, manifest | made)


def test_a_description_that_was_changed(tmp_path):
    cutter = cutter_of(tmp_path)
    folder, manifest = cutter.path.parent, shards.read_manifest(cutter.path.parent)
    changed = manifest["description"] | {"columns": ["ay", "ax"]}
    (folder / "description.yaml").write_text(yaml_text(changed))
    assert "is not the description" in wrong(Cutter, folder, manifest)
