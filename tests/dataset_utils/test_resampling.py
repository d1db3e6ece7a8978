"""What a lower rate can hold stays, what it cannot goes, lines stay lines, events stay single."""

import numpy as np
import pytest

from dataset_utils.recording import UNLABELLED, Preprocessing
from dataset_utils.resampling import at_places, resampled, without_aliases


def settings(rate, before=None):
    return Preprocessing(rate=rate, window=10, overlap=0.5, resample=True, before=before)


@pytest.mark.parametrize(("rate", "new"), [(100, 50), (700, 32), (51.2, 50), (64, 20)])
def test_frequencies_below_are_kept_and_those_above_are_not(rate, new):
    t = np.arange(int(20 * rate)) / rate
    inside = slice(int(5 * rate), -int(5 * rate))
    for share, kept in ((0.0, 1.0), (0.1, 1.0), (0.5, 1.0), (0.79, 1.0)):
        wave = np.cos(2 * np.pi * share * new / 2 * t)
        np.testing.assert_allclose(without_aliases(wave, rate, new)[inside], kept * wave[inside], atol=2e-3)
    for frequency in (0.5 * new * 1.01, min(new, rate / 2 * 0.99)):
        if frequency < rate / 2:
            assert abs(without_aliases(np.cos(2 * np.pi * frequency * t), rate, new)[inside]).max() < 2e-3


def test_a_line_stays_one_to_its_ends_and_a_higher_rate_takes_no_filter():
    line = 3.0 + 2.0 * np.arange(300)
    np.testing.assert_allclose(without_aliases(line, 100, 50), line, rtol=1e-9)
    np.testing.assert_allclose(without_aliases(line[:5], 100, 10), line[:5], rtol=1e-9)
    assert without_aliases(line, 50, 100) is line


def test_values_between_samples_lie_on_a_cubic():
    x = np.arange(20.0)
    places = np.array([0.0, 3.25, 18.9, 19.0])
    np.testing.assert_allclose(at_places(x**3 - 2 * x, places), places**3 - 2 * places, rtol=1e-9)
    np.testing.assert_array_equal(at_places(np.array([4.0]), np.zeros(2)), [4.0, 4.0])


@pytest.mark.parametrize("rate", [100.0, 25.0, 51.2])
def test_labels_are_those_of_the_nearest_sample_and_the_length_is_that_of_the_time(rate):
    n = int(12 * rate)
    labels = np.repeat([0, 1, 2], n // 3 + 1)[:n]
    values, marks = resampled([np.arange(n) / rate], labels, rate, settings(50.0))
    grid = np.arange(len(marks)) / 50
    np.testing.assert_allclose(values[0], grid, atol=1e-9)
    assert grid[-1] <= (n - 1) / rate < grid[-1] + 1 / 50
    np.testing.assert_array_equal(marks, labels[np.minimum(np.rint(grid * rate).astype(int), n - 1)])


@pytest.mark.parametrize("rate", [360.0, 20.0])
def test_each_event_stays_one(rate):
    labels = np.full(int(10 * rate), UNLABELLED)
    events = (np.array([0.5, 1.25, 4.0, 9.0]) * rate).astype(int)
    labels[events] = [1, 0, 2, 1]
    _, marks = resampled([np.zeros(len(labels))], labels, rate, settings(50.0, before=0.1))
    found = np.flatnonzero(marks != UNLABELLED)
    assert marks[found].tolist() == [1, 0, 2, 1]
    np.testing.assert_allclose(found / 50, events / rate, atol=0.01 + 1e-9)
