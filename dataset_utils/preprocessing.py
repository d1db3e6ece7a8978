"""Preprocessing of a recording into filtered stretches without gaps: median, low-pass, gravity (paper §4.2.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from dataset_utils import limits, time_axis
from dataset_utils.counts import Tally
from dataset_utils.recording import UNLABELLED, Preprocessing, Recording
from dataset_utils.resampling import resampled
from registry.errors import UserError
from registry.text import NAMES, can_be_shown, shown

FARTHEST = 2.0**62  # position on the line of time, samples; those of larger ones are no longer told apart
ORDER = 3  # order of the Butterworth filters


class Stretch(NamedTuple):
    """Filtered samples that follow each other without a gap.

    Attributes:
        subject: name of the subject.
        signals: (samples, channels), float32, finite.
        labels: (samples,), int64, class index or UNLABELLED; class index + `classes` for a sample to be tested on.
        tally: tally of the recording.
        start: position of the first sample on the line of time, by the recording's clock where there is one.
        line: number of the line of time; None: a line of its own (see `lines.Lines`).
        recording: number of the recording.
        classes: number of classes.
    """

    subject: str
    signals: np.ndarray
    labels: np.ndarray
    tally: Tally
    start: int = 0
    line: int | None = None
    recording: int = 0
    classes: int = 1 << 32


def check(settings: Preprocessing) -> None:
    """Raise UserError for a cutoff at or above half of the sampling rate, or a median filter that takes for ever."""
    if settings.median > limits.MEDIAN:
        raise UserError(f"--median {shown(settings.median)}: at most {limits.MEDIAN} samples")
    for flag, cutoff in (("--lowpass", settings.lowpass), ("--gravity", settings.gravity)):
        if cutoff >= settings.rate / 2:
            raise UserError(
                f"{flag} {cutoff:g} Hz must lie below {settings.rate / 2:g} Hz, half of the sampling rate; "
                "0 leaves the filter out"
            )


def channel_names(channels: tuple[str, ...], acceleration: tuple[str, ...], gravity: float) -> tuple[str, ...]:
    """Return the channels after filtering: `body_X` in place of acceleration X, every `gravity_X` at the end."""
    if not gravity:
        return channels
    body = tuple(f"body_{name}" if name in acceleration else name for name in channels)
    return body + tuple(f"gravity_{name}" for name in channels if name in acceleration)


def stretches(
    recording: Recording,
    channels: tuple[str, ...],
    acceleration: tuple[str, ...],
    settings: Preprocessing,
    tally: Tally,
) -> Iterator[Stretch]:
    """Cut a recording at gaps, resample it where asked, then filter each stretch.

    The recording is first put onto an even time axis (see `time_axis.even`), and cut where any channel lacks more than
    `max_gap` seconds. Shorter missing values are interpolated linearly; those at an end are cut off, never
    extrapolated. A recording merged from streams is cut wherever one of them has no value. A stretch shorter than a
    window is dropped.

    Args:
        recording: has passed `check_recording`.
        channels: names of the recording's channels.
        acceleration: channels that are split into body and gravity.
        settings: preprocessing of the data set.
        tally: receives the counts of what is done.

    Yields:
        stretches whose channels are `channel_names(channels, acceleration, settings.gravity)`.

    Raises:
        UserError: the times do not fit the sampling rate.
    """
    if recording.streams:  # each has been interpolated as its own `max_gap` says
        settings = dataclasses.replace(settings, max_gap=0.0)
    split = settings.gravity > 0
    columns = [(i, split and name in acceleration) for i, name in enumerate(channels)]
    for piece in time_axis.even(recording, settings, tally):
        need = settings.window * piece.rate / settings.rate if settings.resample else settings.window
        whole = [(a, b) for a, b in complete(piece.signals, piece.rate, settings) if b - a >= need]
        if not whole:
            continue
        signals, labels = piece.signals, piece.labels
        filled = {i: interpolated(signals[:, i]) for i, _ in columns if np.isnan(signals[:, i]).any()}
        for a, b in whole:
            values = [filled[i][a:b] if i in filled else signals[a:b, i] for i, _ in columns]
            marks = labels[a:b]
            if settings.resample and piece.rate != settings.rate:
                values, marks = resampled(values, marks, piece.rate, settings)
            seconds = piece.first + a / piece.rate
            if not abs(seconds * settings.rate) < FARTHEST:
                raise UserError(f"{recording.where}: a time of {seconds:g} s; correct the times or their unit")
            start = round(seconds * settings.rate)
            clean = _filtered(values, columns, settings)
            yield Stretch(recording.subject, clean, marks, tally, start)


def _filtered(values: list[np.ndarray], columns: list[tuple[int, bool]], settings: Preprocessing) -> np.ndarray:
    """Return channels (samples,) as (samples, channels), float32, smoothed and split into body and gravity."""
    clean = np.empty((len(values[0]), len(columns) + sum(two for _, two in columns)), dtype=np.float32)
    last = len(columns)
    for i, two in columns:
        value = _smoothed(values[i], settings)
        if two:
            gravity = lowpass(value, settings.gravity, settings.rate)
            clean[:, last] = gravity
            value = value - gravity
        clean[:, i] = value
        last += two
    return clean


def lowpass(signal: np.ndarray, cutoff: float, rate: float) -> np.ndarray:
    """Apply a zero-phase 3rd-order Butterworth low-pass filter.

    The ends are padded by mirroring over three periods of the cutoff. Mirroring is even, so that one noisy sample at an
    end does not set the level of the padding; three periods are needed because gravity at 0.3 Hz settles in seconds.

    Args:
        signal: (samples,), at least 2.
        cutoff: Hz, below `rate` / 2.
        rate: sampling rate, Hz.
    """
    from scipy.signal import butter, sosfiltfilt

    sections = butter(ORDER, cutoff, fs=rate, output="sos")
    padding = min(int(np.ceil(3 * rate / cutoff)), len(signal) - 1)
    filtered: np.ndarray = sosfiltfilt(sections, signal, padtype="even", padlen=padding)
    return filtered


def _smoothed(signal: np.ndarray, settings: Preprocessing) -> np.ndarray:
    """Apply the median filter, then the low-pass filter, each only where it is set."""
    if settings.median > 1:
        from scipy.ndimage import median_filter

        signal = median_filter(signal, settings.median, mode="nearest")
    return lowpass(signal, settings.lowpass, settings.rate) if settings.lowpass else signal


def interpolated(column: np.ndarray) -> np.ndarray:
    """Return a float64 copy with NaNs interpolated linearly between their neighbours."""
    column = np.array(column, dtype=np.float64)
    missing = np.isnan(column)
    if missing.any():
        valid = np.flatnonzero(~missing)
        column[missing] = np.interp(np.flatnonzero(missing), valid, column[valid])
    return column


def complete(signals: np.ndarray, rate: float, settings: Preprocessing) -> list[tuple[int, int]]:
    """Return the ranges [a, b) in which missing values have neighbours near enough to be interpolated."""
    longest = int(settings.max_gap * rate + 1e-6)
    usable = np.ones(len(signals), dtype=bool)
    for i in range(signals.shape[1]):
        for a, b in _runs(np.isnan(signals[:, i])):
            if b - a > longest or a == 0 or b == len(signals):
                usable[a:b] = False
    return _runs(usable)


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """Return the ranges [a, b) in which `mask` is true."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def check_recording(recording: Recording, channels: tuple[str, ...], num_classes: int) -> None:
    """Raise UserError for a recording that does not fit its data set's description or holds an infinite value."""
    signals, labels, time = recording.signals, np.asarray(recording.labels), recording.time
    where = recording.where
    if not can_be_shown(recording.subject):
        raise UserError(f"{where}: {shown(repr(recording.subject))} cannot be the name of a subject: {NAMES}")
    if recording.rate is not None and not 0 < recording.rate <= limits.RATE:
        raise UserError(
            f"{where}: states a rate of {recording.rate:g} Hz; it must lie above 0, at most {limits.RATE:g}"
        )
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
