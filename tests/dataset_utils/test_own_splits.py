"""Own recordings, flawed or described, split from end to end: what is trained on is never tested on."""

import numpy as np
import pytest

from dataset_utils.generate import prepare
from dataset_utils.shards import load
from dataset_utils.spec import ShardSpec
from registry.errors import UserError

RATE, WINDOW = 50, 128
YAML = "name: Mine\nfolder: mine\nrate: 50\nwindow: 2.56\ncolumns: [ax, ay]\nlabel: activity\n"


def rows(samples, seed, begin=0.0, labels=("walk", "run", "sit")):
    """Times, signals of which no two samples are alike, and equally long bouts of each label."""
    signals = np.random.default_rng(seed).normal(size=(samples, 2))
    return [
        (f"{begin + i / RATE:.2f}", f"{a:.6f}", f"{b:.6f}", labels[i * len(labels) // samples])
        for i, (a, b) in enumerate(signals)
    ]


@pytest.fixture
def make(tmp_path):
    """Write files (name -> rows), and shards of them."""

    def shards(files, more="", header="t,ax,ay,activity", **spec):
        (tmp_path / "mine").mkdir(exist_ok=True)
        for name, table in files.items():
            text = "\n".join([header, *(",".join(row) for row in table)]) + "\n"
            (tmp_path / "mine" / f"{name}.csv").write_text(text)
        (tmp_path / "mine.yaml").write_text(YAML + more)
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

    made, _ = make(files, pattern + "test: {subjects: [s1]}\n", split="given")
    assert made.num_clients == 2 and [len(shard.y) for shard in made.train] == [135, 135]
    assert sum(len(shard.y) for shard in made.test) == 135

    parts = {name: [(*row, "Test" if name[-1] == "2" else "train") for row in table] for name, table in files.items()}
    more = pattern + "test: {column: part, values: [Test]}\n"
    made, _ = make(parts, more, "t,ax,ay,activity,part", split="given")
    assert [(len(a.y), len(b.y)) for a, b in zip(made.train, made.test, strict=True)] == [(90, 45)] * 3


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("{subjects: [s7]}", "names the subject 's7', of whom there is no recording"),
        ("{files: [s0_7]}", "names the file 's0_7', which is not there (did you mean s0_1"),
        ("{files: []}", "must be a list with something in it"),
        ("[s1]", "'test' must be {subjects"),
        ("{column: part}", "'test' must be {subjects"),
        ("{column: part, values: [x]}", "has no column 'part'"),
        ("{column: activity, values: [x]}", "nothing says which recordings to test on"),
    ],
)
def test_a_wrong_test_rule_is_one_line(make, rule, text):
    with pytest.raises(UserError) as caught:
        make({"s0_1": rows(900, 0), "s1_1": rows(900, 1)}, f"test: {rule}\n", split="given")
    assert text in str(caught.value) and "\n" not in str(caught.value)


def test_classes_that_cannot_be_tested_on_are_counted(make):
    """Walking, from sample 5,700 on, is most of the windows at 5,696, 5,760 and 5,824: one tested on leaves none."""
    table = rows(6000, 0, labels=("run", "sit"))
    table[-300:] = [(*row[:3], "walk") for row in table[-300:]]
    made, lines = make({"s0": table, "s1": rows(6000, 1)})
    assert "1 of 6 classes of subjects have no test window: too little would be left" in " ".join(lines)
    walk = made.class_names.index("walk")
    assert not (made.test[0].y == walk).any() and (made.train[0].y == walk).sum() == 3
    assert (made.test[1].y == walk).any()
