"""dataset_utils.sources.uci_har, on made files, and on the real ones where FEDKDX_TEST_DATA names their folder."""

import zipfile

import numpy as np
import pytest

from dataset_utils.sources.uci_har import CHANNELS, UCIHAR, chains
from registry.errors import UserError


def stretch_windows(rng, windows):
    """(windows, 9, 128): cut with half overlap from one signal, rounded as float32 text."""
    signal = rng.normal(size=(9, 64 * (windows + 1))).astype(np.float32)
    return np.stack([signal[:, 64 * i : 64 * i + 128] for i in range(windows)])


def part_arrays(seed, subjects):
    rng = np.random.default_rng(seed)
    x, y, subject = [], [], []
    for number in subjects:
        for activity in range(1, 7):
            for windows in (2, 3):
                x.append(stretch_windows(rng, windows))
                y += [activity] * windows
                subject += [number] * windows
    return np.concatenate(x), np.array(y), np.array(subject)


def write(folder, seed=0):
    """Original layout: subjects 1 and 4 in train, 2 in test."""
    made = {}
    for part, subjects in (("train", (1, 4)), ("test", (2,))):
        x, y, subject = made[part] = part_arrays([seed, len(subjects)], subjects)
        inertial = folder / part / "Inertial Signals"
        inertial.mkdir(parents=True)
        np.savetxt(folder / part / f"y_{part}.txt", y, fmt="%d")
        np.savetxt(folder / part / f"subject_{part}.txt", subject, fmt="%d")
        for index, channel in enumerate(CHANNELS):
            np.savetxt(inertial / f"{channel}_{part}.txt", x[:, index], fmt="%16.8e")
    return made


def test_folder_zip_and_nested_zip(tmp_path):
    folder = tmp_path / "UCI HAR Dataset"
    made = write(folder)
    inner, outer = tmp_path / "UCI HAR Dataset.zip", tmp_path / "human+activity.zip"
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as zipped:
        for file in sorted(folder.rglob("*.txt")):
            zipped.write(file, file.relative_to(tmp_path))
    with zipfile.ZipFile(outer, "w") as zipped:
        zipped.write(inner, inner.name)
    source = UCIHAR()
    loaded = [source.load(source.find(raw, tmp_path, False)) for raw in (folder, inner, outer, tmp_path)]
    for other in loaded[1:]:
        for field in ("x", "y", "subject", "stretch", "start"):
            np.testing.assert_array_equal(getattr(loaded[0], field), getattr(other, field))

    windows = loaded[0]
    assert windows.subjects == ("1", "2", "4")
    assert windows.x.shape == (90, 9, 1, 128) and windows.x.dtype == np.float32
    np.testing.assert_array_equal(np.bincount(windows.y), np.full(6, 15))
    np.testing.assert_array_equal(windows.x[windows.subject == 1][:, :, 0], made["test"][0])
    np.testing.assert_array_equal(windows.y[windows.subject == 1], made["test"][1] - 1)
    assert len(np.unique(windows.stretch)) == 36
    assert len(source.files(folder)) == 22 and source.files(inner) == [inner]


def test_chains_rebuild_the_order():
    rng = np.random.default_rng(0)
    x = np.concatenate([stretch_windows(rng, n) for n in (5, 1, 3)])
    subject = np.repeat([0, 0, 1], [5, 1, 3])
    order = rng.permutation(len(x))
    stretch, start = chains(x[order], subject[order])
    truth = np.repeat([0, 1, 2], [5, 1, 3])[order]
    assert len({(a, b) for a, b in zip(stretch, truth, strict=True)}) == len(set(stretch)) == 3
    np.testing.assert_array_equal(start, np.concatenate([64 * np.arange(n) for n in (5, 1, 3)])[order])
    firsts = [int(np.flatnonzero(stretch == s)[0]) for s in range(3)]
    assert firsts == sorted(firsts)  # numbered in the order of rows


