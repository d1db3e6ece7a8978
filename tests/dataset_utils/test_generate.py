"""The whole way from original files to shards, on made data and, where it is there, on real data."""

import dataclasses
import json
import os
import re

import numpy as np
import pytest

from dataset_utils import generate
from dataset_utils.generate import main, prepare
from dataset_utils.shards import load
from dataset_utils.spec import ShardSpec
from fedkdx_plugin.testing import SourceCase, source_checks
from registry import catalog
from registry.errors import UserError
from tests.dataset_utils import synthetic

SPEC = ShardSpec("Synthetic")


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """Make the catalog know the made data set, once as recordings and once as windows."""
    ours = {"synthetic": synthetic.Synthetic, "cut": synthetic.Cut}
    original = catalog.load
    monkeypatch.setattr(catalog, "load", lambda kind, name: ours.get(name.lower()) or original(kind, name))


def quiet(line):
    pass


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("check", source_checks())
@pytest.mark.parametrize("source", [synthetic.Synthetic, synthetic.Cut])
def test_what_every_source_must_do(source, check, tmp_path):
    check(SourceCase(source, tmp_path))


def test_from_recordings_to_shards(tmp_path):
    folder = prepare(SPEC, tmp_path, None, False, quiet)
    assert folder.parent == tmp_path / "Synthetic"
    assert re.fullmatch(f"{SPEC.folder_name()}-[0-9a-f]{{8}}", folder.name)
    made = load(folder)
    # 4500 samples at windows of 50 every 25: 179 a subject
    assert [len(a.y) + len(b.y) for a, b in zip(made.train, made.test, strict=True)] == [179] * 3
    assert made.shape == (6, 1, 50) and made.class_names == ("lying", "sitting", "walking")
    manifest = made.manifest
    assert manifest["channels"] == ["body_acc_x", "body_acc_y", "gyro", "heart", "gravity_acc_x", "gravity_acc_y"]
    assert [list(client["subjects"]) for client in manifest["clients"]] == [["s1"], ["s2"], ["s10"]]
    assert manifest["preprocessing"]["window"] == 50 and manifest["spec"]["split"] == "shuffled"
    (file,) = manifest["files"]
    assert file["name"] == "notes.txt" and file["size"] == 28 and len(file["sha256"]) == 64
    assert str(tmp_path) not in json.dumps(manifest)  # nothing that differs from machine to machine


def test_scaling_by_client_is_fitted_on_the_training_part_and_can_be_undone(tmp_path):
    scaled = load(prepare(dataclasses.replace(SPEC, scale="client"), tmp_path, None, False, quiet))
    plain = load(prepare(dataclasses.replace(SPEC, scale="none"), tmp_path, None, False, quiet))
    for k, client in enumerate(scaled.manifest["clients"]):
        train, rounding = scaled.train[k].x.astype(np.float64), 2.0**-24  # of each value, in float32
        np.testing.assert_allclose(train.mean(axis=(0, 2, 3)), 0, atol=rounding * np.abs(train).max())
        np.testing.assert_allclose(train.std(axis=(0, 2, 3)), 1, atol=rounding * np.abs(train).max())
        offset, scale = (np.array(client["scaling"][key])[:, None, None] for key in ("offset", "scale"))
        undone = scaled.test[k].x * scale + offset
        off = rounding * (np.abs(scaled.test[k].x * scale) + np.abs(undone))
        assert (np.abs(undone - plain.test[k].x) <= 1.001 * off).all()
    assert plain.manifest["clients"][0]["scaling"] is None
    assert scaled.statistics is None and plain.statistics is None


