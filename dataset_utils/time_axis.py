"""Conversion of samples with times to samples on an even grid, checked against the stated sampling rate."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from dataset_utils.counts import Tally
from dataset_utils.recording import UNLABELLED, Preprocessing, Recording
from registry.errors import UserError

UNITS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
MISTAKEN = {"minutes": 60.0, "hours": 3600.0, "days": 86400.0}
"""Units that are not supported, for messages."""
TOLERANCE = 0.05
"""Largest relative difference of measured and stated rate: devices of nominal 50 Hz that give 48 or 52 are common."""
REMARKABLE = 0.01
"""Relative difference above which it is reported."""
FARTHEST = 20.0
"""Largest ratio of rates in resampling: a larger one means a wrong unit rather than another device."""
FEWEST = 8
"""Fewest rows by which a rate is measured."""
FEW = 0.01
"""Largest share of irregular rows that is treated as an exception."""


class Piece(NamedTuple):
    """Samples at an even rate.

    Attributes:
        signals: (samples, channels), float; NaN where a value is missing.
        labels: (samples,), class index or UNLABELLED.
        rate: Hz.
        first: time of the first sample, seconds.
    """

    signals: np.ndarray
    labels: np.ndarray
    rate: float
    first: float = 0.0


def even(recording: Recording, settings: Preprocessing, tally: Tally) -> Iterator[Piece]:
    """Put a recording onto an even time axis, cut where its clock restarts and at gaps longer than `max_gap`.

    Rows out of order are sorted. Rows that repeat another one are dropped; rows that share a time and differ are
    averaged or an error (`settings.repeated`). Where rows are missing for at most `max_gap` seconds, samples of NaN
    are inserted, to be interpolated later. If times jitter by less than half a step, the samples are left as they are;
    if by more, the signals are interpolated onto an even grid.

    Args:
        recording: the recording.
        settings: preprocessing of the data set.
        tally: receives the counts of what is done.

    Raises:
        UserError: the times do not fit the stated rate, or rows share times.
    """
    signals, labels = recording.signals, np.asarray(recording.labels, dtype=np.int64)
    if recording.time is None:
        stated = recording.rate or settings.recorded or settings.rate
        _check_rate(recording.where, stated, settings, "it is stated in the file; correct 'rate'")
        tally.possible += _windows(len(labels), stated, settings)
        yield Piece(signals, labels, stated, recording.begins or 0.0)
        return
    tally.timed = True
    if not len(labels):
        return
    time = np.asarray(recording.time, dtype=np.float64)
    begin = time[0]
    time = time - begin
    unit = recording.unit or likely_unit(time, settings)
    begin *= UNITS[unit]
    if recording.unit is None and unit != "s":
        tally.unit = NAMES[unit]
    time = time * UNITS[unit]
    for rows in _passes(time, signals, labels, settings, tally):
        clock, part, marks = time[rows], signals[rows], labels[rows]
        clock, part, marks = _unrepeated(recording.where, clock, part, marks, settings, tally)
        rate = _rate_of(clock, settings)
        if rate is None or len(clock) < FEWEST:
            yield Piece(part, marks, settings.rate, begin + float(clock[0]))
            continue
        if tally.rate is None or len(clock) > tally.rows / 2:
            tally.rate = rate
        _check_rate(recording.where, rate, settings, _hint(rate, recording.unit, settings))
        tally.odd_rate |= not settings.resample and abs(rate / settings.rate - 1) > REMARKABLE
        samples = 0
        edges = [0, *(np.flatnonzero(_is_gap(np.diff(clock) * rate, rate, settings)) + 1).tolist(), len(clock)]
        tally.gaps += len(edges) - 2
        for a, b in pairwise(edges):
            piece = _placed(clock[a:b], part[a:b], marks[a:b], rate, settings, tally)
            samples += len(piece.labels)
            yield piece._replace(first=begin + float(clock[a]))
        tally.possible += _windows(samples, rate, settings)


def begins(recording: Recording, settings: Preprocessing) -> float | None:
    """Return the time at which a recording begins on its clock, seconds; None where it has no clock."""
    if recording.time is None or not len(recording.time):
        return recording.begins
    time = np.asarray(recording.time, dtype=np.float64)
    unit = recording.unit or likely_unit(time - time[0], settings)
    return float(time.min()) * UNITS[unit]


def measured(time: np.ndarray, longest: float = 1.5) -> float | None:
    """Measure the sampling rate of times in ascending order: 1 / mean of the steps near the median step.

    The mean is used because the median of times rounded to milliseconds is off by up to half a millisecond.

    Args:
        time: (rows,), times in any unit.
        longest: steps of more than this many median steps count as gaps.

    Returns:
        the rate per unit of `time`, or None where no two times differ.
    """
    steps = np.diff(time)
    steps = steps[steps > 0]
    if not len(steps):
        return None
    middle = np.median(steps)
    near = steps[(steps > 0.4 * middle) & (steps < longest * middle)]  # none if steps are far from each other
    return float(1 / near.mean()) if len(near) else None


def _line(time: np.ndarray) -> float | None:
    """Return the rate of times that all lie within half a step of an even clock; else None."""
    if len(time) < FEWEST or time[-1] <= time[0]:
        return None
    place = np.arange(len(time)) - (len(time) - 1) / 2
    line = place @ (time - time.mean()) / (place @ place) * place  # by least squares, as the ends jitter, too
    rate = 1 / (line[1] - line[0])
    return float(rate) if np.ptp(time - line) * rate < 1 else None


def _rate_of(time: np.ndarray, settings: Preprocessing, unit: float = 1.0) -> float | None:
    """Return the measured rate, Hz, of times in units of `unit` seconds.

    A step twice as long as most is a missing row, or comes from rounding the times of a rate such as 700 Hz to
    milliseconds; the reading that fits the stated rate is taken.
    """
    rates = [_line(time), measured(time), measured(time, 2.1)]
    rates = [rate / unit for rate in rates if rate is not None]
    return next((rate for rate in rates if _fits(rate, settings)), rates[0] if rates else None)


def _fits(rate: float | None, settings: Preprocessing) -> bool:
    """Return whether a measured rate fits that of `settings`."""
    if rate is None:
        return True
    if settings.resample:
        return 1 / FARTHEST <= rate / settings.rate <= FARTHEST
    return abs(rate / settings.rate - 1) <= TOLERANCE


def likely_unit(time: np.ndarray, settings: Preprocessing) -> str:
    """Return the unit in which the times fit the rate; 's' where none does: the check of the rate reports it."""
    for clock in (time, np.unique(time)):
        for unit, seconds in UNITS.items():
            rate = _rate_of(clock, settings, seconds)
            if rate is not None and _fits(rate, settings):
                return unit
    return "s"


def _hint(rate: float, unit: str | None, settings: Preprocessing) -> str:
    """Return the likely mistake behind a rate that does not fit, measured with times in `unit` (None: seconds)."""
    used = UNITS[unit or "s"]
    for name, seconds in {**MISTAKEN, **{NAMES[other]: UNITS[other] for other in UNITS}}.items():
        if seconds != used and abs(rate * used / seconds / settings.rate - 1) <= TOLERANCE:
            return f"are its times in {name}?"
    return "correct 'rate', or bring all recordings to one rate with 'resample'"


def _check_rate(where: str, rate: float, settings: Preprocessing, hint: str) -> None:
    if not _fits(rate, settings):
        stated = "to be resampled to" if settings.resample else "but the rate is said to be"
        raise UserError(f"{where}: measured rate {rate:.4g} Hz, {stated} {settings.rate:g} Hz; {hint}")


def _windows(samples: int, rate: float, settings: Preprocessing) -> int:
    """Return the number of windows without gaps; 0 for windows around events, which are counted when cut."""
    if settings.before is not None:
        return 0
    samples = int((samples - 1) * settings.rate / rate + 1e-6) + 1 if settings.resample else samples
    return max(0, (samples - settings.window) // step_of(settings.window, settings.overlap) + 1)


def step_of(window: int, overlap: float) -> int:
    """Return the samples from the start of a window to the start of the next."""
    return max(1, round(window * (1 - overlap)))


def _is_gap(steps: np.ndarray, rate: float, settings: Preprocessing) -> np.ndarray:
    """Return which steps, in samples, are too long to be interpolated."""
    longest = int(settings.max_gap * rate + 1e-6)
    gaps: np.ndarray = (np.rint(steps) - 1 > longest) & (steps > 1.5)
    return gaps


def _passes(
    time: np.ndarray, signals: np.ndarray, labels: np.ndarray, settings: Preprocessing, tally: Tally
) -> list[np.ndarray | slice]:
    """Return the rows in order of time: all of them, or one run for each part of a recording whose clock restarts."""
    back = np.flatnonzero(np.diff(time) < 0) + 1
    if not len(back):
        return [slice(None)]
    order = np.argsort(time, kind="stable")
    if _is_disorder(time, signals, labels, order, settings):
        tally.unordered += int(np.count_nonzero(time < np.maximum.accumulate(time)))
        return [order]
    tally.restarts += len(back)
    return [slice(a, b) for a, b in pairwise([0, *back.tolist(), len(time)])]


def _is_disorder(
    time: np.ndarray, signals: np.ndarray, labels: np.ndarray, order: np.ndarray, settings: Preprocessing
) -> bool:
    """Return whether rows are out of order and to be sorted, rather than of several recordings with restarted clocks.

    They are out of order if the sorted times have the right rate and almost no two different rows share a time.
    """
    clock = time[order]
    rate = _rate_of(clock, settings)
    fits: bool | np.bool_
    if settings.resample:  # any rate fits: but recordings sorted into each other have a higher rate than each
        alone = _rate_of(time, settings)
        fits = (
            rate is None or alone is None or rate < 1.5 * alone or np.count_nonzero(np.diff(time) < 0) > len(time) / 4
        )
    else:
        fits = _fits(rate, settings)
    same = np.flatnonzero(np.diff(clock) == 0)
    differing = np.count_nonzero(~_equal_rows(signals, labels, order[same], order[same + 1]))
    return bool(fits and differing <= FEW * len(time))


def _equal_rows(signals: np.ndarray, labels: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return which of the rows `first` equal their partners in `second`."""
    a, b = signals[first], signals[second]
    same: np.ndarray = ((a == b) | (np.isnan(a) & np.isnan(b))).all(axis=1) & (labels[first] == labels[second])
    return same


