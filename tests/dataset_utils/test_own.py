"""dataset_utils.sources.own: the user's recordings, and what a user may get wrong about them."""

import numpy as np
import pytest
import yaml

from dataset_utils.recording import UNLABELLED
from dataset_utils.sources.own import load_source
from registry.errors import UserError

BASE = {
    "name": "watch",
    "folder": "rec",
    "rate": 50,
    "window": 2.56,
    "columns": ["ax", "ay"],
    "label": "activity",
}
CSV = "t,ax,ay,note,activity\n0.00,1,2.5,x,walk\n0.02,3,,x,walk\n0.04,5,6,y,sit\n0.06,7,8,,\n"


def describe(root, drop=(), **changes):
    (root / "rec").mkdir(exist_ok=True)
    values = {key: value for key, value in (BASE | changes).items() if key not in drop}
    path = root / "watch.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def load(path):
    source = load_source(path)
    return source, list(source.load(source.find(None, path.parent, False)))


def test_csv(tmp_path):
    path = describe(tmp_path, time="t", overlap=0.25, acceleration=["ax", "ay"], filters={"median": 5, "lowpass": 12})
    (tmp_path / "rec" / "anna.csv").write_text(CSV)
    (tmp_path / "rec" / "ben.csv").write_text("\ufeff" + CSV)  # as spreadsheets save it
    source, (anna, ben) = load(path)
    assert source.name == "watch" and source.channels == ("ax", "ay") == source.acceleration
    assert source.classes == ("sit", "walk")
    assert (anna.subject, ben.subject) == ("anna", "ben")
    np.testing.assert_array_equal(anna.signals, np.array([[1, 2.5], [3, np.nan], [5, 6], [7, 8]], np.float32))
    assert anna.labels.tolist() == [1, 1, 0, UNLABELLED]
    np.testing.assert_array_equal(anna.time, [0, 0.02, 0.04, 0.06])
    settings = source.preprocessing
    assert (settings.rate, settings.window, settings.overlap) == (50, 128, 0.25)
    assert (settings.median, settings.lowpass, settings.gravity, settings.max_gap) == (5, 12, 0, 0.5)
    assert [p.name for p in source.files(tmp_path / "rec")] == ["anna.csv", "ben.csv"]


def test_npz(tmp_path):
    path = describe(tmp_path, drop=["label"], ignore=[-1])
    x = np.arange(8, dtype=np.int16).reshape(4, 2)
    np.savez(tmp_path / "rec" / "s1.npz", x=x, y=np.array([10, 2, -1, 2]), time=np.arange(4) / 50)
    np.savez(tmp_path / "rec" / "s2.npz", x=x, y=np.array([2.0, 9.0, np.nan, 2.0]))
    source, (one, two) = load(path)
    assert source.classes == ("2", "9", "10")
    assert one.labels.tolist() == [2, 0, UNLABELLED, 0]
    assert two.labels.tolist() == [0, 1, UNLABELLED, 0]
    np.testing.assert_array_equal(one.signals, x)
    np.testing.assert_array_equal(one.time, np.arange(4) / 50)
    assert two.time is None


@pytest.mark.parametrize(
    ("classes", "names", "labels"),
    [
        ({3: "lie", 1: "move", 2: "move"}, ("lie", "move"), [1, 1, 0, UNLABELLED]),
        ([2, 1], ("2", "1"), [1, 0, UNLABELLED, UNLABELLED]),
        (["3", "2"], ("3", "2"), [UNLABELLED, 1, 0, UNLABELLED]),
        (None, ("1", "2", "3", "30"), [0, 1, 2, 3]),
    ],
)
def test_classes(tmp_path, classes, names, labels):
    path = describe(tmp_path, drop=["label"], **({"classes": classes} if classes else {}))
    np.savez(tmp_path / "rec" / "s1.npz", x=np.zeros((4, 2)), y=np.array([1, 2, 3, 30]))
    source, (recording,) = load(path)
    assert source.classes == names
    assert recording.labels.tolist() == labels


def test_subject_from_part_of_the_file_name(tmp_path):
    path = describe(tmp_path, subject={"pattern": "^S([0-9]+)_"})
    for name in ("S1_left", "S1_right", "S2_left"):
        (tmp_path / "rec" / f"{name}.csv").write_text(CSV)
    assert [r.subject for r in load(path)[1]] == ["1", "1", "2"]
    (tmp_path / "rec" / "other.csv").write_text(CSV)
    with pytest.raises(UserError, match=r"other\.csv: its name does not fit the subject pattern"):
        load(path)


