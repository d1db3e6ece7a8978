"""Own recordings, flawed or described, split from end to end: what is trained on is never tested on."""

import numpy as np
import pytest

from dataset_utils.generate import prepare
from dataset_utils.shards import load
from dataset_utils.sources.own.given import GivenRule
from dataset_utils.spec import ShardSpec
from registry.errors import UserError

RATE, WINDOW = 50, 128
YAML = "name: Mine\nfolder: mine\nrate: 50\nwindow: 2.56\ncolumns: [ax, ay]\nlabel: activity\n"


def rows(samples, seed, begin=0.0, labels=("walk", "run", "sit")):
    """Return times, signals of which no two samples are equal, and equally long bouts of each label."""
    signals = np.random.default_rng(seed).normal(size=(samples, 2))
    return [
        (f"{begin + i / RATE:.2f}", f"{a:.6f}", f"{b:.6f}", labels[i * len(labels) // samples])
        for i, (a, b) in enumerate(signals)
    ]


@pytest.fixture
def make(tmp_path):
    """Write files (name -> rows), and shards of them."""

    def shards(files, more="", header="t,ax,ay,activity", yaml=YAML, **spec):
        (tmp_path / "mine").mkdir(exist_ok=True)
        for name, table in files.items():
            text = "\n".join([header, *(",".join(row) for row in table)]) + "\n"
            (tmp_path / "mine" / f"{name}.csv").write_text(text)
        (tmp_path / "mine.yaml").write_text(yaml + more)
        lines = []
        spec = ShardSpec(str(tmp_path / "mine.yaml"), **{"scale": "none", "min_samples": 1, "split": "blocked"} | spec)
        return load(prepare(spec, tmp_path / "data", None, False, lines.append)), lines

    return shards


def samples(shards):
    """Every sample in these windows; no two of a made recording are alike."""
    return {row.tobytes() for shard in shards for row in shard.x[:, :, 0].transpose(0, 2, 1).reshape(-1, 2)}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("subject", ["file", "{pattern: '(s)'}"])
def test_a_copied_file_is_on_one_side(make, seed, subject):
    """As of a second subject, or of the same one."""
    same = rows(6000, 1)
    made, lines = make({"s1": same, "s1_copy": same, "s2": rows(6000, 2)}, f"subject: {subject}\ntime: t\n", seed=seed)
    assert not samples(made.train) & samples(made.test)
    assert "the same samples twice" in " ".join(lines)
    if subject == "file":
        np.testing.assert_array_equal(made.test[0].x, made.test[1].x)


@pytest.mark.parametrize("seed", range(4))
def test_a_session_exported_in_overlapping_files_is_on_one_side(make, seed):
    """The second begins 20 s before the first ends."""
    whole = rows(6000, 1)
    made, _ = make({"s_a": whole[:3500], "s_b": whole[2500:]}, "subject: {pattern: '^(s)'}\ntime: t\n", seed=seed)
    assert made.num_clients == 1 and len(made.test[0].y)
    assert not samples(made.train) & samples(made.test)


@pytest.mark.parametrize("seed", range(4))
def test_rows_of_two_subjects_in_turns_keep_the_gap(make, seed):
    """Every 10 s the other one's rows follow, so that each piece touches the one before in its subject's own time."""
    tables = [[(*row, who) for row in rows(6000, k)] for k, who in enumerate(("p", "q"))]
    turns = [row for begin in range(0, 6000, 500) for table in tables for row in table[begin : begin + 500]]
    header = "t,ax,ay,activity,who"
    made, _ = make({"all": turns}, "subject: {column: who}\ntime: t\n", header, seed=seed)
    time = {f"{float(row[1]):.6f}": float(row[0]) for table in tables for row in table}
    for k in range(2):
        train, test = (
            np.array([[time[f"{v:.6f}"] for v in window[0, 0, [0, -1]].tolist()] for window in part[k].x])
            for part in (made.train, made.test)
        )
        for first, last in test:
            apart = np.maximum(train[:, 0] - last, first - train[:, 1])
            assert apart.min() > WINDOW / RATE - 0.01


@pytest.mark.parametrize("seed", range(4))
def test_sessions_stay_whole_and_nothing_is_dropped(make, seed):
    files = {f"s{s}_{k}": rows(3000, 10 * s + k) for s in range(2) for k in range(5)}
    made, lines = make(files, "subject: {pattern: '^(s[0-9])'}\n", seed=seed)
    assert made.manifest["dropped"] == 0
    # 3,000 samples are 45 windows; one session of five is tested on
    assert [(len(a.y), len(b.y)) for a, b in zip(made.train, made.test, strict=True)] == [(180, 45)] * 2
    assert "90 of 450 windows are tested on (20.0%), 0 dropped" in " ".join(lines)


def test_it_is_said_where_whole_recordings_are_far_more_than_was_asked_for(make):
    """Of two recordings one is tested on, which is half; of five it is a fifth, as asked for."""
    files = {f"s{s}_{k}": rows(3000, 10 * s + k) for s, count in enumerate((2, 5)) for k in range(count)}
    made, lines = make(files, "subject: {pattern: '^(s[0-9])'}\n")
    assert [(len(a.y), len(b.y)) for a, b in zip(made.train, made.test, strict=True)] == [(45, 45), (180, 45)]
    classes = len({*made.train[0].y, *made.test[0].y})
    said = [line for line in lines if "more than twice" in line]
    assert len(said) == 1 and said[0].startswith(f"{classes} of {2 * classes} classes of subjects have more than twice")


@pytest.mark.parametrize("seed", range(4))
def test_filters_do_not_reach_across(make, seed):
    """A burst in the tested samples leaves no more than a thousandth of its filtered peak in any training window."""
    table = rows(12_000, 3)
    filters = "filters: {gravity: 0.3}\nacceleration: [ax, ay]\n"
    made, _ = make({"s": table}, filters, seed=seed)
    tested = {row.tobytes() for row in made.test[0].x.reshape(len(made.test[0].y), -1)}
    first = next(i for i, row in enumerate(table) if row[3] == "run")
    assert tested and first == 4000
    loud = [row if i != 6000 else (row[0], "1000", "1000", row[3]) for i, row in enumerate(table)]
    other, _ = make({"s": loud}, filters, seed=seed)
    changed = np.abs(made.train[0].x - other.train[0].x).max(axis=(1, 2, 3))
    if np.abs(made.test[0].x - other.test[0].x).max() > 500:  # the burst lies in a test window
        from scipy.signal import butter, sosfiltfilt

        impulse = np.zeros(12_000)
        impulse[6000] = 1000
        peak = sosfiltfilt(butter(3, 0.3, fs=50, output="sos"), impulse, padtype="even", padlen=500).max()
        assert changed.max() < 1.1e-3 * peak


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("split", ["shuffled", "blocked"])
def test_validation_windows_share_no_sample_with_test_windows(make, seed, split):
    files = {f"s{k}": rows(9000, k) for k in range(3)}
    usual, _ = make(files, split=split, seed=seed)
    tuning, lines = make(files, split=split, seed=seed, evaluate_on="validation")
    assert not samples(tuning.test) & samples(usual.test)
    for held, own in zip(tuning.test, usual.train, strict=True):
        whole = len(held.y) / len(own.y)
        assert whole == pytest.approx(0.2, abs=0.02) if split == "shuffled" else 0.05 < whole < 0.4
    assert ("share samples with test windows" in " ".join(lines)) == (split == "shuffled")


def test_leave_one_subject_out(make):
    files = {f"s{k}": rows(3000, k) for k in range(4)}
    made, lines = make(files, split="loso", seed=2)
    assert [list(client["subjects"]) for client in made.manifest["clients"]] == [
        ["s0", "s2"],
        ["s1", "s2"],
        ["s2", "s3"],
    ]
    assert [client["subjects"]["s2"]["train"] for client in made.manifest["clients"]] == [0, 0, 0]
    # 45 windows a subject; those of the one left out are shared out, 15 of each of three classes by three
    assert [(len(a.y), len(b.y)) for a, b in zip(made.train, made.test, strict=True)] == [(45, 15)] * 3
    assert "subject s2 is left out of training (--split loso)" in lines


def test_given_by_subject_file_or_column(make):
    files = {f"s{s}_{k}": rows(3000, 10 * s + k) for s in range(3) for k in range(3)}
    pattern = "subject: {pattern: '^(s[0-9])'}\n"
    made, _ = make(files, pattern + "test: {files: [s0_2, s1_0.csv, s2_2]}\n", split="given")
    assert [(len(a.y), len(b.y)) for a, b in zip(made.train, made.test, strict=True)] == [(90, 45)] * 3
    by_files = samples(made.test)
    expected = [row for name in ("s0_2", "s1_0", "s2_2") for row in files[name]]
    assert by_files <= {np.array([row[1], row[2]], np.float32).tobytes() for row in expected}

    made, lines = make(files, pattern + "test: {subjects: [s1]}\n", split="given")
    assert (
        "subjects that are tested on and not trained on (--split given): s1; their windows are divided equally among "
        "the clients" in lines
    )
    assert made.num_clients == 2 and [len(shard.y) for shard in made.train] == [135, 135]
    assert sum(len(shard.y) for shard in made.test) == 135

    sessions = pattern + "session: {pattern: '_([0-9])$'}\n"
    made, lines = make(files, sessions + "test: {sessions: ['2']}\n", split="given")
    assert "not trained on" not in " ".join(lines)
    assert [(len(a.y), len(b.y)) for a, b in zip(made.train, made.test, strict=True)] == [(90, 45)] * 3
    assert samples(made.test) <= {
        np.array([row[1], row[2]], np.float32).tobytes() for name in files if name[-1] == "2" for row in files[name]
    }
    with pytest.raises(UserError, match="names the session 'v2', of which there is no recording"):
        make(files, sessions + "test: {sessions: [v2]}\n", split="given")

    parts = {name: [(*row, "Test" if name[-1] == "2" else "train") for row in table] for name, table in files.items()}
    more = pattern + "test: {column: part, values: [Test]}\n"
    made, _ = make(parts, more, "t,ax,ay,activity,part", split="given")
    assert [(len(a.y), len(b.y)) for a, b in zip(made.train, made.test, strict=True)] == [(90, 45)] * 3


def test_a_test_rule_names_people_and_files_however_their_letters_are_written(tmp_path):
    composed, apart = "J\u00f6rg", "Jo\u0308rg"  # ö as one letter, and as an o with two dots
    for one, other in ((composed, apart), (apart, composed)):
        rule = GivenRule(tmp_path / "mine.yaml", tmp_path, {"subjects": [one]})
        assert rule.names(other) and not rule.names("Jorg")
        rule.check_seen()
        rule = GivenRule(tmp_path / "mine.yaml", tmp_path, {"files": [f"{one}_2"]})
        rule.check_files([tmp_path / f"{other}_2.csv"])
        assert rule.rows(tmp_path / f"{other}_2.csv", None, 2).all()


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("{subjects: [s0_7]}", "names the subject 's0_7', of which there is no recording (did you mean s0_1"),
        ("{sessions: [v1]}", "'sessions' needs the key 'session'"),
        ("{files: [s0_7]}", "names the file 's0_7', which is not there (did you mean s0_1"),
        ("{files: []}", "must be a list with something in it"),
        ("[s1]", "'test' must be {subjects"),
        ("{column: part}", "'test' must be {subjects"),
        ("{column: part, values: [x]}", "has no column 'part'"),
        ("{column: activity, values: [x]}", "names the value 'x', which column 'activity' never has"),
        (
            "{column: activity, values: [walk, rum]}",
            "names the value 'rum', which column 'activity' never has (did you",
        ),
        ("{column: activity, values: [yes]}", "YAML reads yes, no, on, off and null in 'test' as true"),
        ("{column: [activity], values: [walk]}", "'column' must be a word, not ['activity']"),
    ],
)
def test_a_wrong_test_rule_is_one_line(make, rule, text):
    with pytest.raises(UserError) as caught:
        make({"s0_1": rows(900, 0), "s1_1": rows(900, 1)}, f"test: {rule}\n", split="given")
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_a_subject_without_a_test_recording_is_named_with_what_to_do(make):
    files = {f"s{s}_{k}": rows(3000, 10 * s + k) for s in range(3) for k in range(2)}
    more = "subject: {pattern: '^(s[0-9])'}\ntest: {files: [s0_1, s1_1]}\n"
    with pytest.raises(UserError) as caught:
        make(files, more, split="given")
    assert str(caught.value).startswith(
        "subject s2 has no test window; name a recording of each subject under 'test', leave the subject out "
        "(--exclude-subjects), or choose another --partition"
    )


