"""Gaps are cut or bridged as promised, and the filters do to known signals what theory says."""

import dataclasses

import numpy as np
import pytest

from dataset_utils.counts import Tally
from dataset_utils.preprocessing import channel_names, check, check_recording, lowpass, stretches
from dataset_utils.recording import UNLABELLED, Preprocessing, Recording
from registry.errors import UserError

RAW = Preprocessing(rate=50.0, window=10, overlap=0.5, median=0, lowpass=0.0, gravity=0.0, max_gap=0.1)  # 5 samples


def run(signals, settings=RAW, labels=None, time=None, channels=None, acceleration=(), num_classes=3):
    signals = np.asarray(signals, dtype=float)
    labels = np.zeros(len(signals), dtype=int) if labels is None else labels
    channels = channels or tuple("abcdef"[: signals.shape[1]])
    recording = Recording("7", signals, labels, time)
    check_recording(recording, channels, num_classes)
    return list(stretches(recording, channels, acceleration, settings, Tally.of(recording)))


def ramp(samples=100, channels=1):
    return np.arange(samples, dtype=float)[:, None] * np.arange(1, channels + 1)


def test_an_unbroken_recording_is_one_stretch_unchanged():
    labels = np.arange(100) % 3
    (stretch,) = run(ramp(), labels=labels)
    assert stretch.signals.dtype == np.float32 and stretch.labels.dtype == np.int64
    np.testing.assert_array_equal(stretch.signals, ramp())
    np.testing.assert_array_equal(stretch.labels, labels)


def test_a_short_gap_is_interpolated_and_a_longer_one_cuts():
    signals = ramp(channels=2)
    signals[20:25, 1] = np.nan  # 5 samples = 0.1 s: bridged
    signals[60:66, 0] = np.nan  # 6 samples: cut
    first, second = run(signals, labels=np.arange(100) % 3)
    np.testing.assert_allclose(first.signals, ramp(channels=2)[:60])
    np.testing.assert_array_equal(second.signals, ramp(channels=2)[66:])
    np.testing.assert_array_equal(second.labels, np.arange(66, 100) % 3)


def test_missing_values_at_the_ends_are_cut_off_not_extrapolated():
    signals = ramp(channels=2)
    signals[:3, 0] = np.nan
    signals[-2:, 1] = np.nan
    (stretch,) = run(signals)
    np.testing.assert_array_equal(stretch.signals, ramp(channels=2)[3:-2])


def test_sparse_channels_of_different_phase_are_bridged():
    signals = np.full((101, 2), np.nan)
    signals[::4, 0] = np.arange(0, 101, 4)
    signals[2::4, 1] = np.arange(2, 101, 4)
    (stretch,) = run(signals)
    np.testing.assert_allclose(stretch.signals, np.stack([np.arange(2, 99)] * 2, axis=1))


def test_a_recording_that_misses_a_channel_gives_nothing():
    signals = ramp(channels=2)
    signals[:, 1] = np.nan
    assert run(signals) == []


def test_time_that_jumps_cuts():
    time = np.arange(100) / 50
    time[40:] += 0.2
    assert [len(s.labels) for s in run(ramp(), time=time)] == [40, 60]


def test_a_stretch_shorter_than_a_window_is_dropped():
    time = np.arange(100) / 50
    time[9:] += 1.0
    assert [len(s.labels) for s in run(ramp(), time=time)] == [91]


def test_median_removes_a_spike_and_keeps_a_step():
    signals = np.zeros((100, 1))
    signals[50:] = 1.0
    signals[20] = 9.0
    (stretch,) = run(signals, dataclasses.replace(RAW, median=3))
    np.testing.assert_array_equal(stretch.signals[:, 0], (np.arange(100) >= 50).astype(float))


def test_lowpass_keeps_low_and_removes_high_frequencies_without_delay():
    t = np.arange(1000) / 100
    low, high = np.sin(2 * np.pi * 2 * t), np.sin(2 * np.pi * 40 * t)
    filtered = lowpass(low + high, 20.0, 100.0)
    # two passes of |H|² = 1 / (1 + (tan(pi f/fs) / tan(pi fc/fs))^6)
    kept = 1 / (1 + (np.tan(np.pi * 0.4) / np.tan(np.pi * 0.2)) ** 6)
    assert kept < 0.01
    np.testing.assert_allclose(filtered[100:-100], low[100:-100], atol=kept + 1e-3)


def test_gravity_is_separated_and_appended():
    t = np.arange(3000) / 50
    body = np.sin(2 * np.pi * 2 * t)
    signals = np.stack([body + 0.8, 5 * t, body - 0.6], axis=1)
    names, acceleration = ("x", "gyro", "y"), ("y", "x")
    (stretch,) = run(signals, dataclasses.replace(RAW, gravity=0.3), channels=names, acceleration=acceleration)
    assert channel_names(names, acceleration, 0.3) == ("body_x", "gyro", "body_y", "gravity_x", "gravity_y")
    assert channel_names(names, acceleration, 0.0) == names
    inside = slice(150, -150)
    np.testing.assert_allclose(stretch.signals[inside, 3], 0.8, atol=0.01)
    np.testing.assert_allclose(stretch.signals[inside, 4], -0.6, atol=0.01)
    np.testing.assert_allclose(stretch.signals[:, 0] + stretch.signals[:, 3], signals[:, 0], atol=1e-6)
    np.testing.assert_array_equal(stretch.signals[:, 1], signals[:, 1].astype(np.float32))


def test_gravity_settles_at_the_ends():
    """Whatever a movement of 1 g starts with; SciPy's own padding (odd, short) is off by up to 1.3 g here."""
    t = np.arange(1000) / 50
    for phase in np.linspace(0, 2 * np.pi, 24):
        gravity = lowpass(0.8 + np.sin(2 * np.pi * 2 * t + phase), 0.3, 50.0)
        np.testing.assert_allclose(gravity, 0.8, atol=0.11)


@pytest.mark.parametrize(("name", "flag"), [("lowpass", "--lowpass"), ("gravity", "--gravity")])
def test_a_cutoff_at_half_the_rate_is_refused(name, flag):
    check(dataclasses.replace(RAW, **{name: 24.9}))
    with pytest.raises(UserError, match=f"{flag} 25 Hz must lie below 25 Hz"):
        check(dataclasses.replace(RAW, **{name: 25.0}))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"signals": ramp(channels=2)}, "signals of shape"),
        ({"labels": np.zeros(99, dtype=int)}, "100 samples need as many"),
        ({"labels": np.zeros(100)}, "whole-number labels"),
        ({"labels": np.full(100, 3)}, "3 to 3, but there are 3 classes"),
        ({"labels": np.full(100, UNLABELLED - 1)}, "labels -2"),
        ({"signals": np.where(ramp() == 5, np.inf, ramp())}, "infinite values in channel a"),
        ({"time": np.full(100, np.nan)}, "finite time"),
        ({"time": np.arange(99)}, "finite time"),
    ],
)
def test_a_recording_that_does_not_fit_is_refused(change, text):
    arguments = {"signals": ramp(), "channels": ("a",), **change}
    with pytest.raises(UserError, match=f"subject 7: .*{text}"):
        run(**arguments)