def test_subject_from_a_column(tmp_path):
    path = describe(tmp_path, subject={"column": "who"})
    rows = ["ax,ay,activity,who", "1,1,a,7", "2,2,b,7", "3,3,a,8", "4,4,b,7"]
    (tmp_path / "rec" / "all.csv").write_text("\n".join(rows))
    np.savez(
        tmp_path / "rec" / "more.npz",
        x=np.ones((2, 2)),
        y=np.array(["a", "b"]),
        who=np.array([7, 9]),
        time=[0, 0.02],
    )
    _, recordings = load(path)
    assert [(r.subject, len(r.labels)) for r in recordings] == [
        ("7", 2),
        ("8", 1),
        ("7", 1),
        ("7", 1),
        ("9", 1),
    ]
    np.testing.assert_array_equal(recordings[2].signals, [[4, 4]])
    np.testing.assert_array_equal(recordings[4].time, [0.02])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"windw": 2}, "unknown key 'windw'.*window"),
        ({"rate": "fast"}, "'rate' must be a number"),
        ({"rate": 0}, "'rate' must be a number"),
        ({"rate": True}, "'rate' must be a number"),
        ({"window": 0.02}, "'window' must be seconds, or '128 samples': 0.02 is no window of two samples"),
        ({"overlap": 1}, "'overlap' must be a number of at least 0 and below 1"),
        ({"columns": []}, "'columns' must be a list"),
        ({"columns": "ax"}, "'columns' must be a list"),
        ({"columns": ["ax", "ax"]}, "names a column twice"),
        ({"acceleration": ["aX"]}, "acceleration 'aX' is not in 'columns'.*ax"),
        ({"filters": {"lowpas": 3}}, "filters: unknown key 'lowpas'.*lowpass"),
        ({"filters": {"lowpass": 25}}, "'lowpass' must be a number of at least 0 and below 25"),
        ({"filters": {"median": 4}}, "'median' must be an odd number"),
        ({"filters": 3}, "filters: must hold keys and values"),
        ({"subject": "name"}, "'subject' must be file"),
        ({"subject": {"pattern": "("}}, "no regular expression"),
        ({"subject": {"pattern": "S1"}}, "needs one group"),
        ({"classes": "walk"}, "'classes' must list"),
        ({"classes": ["walk"]}, "'classes' must list two"),
        ({"classes": [True, False]}, "quote them"),
        ({"name": 3}, "'name' must be a word"),
        ({"purity": 1.5}, "'purity' is a share, at most 1"),
        ({"ignore": "sit"}, "'ignore' must be a list of labels"),
        ({"ignore": [True]}, "'ignore' must be a list of labels"),
        ({"classes": {"null": "a", None: "b"}}, "quote them"),
        ({"classes": ["3", "3.0", "4"]}, "lists a label twice"),
        ({"time": {"unit": "s"}}, "time: the key 'column' is missing"),
        ({"time": {"column": "t", "unit": "min"}}, "time: 'unit' must be one of s, ms, us, ns, iso"),
        ({"time": {"column": "t", "unit": ["iso"]}}, r"a list of two or more patterns \(or iso\) .*, not \['iso'\]"),
        ({"time": {"column": "t", "unit": ["ms", "iso"]}}, "a list of two or more patterns"),
        ({"time": {"column": "t", "timezone": "Mars"}}, "time: 'timezone' 'Mars' is unknown"),
        ({"time": {"column": "t", "repeated": "drop"}}, "time: 'repeated' must be one of average, error"),
        ({"dialect": {"seperator": ";"}}, "dialect: unknown key 'seperator'.*separator"),
        ({"dialect": {"separator": ";;"}}, "dialect: 'separator' must be one character"),
        ({"dialect": {"encoding": "utf-9"}}, "dialect: 'encoding' 'utf-9' is unknown"),
        ({"dialect": {"skip": 1.5}}, "dialect: 'skip' must be a whole number"),
        ({"label": {"table": "a", "events": "b"}}, "'label' must be a word, the name of a column, or one of"),
        ({"label": {"from": "path"}}, "label: 'from' must be one of file, folder"),
        ({"label": {"table": "a.csv", "begin": "b"}}, "label: unknown key 'begin'"),
        ({"session": {"pattern": "x"}}, "session pattern 'x' needs one group"),
        ({"cut_already": "yes"}, "'cut_already' must be one of channels first, time first"),
        ({"resample": 0}, "'resample' must be a number of at least 0.001"),
    ],
)
def test_yaml_mistakes(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as raised:
        load_source(describe(tmp_path, **changes))
    assert str(raised.value).startswith(str(tmp_path / "watch.yaml")) and "\n" not in str(raised.value)


def test_yaml_files_that_are_none(tmp_path):
    path = tmp_path / "a.yaml"
    with pytest.raises(UserError, match="cannot be read"):
        load_source(path)
    for text in ("a: [1", "- a", "", "!!python/object/apply:os.system ['true']"):
        path.write_text(text)
        with pytest.raises(UserError, match=r"a\.yaml: (is no YAML|must hold keys)") as raised:
            load_source(path)
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="key 'rate' is missing"):
        load_source(describe(tmp_path, drop=["rate"]))


