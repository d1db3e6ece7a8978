"""What people have: files, formats, labels and sensors laid out in other ways. The same small recording throughout.

A subject's recording has 600 rows at 50 Hz, 200 each of a, b and c, whose channel ax holds the row's number.
"""

import gzip
import zipfile

import numpy as np
import pandas as pd
import pytest
import yaml

from dataset_utils import describe, limits
from dataset_utils.reading import read
from dataset_utils.recording import UNLABELLED
from dataset_utils.sources.own import load_source
from registry.errors import UserError

BASE = {
    "name": "mine",
    "folder": "rec",
    "rate": 50,
    "window": 1.0,
    "columns": ["ax", "ay"],
    "label": "activity",
    "time": "t",
}
N = 600
LABELS = np.repeat([0, 1, 2], 200)


def frame(**columns):
    table = {
        "t": np.arange(N) / 50,
        "ax": np.arange(N),
        "ay": -np.arange(N) / 2,
        "activity": np.array(list("abc"))[LABELS],
    }
    return pd.DataFrame(table | columns)


def source_of(root, drop=(), **changes):
    values = {key: value for key, value in (BASE | changes).items() if key not in drop}
    (root / "mine.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    return load_source(root / "mine.yaml")


def recordings(source):
    return list(source.load(source.find(None, source.root, False)))


def reading(source):
    lines = []
    made = read(source, source.find(None, source.root, False), source.preprocessing, lines.append)
    return made.windows, made.counts


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "rec").mkdir()
    return tmp_path / "rec"


def is_right(recording, subject="s1"):
    assert recording.subject == subject
    np.testing.assert_array_equal(recording.signals, np.stack([np.arange(N), -np.arange(N) / 2], axis=1))
    np.testing.assert_array_equal(recording.labels, LABELS)


