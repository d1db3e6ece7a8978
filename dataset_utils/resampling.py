"""Resampling without aliasing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dataset_utils.recording import UNLABELLED, Preprocessing

ATTENUATION = 60.0  # dB
PASSED = 0.8
"""Share of half the new rate that passes the filter unchanged."""


SPLINE = 6
"""Samples over which a cubic spline spreads a value: the weight falls by 2 - √3 with each, to 4e-4 after 6."""


def resampled(
    values: Sequence[np.ndarray], labels: np.ndarray, rate: float, settings: Preprocessing
) -> tuple[list[np.ndarray], np.ndarray]:
    """Resample channels (samples,) and labels from `rate` to `settings.rate`.

    A new sample has the label of the nearest old one; where they mark events, each event moves to the nearest new one.
    """
    step = rate / settings.rate
    places = np.arange(int((len(labels) - 1) / step + 1e-6) + 1) * step
    if settings.before is None:
        marks = labels[np.minimum(np.rint(places).astype(np.int64), len(labels) - 1)]
    else:
        events = np.flatnonzero(labels != UNLABELLED)
        marks = np.full(len(places), UNLABELLED, dtype=np.int64)
        marks[np.minimum(np.rint(events / step).astype(np.int64), len(places) - 1)] = labels[events]
    return [at_places(without_aliases(value, rate, settings.rate), places) for value in values], marks


def without_aliases(signal: np.ndarray, rate: float, new: float) -> np.ndarray:
    """Remove from a finite signal (samples,) at `rate` Hz the frequencies that a lower rate `new` cannot represent.

    A linear-phase FIR filter (Kaiser window) without delay passes frequencies up to 0.8 of half the new rate to 0.1 %
    and attenuates those above half the new rate to 0.1 %. The ends are continued point-symmetrically. For a higher
    rate the signal is returned as it is.
    """
    if new >= rate * 0.999 or len(signal) < 2:
        return signal
    from scipy.signal import firwin, kaiserord, oaconvolve

    taps, beta = kaiserord(ATTENUATION, (1 - PASSED) * new / rate)
    taps |= 1  # odd, so that the delay is whole samples
    weights = firwin(taps, (1 + PASSED) / 2 * new / 2, window=("kaiser", beta), fs=rate)
    padded = np.pad(np.asarray(signal, dtype=np.float64), taps // 2, mode="reflect", reflect_type="odd")
    filtered: np.ndarray = oaconvolve(padded, weights, mode="valid")
    return filtered


def reach(raised: float) -> int:
    """Return how many samples at the new rate, to either side of a sample, influence it in resampling.

    This is half of the filter against aliases, whose length in new samples is the same for any two rates but for one
    sample, and `SPLINE` of the old samples.

    Args:
        raised: new samples for each old one where the rate is raised; else 1.
    """
    from scipy.signal import kaiserord

    ratio = 1e-3
    taps, _ = kaiserord(ATTENUATION, (1 - PASSED) * ratio)
    return int(np.ceil(taps / 2 * ratio)) + 1 + int(np.ceil(SPLINE * max(1.0, raised)))


def at_places(signal: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Interpolate a finite signal (samples,) at fractional sample numbers by a cubic spline."""
    if len(signal) < 2:
        return np.repeat(signal, len(places))
    from scipy.interpolate import CubicSpline

    values: np.ndarray = CubicSpline(np.arange(len(signal)), np.asarray(signal, dtype=np.float64))(places)
    return values