def test_classes_that_cannot_be_tested_on_are_counted(make):
    """Walking, from sample 5,700 on, is most of the windows at 5,696, 5,760 and 5,824: one tested on leaves none."""
    table = rows(6000, 0, labels=("run", "sit"))
    table[-300:] = [(*row[:3], "walk") for row in table[-300:]]
    made, lines = make({"s0": table, "s1": rows(6000, 1)})
    assert "1 of 6 classes of subjects have no test window: too little would be left" in " ".join(lines)
    walk = made.class_names.index("walk")
    assert not (made.test[0].y == walk).any() and (made.train[0].y == walk).sum() == 3
    assert (made.test[1].y == walk).any()


def apart(made):
    """Seconds between each training and the nearest test window, whose first channel is the time."""
    train, test = (np.concatenate([shard.x[:, 0, 0][:, [0, -1]] for shard in part]) for part in (made.train, made.test))
    return min(np.maximum(train[:, 0] - last, first - train[:, 1]).min() for first, last in test)


@pytest.mark.parametrize("timed", ["time: t\n", ""])
@pytest.mark.parametrize("begin", [0.0, 100.0])
@pytest.mark.parametrize("block", [400, 1500])
def test_a_column_that_divides_a_file_keeps_the_gap(make, timed, begin, block):
    """Blocks of training and test rows in turns, on a clock set to 0 or not, or without one."""
    table = [(f"{begin + i / RATE:.2f}", f"{i / RATE:.4f}", "0", ("walk", "run")[i // 200 % 2]) for i in range(6000)]
    table = [(*row, ("train", "test")[i // block % 2]) for i, row in enumerate(table)]
    made, _ = make(
        {"s0": table, "s1": table},
        timed + "test: {column: part, values: [test]}\n",
        "t,ax,ay,activity,part",
        split="given",
    )
    assert apart(made) > WINDOW / RATE
    for part, wanted in ((made.train, 0), (made.test, 1)):
        places = np.concatenate([np.round(shard.x[:, 0, 0] * RATE).astype(int).ravel() for shard in part])
        assert set(places // block % 2) == {wanted}
    # windows begin every 64 samples; those of both kinds, and of training nearer than 128 samples, are dropped
    starts = np.arange(0, 6000 - 127, 64)
    kinds = np.array([set((np.arange(a, a + 128) // block % 2).tolist()) for a in starts])
    assert len(made.test[0].y) == sum(kind == {1} for kind in kinds)


def test_rows_in_turns_too_short_for_a_window_are_neither_trained_on_nor_tested_on(make):
    table = [(*row, ("train", "test")[i // 20 % 2]) for i, row in enumerate(rows(3000, 0))]
    with pytest.raises(UserError, match=r"no window is to be tested on.*each long enough for a window"):
        make({"s0": table}, "test: {column: part, values: [test]}\n", "t,ax,ay,activity,part", split="given")


def test_values_of_a_column_are_told_apart_as_labels_are(make):
    table = [(*row, f"{float(i >= 2000):.1f}") for i, row in enumerate(rows(3000, 0))]
    made, _ = make(
        {"s0": table, "s1": table[::-1]}, "test: {column: part, values: [1]}\n", "t,ax,ay,activity,part", split="given"
    )
    assert len(made.test[0].y) == 13  # windows begin at 2048, 2112, ... 2816


@pytest.mark.parametrize("column", ["test: {column: part, values: [b]}", "session: {column: part}"])
def test_a_table_of_labels_counts_from_the_files_first_row(make, tmp_path, column):
    """Without times: rows of the second part are not counted from its own first row."""
    table = [(str(i), str(i), "0", "", "ab"[i >= 1500]) for i in range(3000)]
    (tmp_path / "mine").mkdir()
    spans = "".join(f"{10 * k},{10 * k + 10},{('walk', 'run')[k % 2]}\n" for k in range(6))
    for name in ("s0", "s1"):
        (tmp_path / "mine" / f"{name}_labels.csv").write_text("start,end,label\n" + spans)
    yaml = YAML.replace("label: activity", "label: {table: '{file}_labels.csv'}")
    more = "files: 's?.csv'\n" + column + "\n"
    made, _ = make({"s0": table, "s1": table}, more, "t,ax,ay,unused,part", yaml, split="shuffled")
    for shard in (*made.train, *made.test):
        middle = shard.x[:, 0, 0, 64] / RATE  # seconds
        right = np.array([made.class_names.index(("walk", "run")[int(t // 10) % 2]) for t in middle])
        edges = np.abs(middle % 10 - 5) > 3.6  # a window that an edge halves
        assert (shard.y == right)[~edges].all()


def test_a_file_that_goes_on_after_a_copy_lies_on_the_copys_line(make):
    """p2 continues a recording that is also p1's: what touches it is kept apart from it."""
    first = [(f"{100 + i / RATE:.2f}", f"{i / RATE:.4f}", "0", "ab"[i // 100 % 2]) for i in range(1000)]
    second = [(f"{120 + i / RATE:.2f}", f"{20 + i / RATE:.4f}", "0", "ab"[i // 100 % 2]) for i in range(1000)]
    for seed in range(6):
        made, _ = make(
            {"p1_a": first, "p2_a": first, "p2_c": second}, "subject: {pattern: '^(p[12])'}\ntime: t\n", seed=seed
        )
        assert apart(made) > WINDOW / RATE


@pytest.mark.parametrize("split", ["given", "blocked"])
def test_copies_of_windows_that_are_cut_already_stay_on_one_side(tmp_path, split):
    folder = tmp_path / "w"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in ("f1", "f2"):
        np.savez(folder / f"{name}.npz", x=rng.normal(size=(60, 2, 128)), y=np.arange(60) // 10 % 3)
    (folder / "f9.npz").write_bytes((folder / "f1.npz").read_bytes())
    (tmp_path / "w.yaml").write_text(
        "name: W\nfolder: w\nrate: 50\nwindow: 128 samples\ncolumns: [a, b]\noverlap: 0\n"
        "cut_already: channels first\nlabel: y\ntest: {files: [f1]}\nignore: [2]\nclasses: [0, 1]\n"
    )
    lines = []
    spec = ShardSpec(str(tmp_path / "w.yaml"), scale="none", min_samples=1, split=split)
    made = load(prepare(spec, tmp_path / "data", None, False, lines.append))
    assert not samples(made.train) & samples(made.test)
    text = " ".join(lines)
    assert "1 files hold the same windows as another" in text and "20 of 60 windows are left out, as 'ignore'" in text


def test_sessions_of_merged_sensors_that_touch_keep_the_gap(tmp_path):
    folder = tmp_path / "m" / "anna"
    folder.mkdir(parents=True)
    for session, begin in enumerate((100, 120, 140)):
        i = np.arange(1000)
        label = np.array(["walk", "run"])[i // 100 % 2]
        acc = "\n".join(f"{begin + k / 50:.2f},{begin - 100 + k / 50:.4f},{label[k]}" for k in i)
        (folder / f"m{session}_acc.csv").write_text(f"t,a,activity\n{acc}\n")
        heart = "\n".join(f"{begin + k:.2f},{60 + k}" for k in range(21))
        (folder / f"m{session}_hr.csv").write_text(f"t,hr\n{heart}\n")
    (tmp_path / "m.yaml").write_text(
        "name: M\nfolder: m\nrate: 50\nwindow: 1\nsubject: folder\nsession: {pattern: '(m[0-9])_'}\n"
        "test: {files: [anna/m1_acc]}\nstreams:\n"
        "  - {files: '*/*_acc.csv', columns: [a], rate: 50, time: t, label: activity}\n"
        "  - {files: '*/*_hr.csv', columns: [hr], rate: 1, time: t}\n"
    )
    spec = ShardSpec(str(tmp_path / "m.yaml"), scale="none", min_samples=1, split="given", clients=1, partition="iid")
    made = load(prepare(spec, tmp_path / "data", None, False, lambda line: None))
    # a spline through 1 Hz carries six beats, 300 samples at 50 Hz
    assert apart(made) > 6


def test_a_table_in_folders_within_folders_makes_new_shards(tmp_path):
    (tmp_path / "f.yaml").write_text(
        "name: F\nfolder: f\nrate: 50\nwindow: 1\ncolumns: [a]\nfiles: '**/acc.csv'\nclasses: [w, r]\n"
        "subject: folder\nlabel: {table: '{folder}/labels.csv'}\n"
    )
    keys = []
    for labels in (("w", "r"), ("r", "w")):
        for place in ("p/a", "q/b"):
            folder = tmp_path / "f" / place
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "acc.csv").write_text("a\n" + "\n".join(map(str, range(1000))) + "\n")
            (folder / "labels.csv").write_text(f"start,end,label\n0,10,{labels[0]}\n10,20,{labels[1]}\n")
        spec = ShardSpec(str(tmp_path / "f.yaml"), min_samples=1)
        keys.append(prepare(spec, tmp_path / "data", None, False, lambda line: None))
    assert keys[0] != keys[1]


def test_one_file_with_its_labels_beside_it(tmp_path):
    (tmp_path / "g.csv").write_text("a\n" + "\n".join(map(str, range(1000))) + "\n")
    (tmp_path / "g_labels.csv").write_text("start,end,label\n0,10,w\n10,20,r\n")
    (tmp_path / "g.yaml").write_text(
        "name: G\nfolder: g.csv\nrate: 50\nwindow: 1\ncolumns: [a]\nlabel: {table: g_labels.csv}\n"
    )
    spec = ShardSpec(str(tmp_path / "g.yaml"), min_samples=1)
    made = load(prepare(spec, tmp_path / "data", None, False, lambda line: None))
    assert {file["name"] for file in made.manifest["files"]} == {"g.csv", "g_labels.csv"}
