"""Windows lie where they should, with the right label and with their channels in order."""

import dataclasses

import numpy as np
import pytest

from dataset_utils import windows
from dataset_utils.counts import Tally
from dataset_utils.preprocessing import Stretch
from dataset_utils.recording import UNLABELLED, Preprocessing
from registry.text import natural


def cut(stretches, window, overlap=0.0, **others):
    return windows.cut(stretches, Preprocessing(rate=50.0, window=window, overlap=overlap, **others))


def stretch(labels, subject="1", channels=2):
    """Channel c holds 1000 c + time, so that every value tells where it belongs."""
    time = np.arange(len(labels), dtype=np.float32)[:, None]
    return Stretch(subject, time + 1000 * np.arange(channels, dtype=np.float32), np.asarray(labels), Tally("", subject))


def test_channels_are_transposed_not_reshaped():
    made = cut([stretch([0] * 20, channels=3)], window=8, overlap=0.5)
    assert made.x.shape == (4, 3, 1, 8) and made.x.dtype == np.float32 and made.x.flags.c_contiguous
    for w, start in enumerate([0, 4, 8, 12]):
        for c in range(3):
            np.testing.assert_array_equal(made.x[w, c, 0], 1000 * c + start + np.arange(8))
    np.testing.assert_array_equal(made.start, [0, 4, 8, 12])


def test_the_trap_would_be_seen():
    recording = stretch([0] * 8, channels=3).signals
    made = cut([stretch([0] * 8, channels=3)], window=8, overlap=0.0)
    assert not np.array_equal(recording.reshape(3, 1, 8), made.x[0])


def test_the_label_is_the_majority_and_the_lowest_on_a_tie():
    labels = [2, 2, 2, 1, 2, 1, 1, 2, 0, 2, 1, 0, 5, 4, 3, 3]
    made = cut([stretch(labels)], window=4, overlap=0.0)
    np.testing.assert_array_equal(made.y, [2, 1, 0, 3])
    assert made.y.dtype == np.int64


def test_a_window_with_one_unlabelled_sample_is_dropped():
    labels = np.zeros(20, dtype=int)
    labels[7] = UNLABELLED
    made = cut([stretch(labels)], window=4, overlap=0.5)
    np.testing.assert_array_equal(made.start, [0, 2, 8, 10, 12, 14, 16])


def test_the_end_of_a_stretch_is_dropped():
    made = cut([stretch([0] * 11), stretch([1] * 9)], window=4, overlap=0.0)
    np.testing.assert_array_equal(made.start, [0, 4, 0, 4])
    np.testing.assert_array_equal(made.stretch, [0, 0, 1, 1])


@pytest.mark.parametrize(("window", "overlap", "step"), [(100, 0.4, 60), (256, 0.5, 128), (10, 0.99, 1)])
def test_overlap(window, overlap, step):
    made = cut([stretch([0] * 600)], window, overlap)
    np.testing.assert_array_equal(np.diff(made.start), step)
    assert 600 - window - step < made.start[-1] <= 600 - window


def test_subjects_are_in_natural_order_and_share_no_stretch():
    pieces = [stretch([0] * 8, s) for s in ("s10", "s2", "s10", "s1")]
    made = cut(pieces, window=4, overlap=0.0)
    assert made.subjects == ("s1", "s2", "s10")
    np.testing.assert_array_equal(made.subject, [0, 0, 1, 1, 2, 2, 2, 2])
    np.testing.assert_array_equal(made.stretch, [0, 0, 1, 1, 2, 2, 3, 3])
    assert sorted(["a", "10", "9", "2b", "2a"], key=natural) == ["2a", "2b", "9", "10", "a"]


def test_no_window_at_all():
    assert cut([stretch([0] * 11), stretch([UNLABELLED] * 30)], window=12, overlap=0.5) is None


def test_what_is_dropped_and_how_pure_windows_are_is_counted():
    one = stretch([0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 1, 1, UNLABELLED, 1, 1, 1])
    made = cut([one], window=4)
    np.testing.assert_array_equal(made.start, [0, 4, 8])
    tally = one.tally
    assert (tally.windows, tally.unlabelled, tally.impure, tally.mixed) == (3, 1, 0, 2)
    assert tally.purity == 1 + 3 / 4 + 2 / 4
    two = stretch(one.labels)
    np.testing.assert_array_equal(cut([two], window=4, purity=0.75).start, [0, 4])
    assert (two.tally.windows, two.tally.unlabelled, two.tally.impure, two.tally.mixed) == (2, 1, 1, 1)


def test_windows_around_events():
    labels = np.full(100, UNLABELLED)
    labels[[1, 20, 23, 60, 95]] = [0, 1, 0, 2, 1]
    one = stretch(labels)
    made = cut([one], window=10, before=0.08)  # 4 samples at 50 Hz, then 6 from the event on
    np.testing.assert_array_equal(made.start, [16, 19, 56])  # 1 - 4 lies before the begin, 95 + 6 after the end
    np.testing.assert_array_equal(made.y, [1, 0, 2])
    np.testing.assert_array_equal(made.x[1, 0, 0], np.arange(19, 29))
    assert (one.tally.possible, one.tally.windows, one.tally.at_gaps) == (5, 3, 2)


def test_windows_of_several_files_are_joined():
    parts = [cut([stretch([c] * 12, subject)], window=4) for c, subject in enumerate(["s10", "s2", "s10"])]
    parts = [dataclasses.replace(part, x=part.x + c) for c, part in enumerate(parts)]
    made, copies = windows.joined(parts)
    assert copies == 0
    assert made.subjects == ("s2", "s10")
    np.testing.assert_array_equal(made.y, [1, 1, 1, 0, 0, 0, 2, 2, 2])
    np.testing.assert_array_equal(made.subject, [0] * 3 + [1] * 6)
    np.testing.assert_array_equal(made.start, [0, 4, 8] * 3)
    assert len(set(made.stretch[:3])) == 1 and len(set(made.stretch)) == 3