def test_federated_shards_are_as_measured_with_each_clients_three_numbers_a_channel(tmp_path):
    made = load(prepare(SPEC, tmp_path, None, False, quiet))
    plain = load(prepare(dataclasses.replace(SPEC, scale="none"), tmp_path, None, False, quiet))
    for k, own in enumerate(made.statistics):
        np.testing.assert_array_equal(made.train[k].x, plain.train[k].x)
        np.testing.assert_array_equal(made.test[k].x, plain.test[k].x)
        x = made.train[k].x.astype(np.float64)
        assert own.count.tolist() == [143 * 50] * 6  # 143 training windows of 50 samples, 6 channels; no test window
        np.testing.assert_allclose(own.mean, x.mean(axis=(0, 2, 3)), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(own.variance, x.var(axis=(0, 2, 3)), rtol=1e-12)


@pytest.mark.parametrize("partition", ["subject", "iid", "dirichlet", "pathological"])
@pytest.mark.parametrize("split", ["shuffled", "blocked"])
def test_the_same_arguments_give_the_same_bytes(tmp_path, partition, split):
    spec = dataclasses.replace(SPEC, partition=partition, split=split, min_samples=1)
    one, two = (contents(prepare(spec, tmp_path / name, None, False, quiet)) for name in "ab")
    assert one == two and len(one) == 7
    other = contents(prepare(dataclasses.replace(spec, seed=1), tmp_path / "a", None, False, quiet))
    assert one["train/0.npz"] != other["train/0.npz"]


def test_overrides_reach_the_windows(tmp_path):
    spec = dataclasses.replace(SPEC, window="100 samples", overlap=0.0, median=0, lowpass=0.0, gravity=0.0)
    made = load(prepare(spec, tmp_path, None, False, quiet))
    assert made.shape == (4, 1, 100) and made.manifest["channels"] == list(synthetic.Synthetic.channels)
    assert sum(len(shard.y) for shard in made.train + made.test) == 3 * 45


def test_windows_stay_as_they_come(tmp_path):
    made = load(prepare(ShardSpec("Cut", scale="none"), tmp_path, None, False, quiet))
    whole = np.concatenate([shard.x for shard in made.train + made.test])
    original = synthetic.windows().x
    np.testing.assert_array_equal(np.sort(whole[:, 0, 0, 0]), original[:, 0, 0, 0])
    with pytest.raises(UserError, match="--window: Cut comes filtered and cut"):
        prepare(ShardSpec("Cut", window=25), tmp_path, None, False, quiet)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": np.zeros((480, 3, 1, 20), np.float32)}, "windows of shape"),
        ({"x": np.zeros((480, 2, 20), np.float32)}, "windows of shape"),
        ({"y": np.full(480, 3)}, "whole numbers from 0 to 2"),
        ({"y": np.full(480, -1)}, "whole numbers from 0 to 2"),
        ({"stretch": np.zeros(479, int)}, "480 windows, but 'stretch'"),
        ({"test": np.zeros(479, bool)}, "480 windows, but 'test'"),
    ],
)
def test_windows_that_do_not_fit_their_description_are_refused(tmp_path, monkeypatch, change, text):
    windows = dataclasses.replace(synthetic.windows(), **change)
    monkeypatch.setattr(synthetic, "windows", lambda: windows)
    with pytest.raises(UserError, match=f"Cut: .*{text}"):
        prepare(ShardSpec("Cut"), tmp_path, None, False, quiet)


def test_a_blocked_split_stays_leak_free_when_clients_are_mixed(tmp_path):
    spec = ShardSpec("Cut", clients=5, partition="dirichlet", alpha=1.0, split="blocked", scale="none")
    made = load(prepare(spec, tmp_path, None, False, quiet))
    w = synthetic.windows()
    place = {value: i for i, value in enumerate(w.x[:, 0, 0, 0])}
    train, test = (
        np.array([place[value] for shard in part for value in shard.x[:, 0, 0, 0]]) for part in (made.train, made.test)
    )
    assert made.manifest["dropped"] == len(w.y) - len(train) - len(test) > 0
    for i in test:
        same = train[w.stretch[train] == w.stretch[i]]
        assert (np.abs(w.start[same] - w.start[i]) >= 2 * 20).all()


