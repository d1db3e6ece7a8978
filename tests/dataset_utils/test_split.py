"""Both splits keep their promises; the blocked one leaks nothing."""

import dataclasses

import numpy as np
import pytest

from dataset_utils.recording import Windows
from dataset_utils.split import split
from registry.errors import UserError
from tests.dataset_utils.synthetic import windows


def random_windows(seed: int) -> Windows:
    """Stretches of random lengths, classes that alternate within them, windows missing here and there."""
    rng = np.random.default_rng(seed)
    rows = []
    for stretch in range(12):
        label = int(rng.integers(4))
        for i in range(int(rng.integers(1, 60))):
            if rng.random() < 0.1:
                label = int(rng.integers(4))
            if rng.random() < 0.9:
                rows.append((label, stretch % 3, stretch, 7 * i))
    y, subject, number, start = np.array(rows).T
    return Windows(np.zeros((len(y), 1, 1, 16), np.float32), y, subject, number, start, ("a", "b", "c"))


@pytest.mark.parametrize("how", ["shuffled", "blocked"])
def test_every_window_lands_once(how):
    w = random_windows(0)
    parts = split(w, 0.2, how, seed=3)
    np.testing.assert_array_equal(np.sort(np.concatenate(parts)), np.arange(len(w.y)))
    assert all((np.diff(part) > 0).all() for part in parts)
    assert how == "blocked" or not len(parts.dropped)


@pytest.mark.parametrize("how", ["shuffled", "blocked"])
def test_the_share_is_kept_for_each_class_of_each_subject(how):
    w = windows(per_class=40)
    parts = split(w, 0.2, how, seed=1)
    for s in range(4):
        for c in range(3):
            assert ((w.subject[parts.test] == s) & (w.y[parts.test] == c)).sum() == 8


@pytest.mark.parametrize("seed", range(12))
def test_blocked_shares_no_sample_and_keeps_the_gap(seed):
    w = random_windows(seed)
    parts = split(w, 0.25, "blocked", seed)
    assert len(parts.train) and len(parts.test)
    length = w.x.shape[-1]

    def distance(a, b):  # samples between the end of one window and the start of the other; negative: shared
        return abs(int(w.start[a]) - int(w.start[b])) - length

    for test in parts.test:
        same = parts.train[w.stretch[parts.train] == w.stretch[test]]
        assert all(distance(train, test) >= length for train in same)
    for dropped in parts.dropped:  # and nothing was dropped without need
        same = parts.test[w.stretch[parts.test] == w.stretch[dropped]]
        assert any(distance(dropped, test) < length for test in same)


def test_blocked_tests_on_consecutive_windows():
    w = windows(per_class=40, subjects=1)
    tested = split(w, 0.2, "blocked", seed=5).test
    for c in range(3):
        of_class = np.flatnonzero(w.y == c)
        np.testing.assert_array_equal(np.diff(np.flatnonzero(np.isin(of_class, tested))), 1)


def test_shuffled_windows_do_overlap():
    """What the docstring warns of is true."""
    w = windows(per_class=40)
    parts = split(w, 0.2, "shuffled", seed=0)
    spans = {(w.stretch[i], w.start[i] + 10) for i in parts.train}
    assert any((w.stretch[i], w.start[i]) in spans for i in parts.test)


@pytest.mark.parametrize("how", ["shuffled", "blocked"])
def test_a_single_window_is_trained_on_and_two_are_shared(how):
    w = windows(per_class=2, classes=2, subjects=1)  # one window a bout, so two a class, far apart
    w = dataclasses.replace(w, y=np.array([0, 1, 2, 2]))
    parts = split(w, 0.2, how, seed=0)
    np.testing.assert_array_equal(np.sort(w.y[parts.train]), [0, 1, 2])
    np.testing.assert_array_equal(w.y[parts.test], [2])


