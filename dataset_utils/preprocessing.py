"""From a recording to clean, continuous stretches: gaps, median, low-pass, gravity (paper §4.2.1)."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from dataset_utils.recording import UNLABELLED, Preprocessing, Recording
from registry.errors import UserError

ORDER = 3  # of the Butterworth filters


class Stretch(NamedTuple):
    """Filtered samples that follow each other without a gap.

    Attributes:
        subject: whose they are.
        signals: (samples, channels), float32, finite.
        labels: (samples,), int64, class index or UNLABELLED.
        start: its first sample on its line of time: by the recording's clock where there is one.
        line: which line of time it lies on; None: one of its own (see `lines.Lines`).
        recording: number of its recording.
        test: see `Recording.test`.
    """

    subject: str
    signals: np.ndarray
    labels: np.ndarray
    start: int = 0
    line: int | None = None
    recording: int = 0
    test: bool = False


def check(settings: Preprocessing) -> None:
    """Raises UserError for a cutoff at or above half of the sampling rate."""
    for flag, cutoff in (("--lowpass", settings.lowpass), ("--gravity", settings.gravity)):
        if cutoff >= settings.rate / 2:
            raise UserError(
                f"{flag} {cutoff:g} Hz must lie below {settings.rate / 2:g} Hz, half of the sampling rate; "
                "0 leaves the filter out"
            )


def channel_names(channels: tuple[str, ...], acceleration: tuple[str, ...], gravity: float) -> tuple[str, ...]:
    """The channels after filtering: `body_X` in the place of acceleration X, every `gravity_X` at the end."""
    if not gravity:
        return channels
    body = tuple(f"body_{name}" if name in acceleration else name for name in channels)
    return body + tuple(f"gravity_{name}" for name in channels if name in acceleration)


def stretches(
    recording: Recording,
    channels: tuple[str, ...],
    acceleration: tuple[str, ...],
    num_classes: int,
    settings: Preprocessing,
) -> Iterator[Stretch]:
    """Cut a recording where it is broken, then filter each continuous stretch.

    It is cut where time jumps by more than `max_gap` seconds or runs backwards, and where any channel misses
    more than `max_gap` seconds. Shorter missing values are interpolated linearly; those at an end are cut
    off, never extrapolated. Shorter jumps of time are left as they are. A stretch shorter than a window is
    dropped.

    Args:
        channels: names of the recording's channels.
        acceleration: those of them that are split into body and gravity.
        num_classes: labels lie in [0, num_classes) or are UNLABELLED.

    Yields:
        stretches whose channels are `channel_names(channels, acceleration, settings.gravity)`.

    Raises:
        UserError: the recording does not fit its data set's description, or holds an infinite value.
    """
    _check_recording(recording, channels, num_classes)
    window, split = settings.window, settings.gravity > 0
    labels = np.asarray(recording.labels, dtype=np.int64)
    columns = [(i, split and name in acceleration) for i, name in enumerate(channels)]
    for begin, end in _unbroken(recording.time, len(labels), settings):
        signals = recording.signals[begin:end]
        whole = [(a, b) for a, b in _complete(signals, settings) if b - a >= window]
        if not whole:
            continue
        clean = np.empty((end - begin, len(channels) + sum(two for _, two in columns)), dtype=np.float32)
        last = len(channels)
        for i, two in columns:
            column = _interpolated(signals[:, i])
            for a, b in whole:
                value = _smoothed(column[a:b], settings)
                if two:
                    gravity = lowpass(value, settings.gravity, settings.rate)
                    clean[a:b, last] = gravity
                    value = value - gravity
                clean[a:b, i] = value
            last += two
        for a, b in whole:
            start = begin + a if recording.time is None else round(float(recording.time[begin + a]) * settings.rate)
            yield Stretch(recording.subject, clean[a:b], labels[begin + a : begin + b], start, test=recording.test)


def lowpass(signal: np.ndarray, cutoff: float, rate: float) -> np.ndarray:
    """Zero-phase 3rd-order Butterworth low-pass filter.

    The ends are padded by mirroring over three periods of the cutoff: mirrored evenly, so that one noisy sample at
    an end does not become the level of the padding, and so long because gravity at 0.3 Hz settles in seconds.

    Args:
        signal: (samples,), at least 2.
        cutoff: Hz, below `rate` / 2.
        rate: Hz.
    """
    from scipy.signal import butter, sosfiltfilt

    sections = butter(ORDER, cutoff, fs=rate, output="sos")
    padding = min(int(np.ceil(3 * rate / cutoff)), len(signal) - 1)
    return sosfiltfilt(sections, signal, padtype="even", padlen=padding)


def _smoothed(signal: np.ndarray, settings: Preprocessing) -> np.ndarray:
    """Median filter, then low-pass, each only where it is set."""
    if settings.median > 1:
        from scipy.ndimage import median_filter

        signal = median_filter(signal, settings.median, mode="nearest")
    return lowpass(signal, settings.lowpass, settings.rate) if settings.lowpass else signal


def _interpolated(column: np.ndarray) -> np.ndarray:
    """float64 copy whose NaNs lie on the line between their neighbours."""
    column = np.array(column, dtype=np.float64)
    missing = np.isnan(column)
    if missing.any():
        valid = np.flatnonzero(~missing)
        column[missing] = np.interp(np.flatnonzero(missing), valid, column[valid])
    return column


def _unbroken(time: np.ndarray | None, samples: int, settings: Preprocessing) -> list[tuple[int, int]]:
    """Ranges [begin, end) without a jump of time."""
    if time is None:
        return [(0, samples)]
    step = np.diff(time)
    cuts = np.flatnonzero((step > max(settings.max_gap, 1.5 / settings.rate)) | (step < 0)) + 1
    edges = [0, *cuts.tolist(), samples]
    return list(pairwise(edges))


def _complete(signals: np.ndarray, settings: Preprocessing) -> list[tuple[int, int]]:
    """Ranges [a, b) in which every missing value has a neighbour on either side and near enough."""
    longest = int(settings.max_gap * settings.rate + 1e-6)
    usable = np.ones(len(signals), dtype=bool)
    for i in range(signals.shape[1]):
        for a, b in _runs(np.isnan(signals[:, i])):
            if b - a > longest or a == 0 or b == len(signals):
                usable[a:b] = False
    return _runs(usable)


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Ranges [a, b) in which `mask` is true."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _check_recording(recording: Recording, channels: tuple[str, ...], num_classes: int) -> None:
    signals, labels, time = recording.signals, np.asarray(recording.labels), recording.time
    where = f"subject {recording.subject}"
    if signals.ndim != 2 or signals.shape[1] != len(channels):
        raise UserError(f"{where}: signals of shape {signals.shape}, but {len(channels)} channels are described")
    if labels.shape != signals.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"{where}: {len(signals)} samples need as many whole-number labels, not {labels.shape}")
    if labels.size and not UNLABELLED <= labels.min() <= labels.max() < num_classes:
        raise UserError(f"{where}: labels {labels.min()} to {labels.max()}, but there are {num_classes} classes")
    infinite = [name for i, name in enumerate(channels) if np.isinf(signals[:, i]).any()]
    if infinite:
        raise UserError(f"{where}: infinite values in channel {infinite[0]}; write NaN where a value is missing")
    if time is not None and (np.shape(time) != labels.shape or not np.isfinite(time).all()):
        raise UserError(f"{where}: every sample needs a finite time in seconds")