def test_folder_mistakes(tmp_path):
    path = describe(tmp_path, folder="elsewhere")
    with pytest.raises(UserError, match="elsewhere: there is no such folder"):
        load(path)
    path = describe(tmp_path)
    with pytest.raises(UserError, match=r"rec: holds no file that can be read \(\.csv, "):
        load(path)
    with pytest.raises(UserError, match=r"--raw .*leave it out"):
        load_source(path).find(tmp_path, tmp_path, False)


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("t,ax,az,activity\n0,1,2,a\n0,1,2,b\n", r"a\.csv: has no column 'ay'.*it has: t, ax, az, activity"),
        ("ax,ay,activity\n1,2,a\n1,two,b\n", r"a\.csv: line 3, column 'ay': 'two' is no number"),
        ("ax,ay,activity\n1,2,a\n1,2,b,7\n", r"a\.csv: line 3 has 4 cells, but there are 3 columns"),
        ("ax,ay,activity\n1,2,a,7\n1,2,b,7\n", r"a\.csv: line 2 has 4 cells, but there are 3 columns"),
        ("", r"a\.csv: is empty"),
        ("ax,ay,activity\n", "holds no samples"),
        ("ax,ay,activity\n1,2,a\n", "fewer than two distinct labels \\('a'\\)"),
    ],
)
def test_csv_mistakes(tmp_path, contents, message):
    path = describe(tmp_path)
    (tmp_path / "rec" / "a.csv").write_text(contents)
    with pytest.raises(UserError, match=message) as raised:
        load(path)
    assert "\n" not in str(raised.value)


def test_csv_that_is_no_text(tmp_path):
    path = describe(tmp_path)
    (tmp_path / "rec" / "a.csv").write_bytes(b"\x89HDF\r\n\x1a\n\x00\x01" * 10)
    with pytest.raises(UserError, match=r"a\.csv: is no text file"):
        load(path)


def test_csv_without_rows_or_time(tmp_path):
    path = describe(tmp_path, classes=["a", "b"], time="t")
    file = tmp_path / "rec" / "a.csv"
    file.write_text("t,ax,ay,activity\n")
    with pytest.raises(UserError, match="holds no samples"):
        load(path)
    file.write_text("t,ax,ay,activity\n0,1,2,a\n,1,2,a\n")
    with pytest.raises(UserError, match="1 row without a time, the first is row 2"):
        load(path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((4, 2))}, "has no array 'y'; it has: x"),
        ({"x": np.zeros((4, 3)), "y": np.arange(4)}, r"x has shape \(4, 3\).*\(samples, 2\)"),
        ({"x": np.zeros(4), "y": np.arange(4)}, r"x has shape \(4,\)"),
        ({"x": np.full((4, 2), "a"), "y": np.arange(4)}, "x has shape .*type <U1"),
        ({"x": np.zeros((4, 2)), "y": np.arange(3)}, r"y has shape \(3,\) instead of \(4,\)"),
        ({"x": np.zeros((4, 2)), "y": np.arange(4), "time": np.zeros(2)}, "time has shape"),
        ({"x": np.zeros((4, 2)), "y": np.arange(4), "time": np.full(4, "a")}, "time must be seconds"),
        ({"x": np.zeros((4, 2)), "y": np.array([1, None, 2, 3])}, "holds pickled objects"),
    ],
)
def test_npz_mistakes(tmp_path, arrays, message):
    path = describe(tmp_path)
    np.savez(tmp_path / "rec" / "a.npz", **arrays)
    with pytest.raises(UserError, match=rf"a\.npz.*: {message}"):
        load(path)


def test_damaged_npz(tmp_path):
    path = describe(tmp_path)
    file = tmp_path / "rec" / "a.npz"
    np.savez_compressed(file, x=np.random.default_rng(0).normal(size=(400, 2)), y=np.arange(400) % 3)
    contents = file.read_bytes()
    for damaged in (b"", contents[:200], contents[:3000] + bytes(100) + contents[3100:]):
        file.write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.npz.*: is no \.np"):
            load(path)