def test_blocked_leaves_every_class_something_to_train_on():
    """Three overlapping windows are too few for a test window and a gap."""
    start, y = np.array([0, 8, 16, 300, 308, 600, 900]), np.array([0, 0, 0, 1, 1, 1, 1])
    zeros = np.zeros(7, dtype=np.int64)
    w = Windows(np.zeros((7, 1, 1, 16), np.float32), y, zeros, zeros, start, ("a",))
    for seed in range(5):
        parts = split(w, 0.3, "blocked", seed)
        assert set(w.y[parts.train]) == {0, 1} and set(w.y[parts.test]) == {1}


@pytest.mark.parametrize("how", ["shuffled", "blocked"])
def test_the_seed_decides(how):
    w = random_windows(1)
    first, again, other = (split(w, 0.2, how, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first.test, again.test)
    np.testing.assert_array_equal(first.train, again.train)
    assert not np.array_equal(first.test, other.test)


def made(rows, length=16, **more):
    """Windows from rows of (class, subject, line, start, recording)."""
    y, subject, line, start, recording = np.array(rows, dtype=np.int64).T
    names = tuple("abcdef"[: subject.max() + 1])
    return Windows(np.zeros((len(y), 1, 1, length), np.float32), y, subject, line, start, names, recording, **more)


def session(subject, recording, classes=3, each=6, line=None, begin=0, step=8):
    """Return a recording of several classes, one after the other, without a pause."""
    line = recording if line is None else line
    return [(i // each, subject, line, begin + step * i, recording) for i in range(classes * each)]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("sessions", "tested"), [(2, 1), (3, 1), (5, 1), (10, 2)])
def test_whole_recordings_go_apart_where_a_subject_has_several(seed, sessions, tested):
    """Of 5 sessions a fifth is one; of 2 or 3 the least that can be tested on is one. Nothing is dropped."""
    w = made([row for s in range(2) for k in range(sessions) for row in session(s, sessions * s + k)])
    parts = split(w, 0.2, "blocked", seed)
    assert not len(parts.dropped)
    for s in range(2):
        sides = [set(w.recording[part[w.subject[part] == s]]) for part in (parts.train, parts.test)]
        assert not sides[0] & sides[1] and len(sides[1]) == tested and len(sides[0]) == sessions - tested


@pytest.mark.parametrize("seed", range(8))
def test_recordings_of_a_class_each_go_apart_whole_as_near_to_the_share_as_they_can(seed):
    """Five trials of 4 windows a class: 4 of 20 are tested on, one trial of each class."""
    w = made([(c, 0, 5 * c + k, 8 * i, 5 * c + k) for c in range(4) for k in range(5) for i in range(4)])
    parts = split(w, 0.2, "blocked", seed)
    assert np.bincount(w.y[parts.test]).tolist() == [4, 4, 4, 4] and not len(parts.dropped)
    assert len(set(w.recording[parts.test])) == 4


@pytest.mark.parametrize("seed", range(8))
def test_a_class_of_one_recording_is_cut_within_it_and_the_others_are_not(seed):
    """Class 2 is in the last recording alone, 20 windows: 4 are tested on there, and the gap is 1 window = 3 starts."""
    rows = [row for k in range(4) for row in session(0, k, classes=2)]
    w = made(rows + [(2, 0, 9, 8 * i, 9) for i in range(20)])
    parts = split(w, 0.2, "blocked", seed)
    assert (w.y[parts.test] == 2).sum() == 4 and set(w.y[parts.dropped]) == {2}
    assert 3 <= len(parts.dropped) <= 6
    others = w.recording < 9
    assert len(set(w.recording[parts.test[others[parts.test]]])) == 1


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("second", [6 * 3 * 8 + 8, 6 * 3 * 8 + 8 + 15, 100])
def test_recordings_that_touch_or_overlap_in_time_are_one(seed, second):
    """Two files of one session: the second begins where the first ends, soon after, or before it ends."""
    w = made(session(0, 0, line=7) + session(0, 1, line=7, begin=second))
    parts = split(w, 0.2, "blocked", seed)
    assert len(parts.test)
    for test in parts.test:
        assert (abs(w.start[parts.train] - w.start[test]) >= 2 * 16).all()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("owner", [0, 1])
def test_copies_stay_on_one_side(seed, owner):
    """The same recording twice, of one subject or of two."""
    w = made(session(0, 0, each=20) + session(owner, 1, each=20, line=0) + session(1, 2, each=20))
    parts = split(w, 0.2, "blocked", seed)
    sides = [{(w.stretch[i], w.start[i]) for i in part} for part in parts]
    assert not sides[0] & sides[1]
    for i in parts.test:
        assert (abs(w.start[parts.train] - w.start[i])[w.stretch[parts.train] == w.stretch[i]] >= 32).all()
    first, second = ({w.start[i] for i in parts.test if w.recording[i] == k} for k in (0, 1))
    assert first == second and len(first) == 12  # 4 of 20 windows of three classes


@pytest.mark.parametrize("seed", range(8))
def test_the_gap_is_as_long_as_filters_reach(seed):
    w = made(session(0, 0, each=60), reach=75)
    parts = split(w, 0.2, "blocked", seed)
    assert len(parts.test)
    for test in parts.test:
        assert (abs(w.start[parts.train] - w.start[test]) - 16 >= 75).all()
    for dropped in parts.dropped:
        assert (abs(w.start[parts.test] - w.start[dropped]) - 16 < 75).any()


@pytest.mark.parametrize("seed", range(20))
def test_blocked_always_leaves_every_class_of_a_subject_something_to_train_on(seed):
    w = dataclasses.replace(random_windows(seed), reach=int(np.random.default_rng(seed).integers(0, 120)))
    parts = split(w, 0.3, "blocked", seed)
    for s in range(3):
        assert set(w.y[w.subject == s]) == set(w.y[parts.train][w.subject[parts.train] == s])


def test_loso_leaves_out_the_subject_whose_number_is_the_seed():
    w = windows(per_class=4)
    for seed in range(6):
        parts = split(w, 0.2, "loso", seed)
        assert set(w.subject[parts.test]) == {seed % 4} and set(w.subject[parts.train]) == {0, 1, 2, 3} - {seed % 4}
        assert len(parts.test) == 12 and not len(parts.dropped)


def test_loso_drops_what_others_have_copied():
    w = made(session(0, 0) + session(1, 1, line=0) + session(2, 2))
    parts = split(w, 0.2, "loso", 0)
    assert set(w.subject[parts.test]) == {0} and set(w.subject[parts.train]) == {2} and len(parts.dropped) == 18


def test_loso_needs_two_subjects():
    with pytest.raises(UserError, match="only one"):
        split(windows(subjects=1), 0.2, "loso", 0)


def test_given_is_given_and_what_touches_it_is_dropped():
    w = made(session(0, 0, line=0) + session(0, 1, line=0, begin=18 * 8 + 8) + session(0, 2))
    w = dataclasses.replace(w, test=w.recording == 1)
    parts = split(w, 0.2, "given", seed=5)
    np.testing.assert_array_equal(parts.test, np.flatnonzero(w.recording == 1))
    # recording 1 begins at 152, so of recording 0 the starts after 152 - 32 = 120 are too near: 128 and 136
    np.testing.assert_array_equal(w.start[parts.dropped], [128, 136])


@pytest.mark.parametrize(
    ("test", "text"), [(None, "no window is to be tested on"), (False, "no window is to be tested on"), (True, "all")]
)
def test_given_must_give_something_and_leave_something(test, text):
    w = made(session(0, 0))
    with pytest.raises(UserError, match=text):
        split(dataclasses.replace(w, test=None if test is None else np.full(18, test)), 0.2, "given", 0)