def test_a_second_call_makes_nothing(tmp_path, monkeypatch, capsys):
    arguments = ["-data", "synthetic", "--data-root", str(tmp_path)]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert "3 clients, 429 training and 108 test windows; a client trains on 143 to 143" in first
    before = contents(tmp_path / "Synthetic")
    assert any(re.fullmatch(f"{SPEC.folder_name()}-[0-9a-f]{{8}}.png", name) for name in before)
    monkeypatch.setattr(synthetic.Synthetic, "load", None)
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("already there: ")
    assert contents(tmp_path / "Synthetic") == before


def test_other_files_make_other_shards(tmp_path):
    first = prepare(SPEC, tmp_path, tmp_path / "raw", False, quiet)
    assert prepare(SPEC, tmp_path, tmp_path / "raw", False, quiet) == first
    notes = tmp_path / "raw" / "notes.txt"
    notes.write_text(notes.read_text().swapcase())  # of the same size
    assert prepare(SPEC, tmp_path, tmp_path / "raw", False, quiet) != first


def test_another_description_makes_other_shards(tmp_path, monkeypatch):
    first = prepare(SPEC, tmp_path, None, False, quiet)
    monkeypatch.setattr(synthetic.Synthetic, "classes", ("a", "b", "c"))
    second = load(prepare(SPEC, tmp_path, None, False, quiet))
    assert second.folder != first and second.class_names == ("a", "b", "c")


def test_shards_outlive_the_original_files(tmp_path, monkeypatch):
    """Of a data set that is known by its name; whoever has several kinds of shards is asked."""
    first = prepare(SPEC, tmp_path, tmp_path / "raw", False, quiet)

    def gone(self, raw, data_root, download):
        raise UserError("not there")

    with monkeypatch.context() as patch:
        patch.setattr(synthetic.Synthetic, "find", gone)
        lines = []
        assert prepare(SPEC, tmp_path, None, False, lines.append) == first
        assert lines == ["the original files of Synthetic are not there; using the shards that were made of them"]
        with pytest.raises(UserError, match="not there"):
            prepare(dataclasses.replace(SPEC, seed=1), tmp_path, None, False, quiet)
    (tmp_path / "raw" / "notes.txt").write_text("others")
    prepare(SPEC, tmp_path, tmp_path / "raw", False, quiet)
    monkeypatch.setattr(synthetic.Synthetic, "find", gone)
    with pytest.raises(UserError, match="made of different ones: name one of them"):
        prepare(SPEC, tmp_path, None, False, quiet)


def test_files_that_change_while_they_are_read_are_refused(tmp_path, monkeypatch):
    original = synthetic.Synthetic.load

    def while_it_is_read(self, path):
        (path / "notes.txt").write_text("changed meanwhile")
        yield from original(self, path)

    monkeypatch.setattr(synthetic.Synthetic, "load", while_it_is_read)
    with pytest.raises(UserError, match="changed while it was being read"):
        prepare(SPEC, tmp_path, None, False, quiet)
    assert not (tmp_path / "Synthetic").exists()


OWN = "name: Mine\nfolder: mine\nrate: 50\nwindow: 1.0\ncolumns: [x, y]\nlabel: activity\n"


@pytest.fixture
def own(tmp_path):
    """Two subjects' files of 1,200 rows at 50 Hz, 600 of rest and 600 of walk; a second label and a clock beside."""
    rng = np.random.default_rng(0)
    for folder in ("mine", "other"):
        (tmp_path / folder).mkdir()
        for subject in ("a1", "a2"):
            rows = [
                f"{i / 50:.2f},{a:.4f},{b:.4f},{('rest', 'walk')[i // 600]},{('up', 'down')[i // 400 % 2]},{subject}"
                for i, (a, b) in enumerate(rng.normal(size=(1200, 2)))
            ]
            (tmp_path / folder / f"{subject}.csv").write_text("\n".join(["t,x,y,activity,posture,who", *rows]) + "\n")
    (tmp_path / "mine.yaml").write_text(OWN)

    def make(text=OWN):
        (tmp_path / "mine.yaml").write_text(text)
        return load(prepare(ShardSpec(str(tmp_path / "mine.yaml")), tmp_path / "data", None, False, quiet))

    return make