def test_packed_text(tmp_path, folder):
    text = frame().to_csv(index=False)
    (folder / "s1.csv.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("s2.csv.zip", "s3.zip"):
        with zipfile.ZipFile(folder / name, "w", zipfile.ZIP_DEFLATED) as zipped:
            zipped.writestr("inside.CSV", text)
    for number, recording in enumerate(recordings(source_of(tmp_path)), start=1):
        is_right(recording, f"s{number}")
    (folder / "s1.csv.gz").write_bytes(gzip.compress(text.encode())[:-20])
    with pytest.raises(UserError, match=r"s1\.csv\.gz: is damaged"):
        recordings(source_of(tmp_path))
    with zipfile.ZipFile(folder / "s1.csv.gz", "w"):
        pass
    with pytest.raises(UserError, match=r"s1\.csv\.gz: is damaged"):
        recordings(source_of(tmp_path))
    (folder / "s1.csv.gz").unlink()
    with zipfile.ZipFile(folder / "s3.zip", "a") as zipped:
        zipped.writestr("more.csv", text)
    with pytest.raises(UserError, match=r"s3\.zip: holds 2 files; unpack it"):
        recordings(source_of(tmp_path))


def test_a_packed_bomb_is_refused(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(limits, "RATIO_FROM", 1 << 16)
    (folder / "s1.csv.gz").write_bytes(gzip.compress(b"t,ax,ay,activity\n" + b"0,1,2,a\n" * 1_000_000))
    with pytest.raises(UserError, match="refused, it unpacks to more than"):
        recordings(source_of(tmp_path))


def test_parquet(tmp_path, folder):
    pytest.importorskip("pyarrow")
    frame().to_parquet(folder / "s1.parquet")
    is_right(*recordings(source_of(tmp_path)))
    dated = frame(t=pd.Timestamp("2024-03-01T09:00", tz="UTC") + pd.to_timedelta(np.arange(N) / 50, unit="s"))
    dated.assign(activity=dated.activity.astype("category")).to_parquet(folder / "s1.parquet")
    (recording,) = recordings(source_of(tmp_path))
    is_right(recording)
    np.testing.assert_allclose(np.diff(recording.time), 0.02, atol=1e-6)
    (folder / "s1.parquet").write_bytes(b"PAR1 is how such files begin")
    with pytest.raises(UserError, match=r"s1\.parquet: is no Parquet file"):
        recordings(source_of(tmp_path))
    frame().drop(columns="ay").to_parquet(folder / "s1.parquet")
    with pytest.raises(UserError, match="has no column 'ay'"):
        recordings(source_of(tmp_path))


def test_arrays_by_name(tmp_path, folder):
    """Columns that are arrays of their own, or parts of one, in all kinds of files of arrays."""
    import h5py
    from scipy.io import savemat

    table = frame()
    acc, labels = table[["ax", "ay"]].to_numpy(), table.activity.to_numpy(str)
    np.savez(folder / "s1.npz", acc=acc, t=table.t, activity=labels)
    savemat(folder / "s2.mat", {"acc": acc, "t": table.t.to_numpy(), "activity": labels.astype(object)})
    with h5py.File(folder / "s3.h5", "w") as file:
        file["acc"], file["t"], file["activity"] = acc, table.t, labels.astype(bytes)
    source = source_of(tmp_path, columns=["acc[0]", "acc[1]"])
    for number, recording in enumerate(recordings(source), start=1):
        is_right(recording, f"s{number}")
    with pytest.raises(UserError, match=r"s1\.npz: acc has shape \(600, 2\), there is no acc\[2\]"):
        recordings(source_of(tmp_path, columns=["acc[0]", "acc[2]"]))
    with pytest.raises(UserError, match=r"s1\.npz: has no array 'gyro'; it has: acc, t, activity"):
        recordings(source_of(tmp_path, columns=["acc[0]", "gyro"]))


def test_structs_and_groups(tmp_path, folder):
    import h5py
    from scipy.io import savemat

    table = frame()
    inside = {"x": table.ax.to_numpy(float), "y": table.ay.to_numpy(float)}
    savemat(folder / "s1.mat", {"data": {"acc": inside, "activity": LABELS, "t": table.t.to_numpy()}})
    columns, rest = ["data.acc.x", "data.acc.y"], {"label": "data.activity", "time": "data.t"}
    is_right(*recordings(source_of(tmp_path, columns=columns, **rest)))
    (folder / "s1.mat").unlink()
    with h5py.File(folder / "s1.h5", "w") as file:
        file["data/acc/x"], file["data/acc/y"], file["data/activity"], file["data/t"] = (
            *inside.values(),
            LABELS,
            table.t,
        )
    columns = [name.replace(".", "/") for name in columns]
    is_right(*recordings(source_of(tmp_path, columns=columns, label="data/activity", time="data/t")))
    for name in ("s1.h5", "s1.mat"):
        (folder / name).write_bytes(b"damaged")
        with pytest.raises(UserError, match=rf"{name}: is no"):
            recordings(source_of(tmp_path, columns=columns, label="data/activity", time="data/t"))
        (folder / name).unlink()


def test_cells_of_matlab_7_3_are_refused(tmp_path, folder):
    """They are references to other places in the file, whose texts would all be the same."""
    import h5py

    table = frame()
    with h5py.File(folder / "s1.h5", "w") as file:
        file["ax"], file["ay"], file["t"], file["other"] = table.ax, table.ay, table.t, LABELS
        file["activity"] = np.array([file["other"].ref] * N, dtype=h5py.ref_dtype)
    with pytest.raises(UserError, match=r"s1\.h5: 'activity' in it refers to other places of the file"):
        recordings(source_of(tmp_path))


def test_npy_tables(tmp_path, folder):
    np.save(folder / "s1.npy", np.stack([np.arange(N) / 50, np.arange(N), -np.arange(N) / 2, LABELS], axis=1))
    is_right(*recordings(source_of(tmp_path, dialect={"header": ["t", "ax", "ay", "activity"]})))
    with pytest.raises(UserError, match=r"has shape \(600, 4\), but dialect: \{header: \.\.\.\} names 3 columns"):
        recordings(source_of(tmp_path, dialect={"header": ["ax", "ay", "activity"]}))
    np.save(folder / "s1.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"s1\.npy: holds pickled objects"):
        recordings(source_of(tmp_path))


def test_files_by_pattern_in_subfolders(tmp_path, folder):
    for who, when in (("anna", 1), ("anna", 2), ("ben", 1)):
        (folder / who).mkdir(exist_ok=True)
        frame().to_csv(folder / who / f"day{when}.csv", index=False)
    frame().to_csv(folder / "calibration.csv", index=False)
    source = source_of(tmp_path, files="*/day*.csv", subject="folder")
    assert [r.subject for r in recordings(source)] == ["anna", "anna", "ben"]
    assert source.ignored(folder) == {"calibration.csv": "does not fit 'files'"}
    windows, _ = reading(source)
    assert windows.subjects == ("anna", "ben") and len(set(windows.recording)) == 3
    with pytest.raises(UserError, match=r"rec: holds no '\*\*/week\*'"):
        recordings(source_of(tmp_path, files="**/week*"))
    with pytest.raises(UserError, match="must lie below 'folder'"):
        source_of(tmp_path, files="../*.csv")
    by_path = source_of(
        tmp_path, files="**/day*.csv", subject={"pattern": "^(.*)/day"}, session={"pattern": "day([0-9])"}
    )
    assert [(r.subject, r.name) for r in recordings(by_path)] == [
        ("anna", "anna/day1.csv"),
        ("anna", "anna/day2.csv"),
        ("ben", "ben/day1.csv"),
    ]


def test_one_recording_twice_is_said(tmp_path, folder):
    frame().to_csv(folder / "s1.csv", index=False)
    frame().to_csv(folder / "s1.csv.gz", index=False)
    with pytest.raises(UserError, match=r"s1\.csv and s1\.csv\.gz: one recording twice"):
        recordings(source_of(tmp_path))


def test_notes_are_no_recordings_but_a_folder_of_txt_is(tmp_path, folder):
    frame().to_csv(folder / "s1.csv", index=False)
    (folder / "README.txt").write_text("notes")
    is_right(*recordings(source_of(tmp_path)))
    (folder / "README.txt").unlink()
    (folder / "s1.csv").rename(folder / "s1.TXT")
    is_right(*recordings(source_of(tmp_path)))


def test_a_single_file_with_columns_of_subject_and_session(tmp_path, folder):
    """Ids are text: 01 and 1 are two subjects. Rows of a subject may stand anywhere."""
    parts = [frame(who=who, day=day) for who in ("01", "1") for day in ("mon", "tue")]
    mixed = pd.concat(parts).sort_values("t", kind="stable")
    mixed.to_csv(tmp_path / "all.csv", index=False)
    source = source_of(tmp_path, folder="all.csv", subject={"column": "who"}, session={"column": "day"})
    found = recordings(source)
    assert [r.name for r in found] == ["all.csv (01, mon)", "all.csv (01, tue)", "all.csv (1, mon)", "all.csv (1, tue)"]
    for recording in found:
        is_right(recording, recording.subject)
    assert reading(source)[0].subjects == ("01", "1") or reading(source)[0].subjects == ("1", "01")
    # without the sessions two rows of a subject share each time and are not told apart, which here they need not be
    windows, counts = reading(source_of(tmp_path, folder="all.csv", subject={"column": "who"}))
    assert counts.total("duplicates") == 2 * N and len(windows.y) == 2 * 23


def test_labels_from_names(tmp_path, folder):
    for label in ("walk", "sit"):
        (folder / label).mkdir()
        frame().to_csv(folder / label / f"s1_{label}.csv", index=False)
    about = {"files": "**/*.csv", "subject": {"pattern": "(s[0-9])"}, "drop": ["label"]}
    for rule in ({"from": "folder"}, {"pattern": "_(.*)"}, {"pattern": "^(.*)/s"}):
        source = source_of(tmp_path, label=rule, **(about | {"drop": ()}))
        assert source.classes == ("sit", "walk")
        assert [set(r.labels.tolist()) for r in recordings(source)] == [{0}, {1}]
    with pytest.raises(UserError, match=r"its name does not fit the label pattern in .*mine\.yaml: '\(x\)'"):
        recordings(source_of(tmp_path, label={"pattern": "(x)"}, **(about | {"drop": ()})))


TABLE = "start,end,label,who\n0,3.999,a,s1\n3.999,8,b,s1\n8,12,c,s1\n0,12,a,s2\n"


def test_labels_from_a_table_of_all_subjects(tmp_path, folder):
    for name in ("s1", "s2"):
        frame().to_csv(folder / f"{name}.csv", index=False)
    (folder / "labels.csv").write_text(TABLE)
    source = source_of(tmp_path, label={"table": "labels.csv", "subject": "who"})
    one, two = recordings(source)
    is_right(one)
    assert set(two.labels) == {0}
    assert source.ignored(folder) == {} and [f.name for f in source.files(folder)] == ["labels.csv", "s1.csv", "s2.csv"]


def test_dates_of_a_table_are_in_the_recordings_time_zone(tmp_path, folder):
    local = pd.Timestamp("2026-07-01 09:00")  # two hours after 7:00 UTC
    frame(t=local + pd.to_timedelta(np.arange(N) / 50, unit="s")).drop(columns="activity").to_csv(
        folder / "s1.csv", index=False
    )
    starts = local + pd.to_timedelta([0, 4, 8], unit="s")
    table = pd.DataFrame({"start": starts, "end": starts + pd.Timedelta(4, "s"), "label": list("abc")})
    table.to_csv(folder / "labels.csv", index=False)
    zoned = {"time": {"column": "t", "timezone": "Europe/Berlin"}, "label": {"table": "labels.csv"}}
    (one,) = recordings(source_of(tmp_path, **zoned))
    is_right(one)
    assert one.time[0] == pd.Timestamp("2026-07-01 07:00", tz="UTC").timestamp()
    table[["start", "end"]] = table[["start", "end"]] - pd.Timedelta(2, "h")
    table.to_csv(folder / "labels.csv", index=False)
    zoned["label"]["timezone"] = "UTC"
    is_right(*recordings(source_of(tmp_path, **zoned)))


def test_labels_from_a_table_each_with_rows_between(tmp_path, folder):
    frame(t=np.arange(N) * 20).to_csv(folder / "s1.csv", index=False)  # milliseconds, and so in the table
    (tmp_path / "rec" / "s1_labels.tsv").write_text("begin\tend\twhat\n1000\t2000\ta\n4000\t6000\tb\n")
    label = {"table": "{file}_labels.tsv", "start": "begin", "label": "what"}
    (one,) = recordings(source_of(tmp_path, label=label))
    expected = np.full(N, UNLABELLED)
    expected[50:100], expected[200:300] = 0, 1
    np.testing.assert_array_equal(one.labels, expected)
    assert one.left_out == {"no label": 450}


def test_intervals_of_one_label_may_lie_within_each_other(tmp_path, folder):
    """From 1 to 8 s it is 'a', also after the end of a shorter interval; a subject without any is not labelled."""
    for name in ("s1", "s2"):
        frame().to_csv(folder / f"{name}.csv", index=False)
    (folder / "labels.csv").write_text("start,end,label,who\n2,3,a,s1\n1,6,a,s1\n4,5,a,s1\n5.5,8,a,s1\n8,9,b,s1\n")
    one, two = recordings(source_of(tmp_path, label={"table": "labels.csv", "subject": "who"}, classes=["a", "b"]))
    expected = np.full(N, UNLABELLED)
    expected[50:400], expected[400:450] = 0, 1
    np.testing.assert_array_equal(one.labels, expected)
    assert set(two.labels) == {UNLABELLED} and two.left_out == {"no label": N}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("start,end,label\n0,4,a\n3,8,b\n", "'a' and 'b' overlap at 3 s"),
        ("start,end,label\n0,8,a\n1,2,a\n6,7,b\n", "'a' and 'b' overlap at 6 s"),
        ("start,end,label\n0,4,a\n8,5,b\n", "an interval ends at 5, before or at its start 8"),
        (
            "start,end,label\n1.7e9,1.8e9,a\n1.8e9,1.9e9,b\n",
            "none of its 2 marks lies within s1.csv, whose times go from 0",
        ),
        ("start,end,lable\n0,4,a\n", r"has no column 'label' \(did you mean lable\?\)"),
    ],
)
def test_tables_of_labels_that_are_wrong(tmp_path, folder, text, message):
    frame().to_csv(folder / "s1.csv", index=False)
    (folder / "labels.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        recordings(source_of(tmp_path, label={"table": "labels.csv"}, classes=["a", "b"]))


def test_windows_around_events(tmp_path, folder):
    frame().to_csv(folder / "s1.csv", index=False)
    (folder / "beats.csv").write_text("time,label\n0.1,N\n2.0,N\n2.52,V\n9.999,N\n11.9,V\n13,N\n5,~\n")
    label = {"events": "beats.csv", "before": 0.25}
    source = source_of(tmp_path, label=label, window=1.0, classes=["N", "V"], ignore=["~"])
    windows, counts = reading(source)
    # at 0.1 s it begins before the recording, at 11.9 s it ends after it, 13 s lies outside
    np.testing.assert_array_equal(windows.x[:, 0, 0, 0], [100 - 12, 126 - 12, 500 - 12])
    assert windows.y.tolist() == [0, 1, 0] and windows.x.shape[-1] == 50
    (tally,) = counts.recordings
    assert (tally.possible, tally.windows, tally.at_gaps) == (5, 3, 2)
    assert tally.left_out == {"label '~' is to be ignored": 1, "event outside of the recording": 1}
    with pytest.raises(UserError, match="'before' must be less than the window of 1 s"):
        source_of(tmp_path, label={"events": "beats.csv", "before": 1.5})


@pytest.mark.parametrize("kind", ["npz", "mat", "h5"])
@pytest.mark.parametrize("first", [True, False])
def test_windows_cut_already(tmp_path, folder, kind, first):
    import h5py
    from scipy.io import savemat

    x = np.arange(6 * 2 * 50, dtype=float).reshape(6, 2, 50)
    stored = x if first else x.transpose(0, 2, 1)
    arrays = {"x": stored, "activity": np.array([0, 1, 0, 1, 1, 0]), "who": np.array([7, 7, 8, 7, 8, 8])}
    if kind == "npz":
        np.savez(folder / "all.npz", **arrays)
    elif kind == "mat":
        savemat(folder / "all.mat", arrays)
    else:
        with h5py.File(folder / "all.h5", "w") as file:
            file.update(arrays)
    axes = "channels first" if first else "time first"
    source = source_of(tmp_path, drop=["time"], cut_already=axes, subject={"column": "who"}, overlap=0.2)
    windows, counts = reading(source)
    order = [0, 1, 3, 2, 4, 5]
    np.testing.assert_array_equal(windows.x[:, :, 0], x[order])
    assert windows.y.tolist() == [0, 1, 1, 0, 1, 0] and windows.subjects == ("7", "8")
    assert windows.start.tolist() == [0, 40, 80] * 2 and counts.windows == {"7": [1, 2], "8": [2, 1]}
    np.testing.assert_array_equal(source.load(source.root).x, windows.x)
    wrong = source_of(tmp_path, drop=["time"], cut_already=axes, subject={"column": "who"}, window="40 samples")
    with pytest.raises(UserError, match="2 channels of 40 samples in each window"):
        reading(wrong)


def test_the_window_in_samples_or_seconds(tmp_path):
    for window in (1.28, "1.28 s", "64 samples", "64samples"):
        assert source_of(tmp_path, window=window).preprocessing.window == 64
    for window in ("1 minute", "1 samples", 0.01, True, "1.2.3 s", -1, [1]):
        with pytest.raises(UserError, match="'window' must be seconds, or '128 samples'"):
            source_of(tmp_path, window=window)


def test_recordings_of_other_rates_are_resampled_without_aliases(tmp_path, folder):
    """4 Hz stays; 40 Hz, which 100 Hz hold and 50 Hz do not, would come out as 10 Hz."""
    for name, rate in (("s1", 100), ("s2", 50), ("s3", 25)):
        t = np.arange(12 * rate) / rate
        high = np.sin(2 * np.pi * 40 * t) if rate == 100 else np.zeros(len(t))
        labels = np.repeat(["a", "b", "c"], 4 * rate)
        table = {"t": t, "ax": np.sin(2 * np.pi * 4 * t), "ay": high, "activity": labels}
        pd.DataFrame(table).to_csv(folder / f"{name}.csv", index=False)
    source = source_of(tmp_path, drop=["rate"], resample=50, overlap=0)
    windows, counts = reading(source)
    assert [round(tally.rate) for tally in counts.recordings] == [100, 50, 25]
    assert counts.windows == {
        "s1": [4, 4, 4],
        "s2": [4, 4, 4],
        "s3": [4, 4, 3],
    }  # 300 samples are 599 of twice the rate
    grid = np.arange(600).reshape(12, 50) / 50
    for subject, tolerance in ((0, 1e-3), (1, 1e-6), (2, 0.05)):  # a cubic spline through 6 samples a period
        own = windows.x[windows.subject == subject]
        np.testing.assert_allclose(own[1:-1, 0, 0], np.sin(2 * np.pi * 4 * grid)[1 : len(own) - 1], atol=tolerance)
        assert abs(own[1:-1, 1]).max() < 1e-3
    with pytest.raises(UserError, match=r"s1\.csv: measured rate 100 Hz"):
        reading(source_of(tmp_path))


def test_recordings_without_times_are_resampled_by_their_rate(tmp_path, folder):
    frame().to_csv(folder / "s1.csv", index=False)
    windows, _ = reading(source_of(tmp_path, drop=["time"], rate=50, resample=25, overlap=0))
    assert windows.x.shape == (12, 2, 1, 25)
    np.testing.assert_allclose(windows.x[1:-1, 0, 0, 0], np.arange(12)[1:-1] * 50, atol=0.5)
    with pytest.raises(UserError, match="the key 'rate' is missing"):
        source_of(tmp_path, drop=["time", "rate"], resample=25)


STREAMS = [
    {"files": "*/ACC.csv", "columns": ["ax"], "rate": 32, "time": "t", "label": "activity"},
    {"files": "*/GYR.csv", "columns": ["gx"], "rate": 64, "time": "t"},
    {"files": "*/HR.csv", "columns": ["hr"], "rate": 1, "time": "t"},
]


def write_streams(folder, who="anna", begin=1.7e9):
    """Lines over time: ACC from 0 to 20 s, GYR from 2 to 22 s with a hole from 8 to 10 s, HR from 1 to 21 s."""
    (folder / who).mkdir()
    for name, column, rate, first, slope in (("ACC", "ax", 32, 0, 1), ("GYR", "gx", 64, 2, 2), ("HR", "hr", 1, 1, 3)):
        t = first + np.arange(20 * rate + 1) / rate
        table = pd.DataFrame({"t": begin + t, column: slope * t})
        if name == "ACC":
            table["activity"] = np.where(t < 11, "a", "b")
        if name == "GYR":
            table = table[(t <= 8) | (t >= 10)]
        table.to_csv(folder / who / f"{name}.csv", index=False)


def test_streams_are_merged_by_time(tmp_path, folder):
    write_streams(folder)
    source = source_of(tmp_path, drop=["columns", "time", "label"], rate=32, streams=STREAMS, subject="folder")
    assert source.channels == ("ax", "gx", "hr")
    (one,) = recordings(source)
    # together they run from 2 to 20 s
    t = 2 + np.arange(18 * 32 + 1) / 32
    hole = (t > 8) & (t < 10)
    assert one.subject == one.name == "anna" and one.signals.shape == (577, 3)
    np.testing.assert_allclose(one.signals[:, 0], t, atol=1e-4)
    np.testing.assert_array_equal(np.isnan(one.signals[:, 1]), hole)
    np.testing.assert_allclose(one.signals[~hole, 1], 2 * t[~hole], atol=0.1)  # filtered: its ends settle
    np.testing.assert_allclose(one.signals[:, 2], 3 * t, atol=1e-4)
    np.testing.assert_array_equal(one.labels, t >= 11)
    windows, counts = reading(source)
    assert counts.total("rows") == 641 + 1281 - 127 + 21
    # 6 s, or 193 samples, before the hole and 10 s, or 321 samples, after it: windows of 32 every 16
    assert len(windows.y) == (193 - 32) // 16 + 1 + (321 - 32) // 16 + 1
    assert counts.total("gaps") == 1 and counts.total("at_gaps") == (577 - 32) // 16 + 1 - len(windows.y)


def write_rounded_streams(folder):
    """ACC at 32 Hz from 0 to 100 and from 110 to 200 s, times cut to milliseconds; HR at 1 Hz."""
    (folder / "anna").mkdir()
    t = np.concatenate([np.arange(3200), np.arange(3520, 6400)]) / 32
    labels = np.full(len(t), "a", dtype=object)
    labels[640:800], labels[800:960] = "", "off"  # 5 s of each
    labels[4000:] = "b"
    cut = np.floor(1000 * t) / 1000
    pd.DataFrame({"t": cut, "ax": t, "activity": labels}).to_csv(folder / "anna" / "ACC.csv", index=False)
    pd.DataFrame({"t": np.arange(201.0), "hr": 60}).to_csv(folder / "anna" / "HR.csv", index=False)
    return {"drop": ["columns", "time", "label"], "rate": 32, "window": 4.0, "subject": "folder"}


def test_times_cut_to_milliseconds_cost_no_sample_of_a_stream(tmp_path, folder):
    options = write_rounded_streams(folder)
    source = source_of(tmp_path, streams=[STREAMS[0], STREAMS[2]], ignore=["off"], **options)
    (one,) = recordings(source)
    assert one.signals.shape == (6400, 2) and np.flatnonzero(np.isnan(one.signals[:, 0])).tolist() == [
        *range(3200, 3520)
    ]
    there = ~np.isnan(one.signals[:, 0])
    np.testing.assert_allclose(
        one.signals[there, 0], (np.arange(6400) / 32)[there], atol=0.0011
    )  # the cut, on a slope of 1


def test_a_slow_stream_may_miss_values_for_longer(tmp_path, folder):
    options = write_rounded_streams(folder)
    beats = pd.DataFrame({"t": np.arange(201.0), "hr": np.arange(201.0)})
    beats.loc[[50, 60, 61, 62], "hr"] = np.nan  # a gap of one value, and one of three
    beats.to_csv(folder / "anna" / "HR.csv", index=False)
    for gap, missing in ((None, [*range(1569, 1632), *range(1889, 2016)]), (1.5, [*range(1889, 2016)]), (3, [])):
        slow = STREAMS[2] | ({} if gap is None else {"max_gap": gap})
        (one,) = recordings(source_of(tmp_path, streams=[STREAMS[0], slow], ignore=["off"], **options))
        # at 32 Hz, what is strictly between the samples 49 and 51, and 59 and 63 s: 1568 to 1632, and 1888 to 2016
        assert np.flatnonzero(np.isnan(one.signals[:, 1])).tolist() == missing
        there = ~np.isnan(one.signals[:, 1])
        np.testing.assert_allclose(
            one.signals[there, 1], np.arange(6400)[there] / 32, atol=1e-4
        )  # float32: 1.5e-5 a step


def test_a_gap_too_long_for_a_stream_cuts_although_the_data_set_allows_more(tmp_path, folder):
    options = write_rounded_streams(folder)
    beats = pd.DataFrame({"t": np.arange(201.0), "hr": np.arange(201.0)})
    beats[beats.t != 160].to_csv(folder / "anna" / "HR.csv", index=False)
    stretch = [6400 - 3520]  # of ACC, from 110 s on: 2880 samples
    before = (3200 - 128) // 64 + 1 - 6  # from 0 to 100 s, without those that touch the 10 s that have no class
    for gap, pieces in ((3, stretch), (0.5, [159 * 32 + 1 - 3520, 6400 - 161 * 32])):
        source = source_of(
            tmp_path, streams=[STREAMS[0], STREAMS[2] | {"max_gap": gap}], ignore=["off"], max_gap=2, **options
        )
        windows, _ = reading(source)
        assert len(windows.y) == before + sum((samples - 128) // 64 + 1 for samples in pieces)


@pytest.mark.parametrize(("gap", "reach"), [(None, 0.5), (0.1, 0.5), (3, 3)])
def test_the_gap_of_a_split_is_as_long_as_what_is_interpolated_in_a_stream(tmp_path, folder, gap, reach):
    options = write_rounded_streams(folder)
    slow = STREAMS[2] | ({} if gap is None else {"max_gap": gap})
    windows, _ = reading(source_of(tmp_path, streams=[STREAMS[0], slow], ignore=["off"], **options))
    # at 32 Hz; a spline through 1 Hz carries 6 of its samples, and the filter against aliases 20 of the new ones
    assert windows.reach == 32 * reach + 6 * 32 + 20


def test_rows_of_a_stream_that_share_a_time_are_averaged_where_it_says_so(tmp_path, folder):
    options = write_rounded_streams(folder)
    twice = np.repeat(np.arange(201.0), 2)
    beats = pd.DataFrame({"t": twice, "hr": twice + np.tile([0.0, 1.0], 201)})
    beats.to_csv(folder / "anna" / "HR.csv", index=False)
    with pytest.raises(
        UserError, match=r"402 of 402 rows share their time .* time: \{column: \.\.\., repeated: average\}"
    ):
        recordings(source_of(tmp_path, streams=[STREAMS[0], STREAMS[2]], ignore=["off"], **options))
    slow = STREAMS[2] | {"time": {"column": "t", "repeated": "average"}}
    (one,) = recordings(source_of(tmp_path, streams=[STREAMS[0], slow], ignore=["off"], **options))
    np.testing.assert_allclose(one.signals[:, 1], np.arange(6400) / 32 + 0.5, atol=1e-4)  # float32, as above


def test_what_streams_lose_is_counted_once(tmp_path, folder, capsys):
    options = write_rounded_streams(folder)
    source_of(tmp_path, streams=[STREAMS[0], STREAMS[2]], ignore=["off"], **options)
    assert describe.main([str(tmp_path / "mine.yaml")]) == 0
    out = capsys.readouterr().out
    # windows of 128 every 64: those of 3200 and of 2880 samples, 49 + 44, of the 99 of 6400 samples; rows 640 to 959
    # have no class: windows that begin at 9 * 64 = 576 to 14 * 64 = 896 touch them, 6 of them
    for line in (
        "read: 2 files, 1 recording, 6281 rows; ignored: 0 files",
        "discarded: 160 rows, no label",
        "discarded: 160 rows, label 'off' is to be ignored",
        "1 gap was too long to interpolate and cuts a recording (in anna/ACC.csv)",
        "6 of 99 windows dropped at gaps, missing values and ends",
        "6 of 99 windows dropped as they touch an unlabelled sample",
        "87 windows of 1 subject and 2 classes:",
    ):
        assert line in out.splitlines()
    assert "no times" not in out


def test_decimal_commas_beside_times_with_points_must_be_said(tmp_path, folder):
    rows = [f"{i / 50};{i},5;{i},25;{'abc'[i // 200]}" for i in range(N)]
    (folder / "s1.csv").write_text("\n".join(["t;ax;ay;activity", *rows]))
    with pytest.raises(UserError, match=r"column 'ax': '0,5' is no number; say dialect: \{decimal: ','\}"):
        recordings(source_of(tmp_path))
    (one,) = recordings(source_of(tmp_path, dialect={"decimal": ","}))
    i = np.arange(N)
    np.testing.assert_allclose(one.signals, np.stack([i + 0.5, i + 0.25], axis=1))
    np.testing.assert_allclose(one.time, i / 50)


def test_files_may_have_dates_of_different_kinds(tmp_path, folder):
    kinds = {"s1": "%d.%m.%Y %H:%M:%S.%f", "s2": "%m/%d/%Y %H:%M:%S.%f", "s3": "%Y-%m-%d %H:%M:%S.%f"}
    begins = pd.Timestamp("2026-03-01 09:00")  # the first of March; read the other way round, the third of January
    for name, pattern in kinds.items():
        dates = begins + pd.to_timedelta(np.arange(N) / 50, unit="s")
        frame(t=dates.strftime(pattern)).to_csv(folder / f"{name}.csv", index=False)
    units = ["%d.%m.%Y %H:%M:%S.%f", "%m/%d/%Y %H:%M:%S.%f", "iso"]
    found = recordings(source_of(tmp_path, time={"column": "t", "unit": units}))
    assert [one.time[0] for one in found] == [1772355600.0] * 3  # 2026-03-01 09:00 UTC
    with pytest.raises(UserError, match=r"s1\.csv: none of %m/%d/%Y %H:%M:%S\.%f, iso fits all its times; "):
        recordings(source_of(tmp_path, time={"column": "t", "unit": units[1:]}))
    both = [*units, "%d/%m/%Y %H:%M:%S.%f"]
    with pytest.raises(
        UserError, match=r"s2\.csv: its times can be read by '%m/%d/.*' and by '%d/%m/.*', which differ"
    ):
        recordings(source_of(tmp_path, time={"column": "t", "unit": both}))


def test_streams_with_labels_from_a_table(tmp_path, folder):
    write_streams(folder, begin=0)
    (folder / "anna" / "labels.csv").write_text("start,end,label\n0,11,a\n11,30,b\n")
    streams = [{key: value for key, value in stream.items() if key != "label"} for stream in STREAMS]
    about = {"drop": ["columns", "time"], "rate": 32, "subject": "folder", "streams": streams}
    (one,) = recordings(source_of(tmp_path, label={"table": "{subject}/labels.csv"}, **about))
    np.testing.assert_array_equal(one.labels, 2 + np.arange(577) / 32 >= 11)


def test_streams_that_do_not_fit(tmp_path, folder):
    write_streams(folder)
    options = {"drop": ["columns", "time", "label"], "rate": 32, "subject": "folder"}
    wrong = [STREAMS[0] | {"rate": 50}, *STREAMS[1:]]
    with pytest.raises(UserError, match=r"anna/ACC\.csv: measured rate 32 Hz, but the rate is said to be 50 Hz"):
        recordings(source_of(tmp_path, streams=wrong, **options))
    (folder / "ben").mkdir()
    (folder / "anna" / "HR.csv").rename(folder / "ben" / "HR.csv")
    with pytest.raises(UserError, match=r"anna has no file that fits \['\*/HR\.csv'\]"):
        recordings(source_of(tmp_path, streams=STREAMS, **options))
    (folder / "ben" / "HR.csv").unlink()
    pd.DataFrame({"t": np.arange(20) + 100.0, "hr": 60}).to_csv(folder / "anna" / "HR.csv", index=False)
    with pytest.raises(UserError, match=r"anna/GYR\.csv begins at .*, after the end of anna/HR\.csv at 119 s"):
        recordings(source_of(tmp_path, streams=STREAMS, **options))
    for change, message in (
        ({"subject": "file"}, "'subject' must be folder or"),
        ({"streams": STREAMS[:1]}, "must list two or more"),
        ({"streams": [STREAMS[0], STREAMS[0]]}, "only one of 'streams' can have the 'label'"),
        ({"streams": [STREAMS[0], STREAMS[1] | {"columns": ["ax"]}]}, "name a column twice"),
        ({"streams": [STREAMS[0], {"files": "*", "columns": ["b"]}]}, "stream 2: .*rate"),
        ({"drop": ["columns", "label"]}, "'time' belongs to each of them"),
    ):
        with pytest.raises(UserError, match=message):
            source_of(tmp_path, **(options | {"streams": STREAMS} | change))


def test_a_subject_that_vanishes_is_an_error(tmp_path, folder, capsys):
    frame().to_csv(folder / "s1.csv", index=False)
    frame().iloc[:30].to_csv(folder / "s2.csv", index=False)
    frame(ax=np.nan).to_csv(folder / "s3.csv", index=False)
    frame(activity="").to_csv(folder / "s4.csv", index=False)
    source_of(tmp_path)
    assert describe.main([str(tmp_path / "mine.yaml")]) == 2
    assert [line.partition(";")[0] for line in capsys.readouterr().err.splitlines()] == [
        "error: subject s2: not one window of its 30 rows (a window takes 50 samples)",
        "error: subject s3: not one window of its 600 rows (has less than a window without a gap)",
        "error: subject s4: not one window of its 600 rows (every window touches an unlabelled sample)",
    ]
    assert describe.main([str(tmp_path / "mine.yaml"), "--allow-missing"]) == 0


@pytest.mark.parametrize("changes", [{}, {"subject": "folder"}])
def test_files_of_one_name_in_several_folders_are_one_subject_and_a_line_says_so(folder, changes):
    for place in ("north", "south"):
        (folder / "rec" / place).mkdir(parents=True)
        frame().to_csv(folder / "rec" / place / "p1.csv", index=False)
    frame().to_csv(folder / "rec" / "north" / "p2.csv", index=False)
    source, lines = source_of(folder, files="**/*.csv", **changes), []
    made = read(source, source.find(None, source.root, False), source.preprocessing, lines.append)
    told = [line for line in lines if "p1 in several folders are one" in line]
    assert sorted(made.windows.subjects) == (["north", "south"] if changes else ["p1", "p2"])
    assert len(told) == (0 if changes else 1)