def _unrepeated(
    where: str, time: np.ndarray, signals: np.ndarray, labels: np.ndarray, settings: Preprocessing, tally: Tally
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return times, signals and labels with one row for each time."""
    same = np.diff(time) == 0
    if not same.any():
        return time, signals, labels
    first = np.flatnonzero(np.concatenate([[True], ~same]))
    pairs = np.flatnonzero(same)
    group = np.cumsum(np.concatenate([[True], ~same])) - 1
    unequal = ~_equal_rows(signals, labels, pairs, pairs + 1)
    mixed = np.zeros(len(first), dtype=bool)  # times at which rows differ
    mixed[group[pairs[unequal]]] = True
    sharing = mixed[group]
    differing = int(np.count_nonzero(sharing))
    if settings.repeated == "error" or (not settings.repeated and differing > FEW * len(time)):
        raise UserError(_shared(where, time, differing, settings))
    tally.duplicates += int(np.count_nonzero(same)) - (differing - int(np.count_nonzero(mixed)))
    if not differing:
        return time[first], signals[first], labels[first]
    if (labels[pairs] != labels[pairs + 1]).any():
        row = int(pairs[labels[pairs] != labels[pairs + 1]][0])
        raise UserError(f"{where}: two rows at {time[row] - time[0]:g} s after its begin have different labels")
    tally.averaged += differing
    valid = ~np.isnan(signals)
    sums = np.add.reduceat(np.where(valid, signals, 0.0).astype(np.float64), first, axis=0)
    counts = np.add.reduceat(valid.astype(np.int64), first, axis=0)
    with np.errstate(invalid="ignore"):
        return time[first], sums / counts, labels[first]


def _shared(where: str, time: np.ndarray, differing: int, settings: Preprocessing) -> str:
    """Return the message about rows that share their times."""
    each, rate = len(time) / len(np.unique(time)), _rate_of(time, settings)
    if not differing:
        return f"{where}: rows repeat others of the same time ({each:.2g} rows for each), and 'repeated' is 'error'"
    text = f"{where}: {differing} of {len(time)} rows share their time with others and differ"
    if each >= 1.5 and rate is not None and not _fits(rate, settings):
        return (
            f"{text}: {each:.0f} rows share each time, so its clock is too coarse for {settings.rate:g} Hz; use a "
            "finer time, or leave 'time' out where rows follow each other without gaps"
        )
    return (
        f"{text}; name the column that tells them apart ('subject' or 'session'), or average them with "
        "time: {column: ..., repeated: average}"
    )


def _placed(
    time: np.ndarray, signals: np.ndarray, labels: np.ndarray, rate: float, settings: Preprocessing, tally: Tally
) -> Piece:
    """Put rows without a long gap onto an even grid of the measured rate."""
    steps = np.diff(time) * rate
    if not (np.abs(steps - 1) > 0.5).any():
        return Piece(signals, labels, rate)
    whole = np.rint(steps).astype(np.int64)
    if (whole >= 1).all() and np.count_nonzero(np.abs(steps - whole) > 0.3) <= FEW * len(steps):
        place = np.concatenate([[0], np.cumsum(whole)])
        tally.inserted += int(place[-1] + 1 - len(place))
        spread = np.full((int(place[-1]) + 1, signals.shape[1]), np.nan, dtype=signals.dtype)
        spread[place] = signals
        if settings.before is not None:
            marks = np.full(len(spread), UNLABELLED, dtype=np.int64)
            marks[place] = labels
            return Piece(spread, marks, rate)
        return Piece(spread, labels[_nearest(place.astype(np.float64), np.arange(len(spread)))], rate)
    even_rate = _line(time)
    if even_rate is not None:  # the samples are even, only their times jitter
        return Piece(signals, labels, even_rate)
    tally.uneven = True
    grid = np.arange(int((time[-1] - time[0]) * rate + 1e-6) + 1) / rate + time[0]
    columns = [_interpolated(time, signals[:, i], grid, 1 / rate, settings) for i in range(signals.shape[1])]
    tally.inserted += max(0, len(grid) - len(time))
    if settings.before is not None:
        marks = np.full(len(grid), UNLABELLED, dtype=np.int64)
        events = np.flatnonzero(labels != UNLABELLED)
        marks[_nearest(grid, time[events])] = labels[events]
    else:
        marks = labels[_nearest(time, grid)]
    return Piece(np.stack(columns, axis=1), marks, rate)


def _interpolated(
    time: np.ndarray, column: np.ndarray, grid: np.ndarray, step: float, settings: Preprocessing
) -> np.ndarray:
    """Interpolate a channel linearly onto another grid, with NaN where the neighbours are too far apart."""
    valid = np.flatnonzero(~np.isnan(column))
    if not len(valid):
        return np.full(len(grid), np.nan)
    at = time[valid]
    values: np.ndarray = np.interp(grid, at, column[valid])
    after = np.clip(np.searchsorted(at, grid), 0, len(at) - 1)
    before = np.maximum(after - 1, 0)
    apart = at[after] - at[before] > settings.max_gap + 1.5 * step
    outside = (grid < at[0] - 1e-9) | (grid > at[-1] + 1e-9)
    values[(apart & (grid != at[after])) | outside] = np.nan
    return values


def _nearest(places: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the index of the nearest of `places` (ascending) for each of `wanted`; of two equally near, the first."""
    after = np.clip(np.searchsorted(places, wanted), 0, len(places) - 1)
    before = np.maximum(after - 1, 0)
    return np.where(wanted - places[before] <= places[after] - wanted, before, after)