def test_own_data(own):
    made = own()
    assert made.name == "Mine" and made.num_clients == 2 and set(made.class_names) == {"rest", "walk"}
    assert made.manifest["description"]["columns"] == ["x", "y"]
    # 1,200 samples, 50 every 25: 47 windows a subject
    assert [len(a.y) + len(b.y) for a, b in zip(made.train, made.test, strict=True)] == [47, 47]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("label: activity", "label: posture"),
        ("label: activity", "label: activity\nsubject: {column: who}"),
        ("label: activity", "label: activity\nsubject: {pattern: '(a)'}"),
        ("label: activity", "label: activity\ntime: t"),
        ("label: activity", "label: activity\nclasses: [walk, rest]"),
        ("label: activity", "label: activity\nclasses: {rest: lying, walk: going}"),
        ("folder: mine", "folder: other"),
        ("window: 1.0", "window: 0.5"),
        ("[x, y]", "[y, x]"),
    ],
)
def test_whatever_changes_in_the_yaml_makes_new_shards(own, old, new):
    first, second, again = own(), own(OWN.replace(old, new)), own()
    assert second.folder != first.folder == again.folder
    if "classes: [walk" in new:
        assert second.class_names == ("walk", "rest")
        assert labels_of(second, 0)[x := next(iter(labels_of(first, 0)))] == 1 - labels_of(first, 0)[x]


def test_the_order_of_classes_counts(own):
    orders = [OWN + f"classes: {{{names}}}\n" for names in ("rest: a, walk: b", "walk: b, rest: a")]
    one, two = map(own, orders)
    assert one.folder != two.folder and one.class_names == ("a", "b") and two.class_names == ("b", "a")


def test_labels_exchanged_in_a_file_of_the_same_size_make_new_shards(own, tmp_path):
    first = own()
    file = tmp_path / "mine" / "a1.csv"
    before, text = file.stat(), file.read_text()
    file.write_text(text.replace("rest", "????").replace("walk", "rest").replace("????", "walk"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    second = own()
    assert second.folder != first.folder
    one, two = labels_of(first, 0), labels_of(second, 0)
    # 23 windows before the change and 23 after it; the one across holds 25 samples of each: the lowest label wins
    assert one.keys() == two.keys() and sum(one[x] != two[x] for x in one) == 46
    assert labels_of(first, 1) == labels_of(second, 1)


def labels_of(made, k):
    return {x.tobytes(): y for shard in (made.train[k], made.test[k]) for x, y in zip(*shard, strict=True)}


@pytest.mark.parametrize(
    "name", ["..", "a/b", "'a\\b'", '"a\\x1bb"', '"a\\nb"', "'  '", "'.hidden'", "1", "[a]", "x" * 101]
)
def test_a_name_that_cannot_be_a_folders_is_refused(own, tmp_path, name):
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="name"):
        own(OWN.replace("Mine", name))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_subject_without_a_window_is_named(tmp_path, monkeypatch):
    original = synthetic.Synthetic.load

    def with_a_short_one(self, path):
        for recording in original(self, path):
            yield recording
        yield dataclasses.replace(recording, subject="s3", signals=recording.signals[:9], labels=recording.labels[:9])

    monkeypatch.setattr(synthetic.Synthetic, "load", with_a_short_one)
    with pytest.raises(UserError, match=r"subject s3: not one window of its 9 rows .*--allow-missing"):
        prepare(SPEC, tmp_path, None, False, quiet)
    spec = dataclasses.replace(SPEC, allow_missing=True)
    assert load(prepare(spec, tmp_path, None, False, quiet)).num_clients == 3


def test_a_source_without_a_recording_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic.Synthetic, "load", lambda self, path: iter(()))
    with pytest.raises(UserError, match=r"holds no recording of Synthetic; .*--raw"):
        prepare(SPEC, tmp_path, None, False, quiet)


