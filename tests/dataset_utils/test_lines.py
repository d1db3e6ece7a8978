"""What lies on one line of time, and how far filters reach along it."""

import dataclasses

import numpy as np
import pytest

from dataset_utils.counts import digest_of
from dataset_utils.lines import Lines, reach, ringing
from dataset_utils.preprocessing import lowpass
from dataset_utils.recording import Preprocessing, Recording

RATE = 50.0


def recording(subject, begin=None, samples=500, seed=0):
    signals = np.random.default_rng(seed).normal(size=(samples, 2))
    time = None if begin is None else begin + np.arange(samples) / RATE
    return Recording(subject, signals, np.zeros(samples, int), time)


def places(*recordings):
    lines = Lines(Preprocessing(rate=RATE, window=128, overlap=0.5))
    return [lines.place(own, digest_of(own)) for own in recordings]


def test_recordings_without_a_clock_or_whose_clock_was_set_to_0_have_lines_of_their_own():
    (a, b, c, d) = places(*(recording("s", begin, seed=i) for i, begin in enumerate((None, None, 0.0, 8.38))))
    assert len({a.number, b.number, c.number, d.number}) == 4
    assert all(line.offset == 0 for line in (a, b, c, d))


def test_a_clock_that_goes_on_is_one_line_of_one_subject():
    parts = [recording("s", begin, seed=i) for i, begin in enumerate((0.0, 10.0, 600.0))]
    (a, b, c, other) = places(*parts, recording("t", 10.0, seed=9))
    assert a.number == b.number == c.number != other.number


def test_days_of_an_absolute_clock_are_one_line_however_far_apart():
    (a, b) = places(recording("s", 1.7e9, seed=1), recording("s", 1.7e9 + 86_400, seed=2))
    assert a.number == b.number


@pytest.mark.parametrize(("first", "second", "offset"), [(None, None, 0), (0.0, 0.0, 0), (0.0, 20.0, -1000)])
def test_a_copy_lies_where_its_original_lies_whoever_it_is_of(first, second, offset):
    (a, b) = places(recording("s", first), recording("t", second))
    assert (b.number, b.offset) == (a.number, offset)  # 20 s are 1,000 samples


def closed_form(cutoff):
    """Seconds after which the zero-phase impulse response stays below a thousandth of its peak.

    |H|² = 1 / (1 + (w/c)⁶), of which residues give
    h(t) = c/6 (exp(-c|t|) + exp(-c|t|/2) (cos(√3/2 c|t|) + √3 sin(√3/2 c|t|))).
    """
    t = np.linspace(0, 30, 300_001)
    root = np.sqrt(3) / 2
    h = np.exp(-t) + np.exp(-t / 2) * (np.cos(root * t) + 2 * root * np.sin(root * t))
    return t[np.flatnonzero(abs(h) >= 1e-3 * h[0])[-1]] / (2 * np.pi * cutoff)


@pytest.mark.parametrize(("cutoff", "rate"), [(0.3, 50.0), (0.3, 100.0), (1.0, 100.0), (0.05, 25.0)])
def test_ringing_is_that_of_the_butterworth_filter(cutoff, rate):
    # the digital filter is the analogue one but for the bending of frequencies, of order (cutoff / rate)²
    assert ringing(cutoff, rate) == pytest.approx(closed_form(cutoff) * rate, rel=2e-3, abs=1)


@pytest.mark.parametrize("cutoff", [0.3, 20.0, 24.5])
def test_beyond_the_ringing_a_sample_is_forgotten_and_within_it_is_not(cutoff):
    far = ringing(cutoff, RATE)
    impulse = np.zeros(40_001)
    impulse[20_000] = 1
    response = abs(lowpass(impulse, cutoff, RATE))
    assert response[20_000 + far + 1 :].max() < 1e-3 * response.max() <= response[20_000 + far]
    assert response[: 20_000 - far].max() < 1e-3 * response.max()


def test_reaches_add_up():
    none = Preprocessing(RATE, 128, 0.5, median=0, lowpass=0.0, gravity=0.0, max_gap=0.0)
    assert reach(none, RATE) == 0
    assert reach(dataclasses.replace(none, median=5), RATE) == 2  # two neighbours on either side
    assert reach(dataclasses.replace(none, max_gap=0.5), RATE) == 25  # half a second may be interpolated across
    both = dataclasses.replace(none, lowpass=20.0, gravity=0.3, median=5, max_gap=0.5)
    assert reach(both, RATE) == 2 + 25 + ringing(20.0, RATE) + ringing(0.3, RATE)
    # what was raised from 1 Hz: a spline carries 6 of its samples; the filter against aliases is 19 to either side
    assert reach(none, 1.0) == 300 + 20
    assert reach(dataclasses.replace(none, resample=True), RATE) == 6 + 20