def test_chains_keep_subjects_apart_and_repeats_together():
    rng = np.random.default_rng(1)
    x = stretch_windows(rng, 3)
    twice = np.concatenate([x, x, x[1:2]])
    stretch, start = chains(twice, np.array([0, 0, 0, 1, 1, 1, 1]))
    np.testing.assert_array_equal(stretch, [0, 0, 0, 1, 1, 1, 1])
    np.testing.assert_array_equal(start, [0, 64, 128, 0, 64, 128, 64])


def test_chains_of_constant_signals_end():
    constant = np.zeros((4, 9, 128), np.float32)
    stretch, start = chains(constant, np.zeros(4, int))
    assert set(stretch) == {0} and set(start) == {0}
    a, b = np.zeros((9, 64), np.float32), np.ones((9, 64), np.float32)
    ring = np.stack([np.hstack([a, b]), np.hstack([b, a])])
    stretch, start = chains(ring, np.zeros(2, int))
    assert set(stretch) == {0} and list(start) == [0, 64]


def damage_columns(folder):
    path = folder / "train" / "Inertial Signals" / "total_acc_y_train.txt"
    lines = path.read_text().splitlines()
    lines[6] = lines[6] + " 1.0"
    path.write_text("\n".join(lines))


def damage_text(folder):
    path = folder / "test" / "Inertial Signals" / "body_gyro_z_test.txt"
    lines = path.read_text().splitlines()
    lines[3] = lines[3].replace(lines[3].split()[5], "oops")
    path.write_text("\n".join(lines))


def drop_row(folder):
    path = folder / "train" / "y_train.txt"
    path.write_text("\n".join(path.read_text().splitlines()[1:]))


def wrong_activity(folder):
    path = folder / "train" / "y_train.txt"
    path.write_text(path.read_text().replace("6", "7"))


def remove(folder):
    (folder / "test" / "subject_test.txt").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_columns, r"total_acc_y_train\.txt: line 7 has 129 columns instead of 128"),
        (damage_text, r"body_gyro_z_test\.txt: line 4 has 'oops' where a number belongs"),
        (drop_row, r"60 rows, 59 labels and 60 subjects"),
        (wrong_activity, r"y_train\.txt: an activity outside 1 to 6"),
        (remove, r"subject_test\.txt"),
    ],
)
def test_damage_is_named(tmp_path, damage, message):
    write(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        UCIHAR().load(tmp_path)


def test_not_there(tmp_path):
    with pytest.raises(UserError, match=r"UCI-HAR is not in .*10\.24432/C54S4K.*'UCI HAR Dataset\.zip'.*--download"):
        UCIHAR().find(None, tmp_path, False)


def test_real_files(real_data):
    windows = UCIHAR().load(real_data("UCI HAR Dataset.zip"))
    assert windows.x.shape == (10_299, 9, 1, 128) and len(windows.subjects) == 30
    np.testing.assert_array_equal(np.bincount(windows.y), [1722, 1544, 1406, 1777, 1906, 1944])
    assert len(np.unique(windows.stretch)) == 857
    assert windows.test.sum() == 2947 and len(set(windows.subject[windows.test])) == 9
    assert not set(windows.subject[windows.test]) & set(windows.subject[~windows.test])
    follows = np.diff(windows.stretch) == 0
    assert follows.sum() == 9442 and (np.diff(windows.start)[follows] == 64).all()
    np.testing.assert_array_equal(windows.x[1:][follows][..., :64], windows.x[:-1][follows][..., 64:])
    labels = [set(windows.y[windows.stretch == s]) for s in range(857)]
    assert all(len(label) == 1 for label in labels)
    # no sample is in two stretches: one of 713,984 nine-channel samples coincides
    heads = windows.x[..., :64].transpose(0, 2, 3, 1).reshape(-1, 9)
    assert len(np.unique(np.ascontiguousarray(heads).view("V36"))) >= len(heads) - 1