def test_the_times_of_any_data_set_are_checked(tmp_path, monkeypatch):
    original = synthetic.Synthetic.load

    def timed(self, path, rate=50):
        for recording in original(self, path):
            yield dataclasses.replace(recording, time=np.arange(len(recording.labels)) / rate, name="night.dat")

    monkeypatch.setattr(synthetic.Synthetic, "load", timed)
    counts = load(prepare(SPEC, tmp_path / "a", None, False, quiet)).manifest["counts"]
    assert [recording["rate"] for recording in counts["recordings"]] == [50.0] * 3 and counts["rows"] == 13500
    monkeypatch.setattr(synthetic.Synthetic, "load", lambda self, path: timed(self, path, 40))
    with pytest.raises(UserError, match=r"night\.dat: measured rate 40 Hz, but the rate is said to be 50 Hz"):
        prepare(SPEC, tmp_path / "b", None, False, quiet)


def test_a_class_without_a_window_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic.Synthetic, "classes", ("lying", "sitting", "walking", "flying"))
    with pytest.raises(
        UserError, match=r"no window has 'flying', of the classes of Synthetic; list the.*--allow-missing"
    ):
        prepare(SPEC, tmp_path, None, False, quiet)
    spec = dataclasses.replace(SPEC, allow_missing=True)
    made = load(prepare(spec, tmp_path, None, False, quiet))
    assert made.manifest["counts"]["windows"]["s1"][3] == 0 and spec.folder_name() != SPEC.folder_name()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-data", "nonsense"], "unknown data set 'nonsense'"),
        (["-data", "no/such.yaml"], "no/such.yaml"),
        (["-data", "synthetic", "-nc", "0"], "-nc: "),
        (["-data", "synthetic", "-nc", "4"], "there are only 3 subjects"),
        (["-data", "synthetic", "-nc", "90", "--partition", "iid"], "90 clients need 900 training windows"),
        (["-data", "synthetic", "--lowpass", "25"], "--lowpass 25 Hz must lie below 25 Hz"),
        (["-data", "synthetic", "--window", "100"], "no window of 5000 samples"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(tmp_path, capsys, arguments, text):
    assert main([*arguments, "--data-root", str(tmp_path / "data")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and text in error and error.count("\n") == 1
    assert not (tmp_path / "data" / "Synthetic").exists() or not any((tmp_path / "data" / "Synthetic").iterdir())


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate.scaling, "fit", interrupted)
    assert main(["-data", "synthetic", "--data-root", str(tmp_path)]) == 130
    assert list((tmp_path / "Synthetic").iterdir()) == []


def test_two_processes_at_once_agree(tmp_path, monkeypatch):
    """The other one's folder appears while ours is being written."""
    original = generate._clients

    def meanwhile(*arguments):
        monkeypatch.setattr(generate, "_clients", original)
        prepare(SPEC, tmp_path, None, False, quiet)
        yield from original(*arguments)

    monkeypatch.setattr(generate, "_clients", meanwhile)
    assert load(prepare(SPEC, tmp_path, None, False, quiet)).num_clients == 3


def test_uci_har(tmp_path, real_data):
    spec = ShardSpec("UCI-HAR", partition="subject")
    made = load(prepare(spec, tmp_path, real_data("UCI HAR Dataset.zip"), False, quiet))
    assert (made.num_clients, made.num_classes, made.shape) == (30, 6, (9, 1, 128))
    assert sum(len(shard.y) for shard in made.train + made.test) == 10299
    assert all(np.unique(shard.y).size == 6 for shard in made.train + made.test)


def test_sleep_blocked(tmp_path, real_data):
    spec = ShardSpec("SLEEP", split="blocked")
    made = load(prepare(spec, tmp_path, real_data("SLEEP.zip"), False, quiet))
    assert (made.num_clients, made.num_classes, made.shape[1:]) == (15, 12, (1, 100))
    windows = sum(len(shard.y) for shard in made.train + made.test) + made.manifest["dropped"]
    assert windows == 15 * 12 * 49  # 3000 samples a posture, 100 every 60
    assert all(np.unique(shard.y).size == 12 for shard in made.train + made.test)
