"""Merging of sensors in several files, each at its own rate, on one time axis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dataset_utils import limits, preprocessing, time_axis
from dataset_utils.counts import Tally
from dataset_utils.recording import UNLABELLED, Preprocessing, Recording
from dataset_utils.resampling import at_places, without_aliases
from dataset_utils.time_axis import Piece
from registry.errors import UserError

FLOAT = 4  # bytes


class Merged(NamedTuple):
    """Streams on one grid.

    Attributes:
        signals: (samples, channels of all), float32, NaN where a stream has no value.
        labels: (samples,), class index or UNLABELLED.
        first: time of the first sample, seconds.
    """

    signals: np.ndarray
    labels: np.ndarray
    first: float


def merge(
    recordings: Sequence[Recording], each: Sequence[Preprocessing], settings: Preprocessing, tallies: Sequence[Tally]
) -> Merged:
    """Resample the streams of one recording to `settings.rate` over their common time; each is checked by its own rate.

    A stream of a higher rate is filtered first (see `resampling.without_aliases`). Labels are those of the nearest
    sample of the stream that has them. A stream reaches half a step beyond its first and last samples, as times that
    are rounded, to milliseconds say, would otherwise cost the last sample of each piece.

    Args:
        recordings: one for each stream; only one of them has labels.
        each: preprocessing of each stream: its rate, how long its values may be missing, and its repeated rows.
        settings: preprocessing of the data set.
        tallies: the streams' tallies.

    Raises:
        UserError: a stream's times do not fit its rate, or the streams share no time.
    """
    pieces: list[list[Piece]] = []
    for recording, own, tally in zip(recordings, each, tallies, strict=True):
        pieces.append([piece for piece in time_axis.even(recording, own, tally) if len(piece.labels)])
        tally.possible, tally.max_gap = 0, own.max_gap
    starts = [min(piece.first for piece in parts) for parts in pieces]
    ends = [max(_end(piece) for piece in parts) for parts in pieces]
    first, last = max(starts), min(ends)
    size = (last - first) * settings.rate * sum(parts[0].signals.shape[1] for parts in pieces) * FLOAT
    limits.check_memory(f"the time that {recordings[0].where} shares with others", size, "correct the times")
    samples = int((last - first) * settings.rate + _reach(max(own.rate for own in each), settings.rate)) + 1
    if last <= first:
        late, early = recordings[int(np.argmax(starts))], recordings[int(np.argmin(ends))]
        raise UserError(f"{late.where} begins at {first:.10g} s, after the end of {early.where} at {last:.10g} s")
    grid = first + np.arange(samples) / settings.rate
    columns, labels = [], np.full(samples, UNLABELLED, dtype=np.int64)
    for parts, own in zip(pieces, each, strict=True):
        channels = parts[0].signals.shape[1]
        onto = np.full((samples, channels), np.nan, dtype=np.float32)
        for piece in parts:
            reach = _reach(settings.rate, piece.rate)
            inside, places = _within(grid, piece, reach)
            nearest = np.clip(np.rint(places).astype(np.int64), 0, len(piece.labels) - 1)
            marks = piece.labels[nearest]
            labels[inside] = np.where(marks == UNLABELLED, labels[inside], marks)
            for a, b, values in _finite(piece, own):
                here = inside[(places >= a - reach) & (places <= b - 1 + reach)]
                at = (grid[here] - piece.first) * piece.rate - a
                for i, value in enumerate(values):
                    onto[here, i] = at_places(
                        without_aliases(value, piece.rate, settings.rate), np.clip(at, 0, b - a - 1)
                    )
        columns.append(onto)
    return Merged(np.concatenate(columns, axis=1), labels, first)


def _end(piece: Piece) -> float:
    return piece.first + (len(piece.labels) - 1) / piece.rate


def _reach(other: float, rate: float) -> float:
    """Return half a step of the higher of two rates, in steps of the second; a little less, as ends count once."""
    return (0.5 - 1e-6) * min(1.0, rate / other)


def _within(grid: np.ndarray, piece: Piece, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the samples of the grid in a piece, or `reach` of its steps beyond, and their positions in its samples."""
    places = (grid - piece.first) * piece.rate
    inside = np.flatnonzero((places >= -reach) & (places <= len(piece.labels) - 1 + reach))
    return inside, places[inside]


def _finite(piece: Piece, settings: Preprocessing) -> Iterator[tuple[int, int, list[np.ndarray]]]:
    """Yield the ranges [a, b) of a piece without long gaps, and their channels without NaN."""
    channels = range(piece.signals.shape[1])
    for a, b in preprocessing.complete(piece.signals, piece.rate, settings):
        yield a, b, [preprocessing.interpolated(piece.signals[a:b, i]) for i in channels]
