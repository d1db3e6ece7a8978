"""Cutting of stretches into labelled windows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import sha256

import numpy as np

from dataset_utils import limits
from dataset_utils.preprocessing import Stretch
from dataset_utils.recording import STRADDLES, UNLABELLED, Preprocessing, Windows
from dataset_utils.time_axis import step_of
from registry.errors import UserError
from registry.text import natural

FLOAT = 4  # bytes
SOME = 512
"""Number of windows copied at a time."""


def cut(stretches: Iterable[Stretch], settings: Preprocessing) -> Windows | None:
    """Slide a window over each stretch; windows that hold an unlabelled sample are dropped.

    A window's label is the class of most of its samples, the lowest such class on a tie; a window in which this class
    has a smaller share than `settings.purity` is dropped. Where labels mark events (`settings.before`), there is a
    window around each event instead, with the event's label. x is (n, channels, 1, time) by transposing the (time,
    channels) of a recording; reshaping would scramble the channels. Dropped windows are counted in the tallies.

    Returns:
        windows in the natural order of their subjects ("2" before "10"), each subject's in the given order; None if
        there are none.
    """
    window, pieces = settings.window, []
    for number, stretch in enumerate(stretches):
        before = settings.before
        found = _labelled(stretch, settings) if before is None else _around(stretch, settings, before)
        starts, labels, test = found
        stretch.tally.windows += len(starts)
        if len(starts):
            views = np.lib.stride_tricks.sliding_window_view(stretch.signals, window, axis=0)
            own_line = ("alone", number) if stretch.line is None else ("line", stretch.line)
            pieces.append((stretch, views, labels, starts, own_line, test))
    if not pieces:
        return None
    pieces.sort(key=lambda piece: natural(piece[0].subject))
    subjects = tuple(dict.fromkeys(piece[0].subject for piece in pieces))
    number_of = {line: number for number, line in enumerate(dict.fromkeys(piece[4] for piece in pieces))}
    limits.check_count("the recordings", len(subjects), limits.SUBJECTS, "subjects", "correct 'subject'")
    counts = [len(piece[3]) for piece in pieces]
    size = sum(counts) * pieces[0][1].shape[1] * window * FLOAT
    limits.check_memory(f"{sum(counts)} windows of {window} samples", size, "choose a smaller window or overlap")
    x = np.empty((sum(counts), pieces[0][1].shape[1], 1, window), dtype=np.float32)
    y = np.concatenate([piece[2] for piece in pieces])
    start = np.concatenate([piece[3] + piece[0].start for piece in pieces])
    test = np.concatenate([piece[5] for piece in pieces])
    subject, line, recording = (
        np.repeat([value(piece) for piece in pieces], counts)
        for value in (
            lambda piece: subjects.index(piece[0].subject),
            lambda piece: number_of[piece[4]],
            lambda piece: piece[0].recording,
        )
    )
    end = len(x)
    while pieces:  # each is freed once it is copied
        _, views, _, starts, *_ = pieces.pop()
        end -= len(starts)
        for first in range(0, len(starts), SOME):
            some = views[starts[first : first + SOME]]  # a view is (starts, channels, time): transposed already
            x[end + first : end + first + len(some), :, 0] = some
    return Windows(x, y, subject, line, start, subjects, recording, test)


def joined(parts: Sequence[Windows]) -> tuple[Windows, int]:
    """Join the windows of several files, in the natural order of their subjects.

    Returns:
        the windows, and the number of files that equal another; their windows get the positions of the other's.

    Raises:
        UserError: windows have different lengths.
    """
    if len(parts) == 1:
        return parts[0], 0
    lengths = {part.x.shape[-1] for part in parts}
    if len(lengths) > 1:
        raise UserError(
            f"windows of {' and '.join(map(str, sorted(lengths)))} samples cannot be trained on together; "
            "give all files one window length"
        )
    subjects = tuple(sorted({name for part in parts for name in part.subjects}, key=natural))
    renumbered = [np.array([subjects.index(name) for name in part.subjects])[part.subject] for part in parts]
    first = np.cumsum([0, *(int(part.stretch.max()) + 1 for part in parts)])[:-1]
    originals: dict[bytes, int] = {}
    for number, part in enumerate(parts):
        content = sha256(repr(part.x.shape).encode() + np.ascontiguousarray(part.stretch).tobytes())
        content.update(np.ascontiguousarray(part.x).data)
        first[number] = first[originals.setdefault(content.digest(), number)]
    subject = np.concatenate(renumbered)
    stretch = np.concatenate([part.stretch + offset for part, offset in zip(parts, first, strict=True)])
    start = np.concatenate([part.start for part in parts])
    order = np.lexsort((start, stretch, subject))
    whole = Windows(
        x=np.concatenate([part.x for part in parts])[order],
        y=np.concatenate([part.y for part in parts])[order],
        subject=subject[order],
        stretch=stretch[order],
        start=start[order],
        subjects=subjects,
        recording=_joined_parts(parts, "recording", order),
        test=_joined_parts(parts, "test", order),
        reach=max(part.reach for part in parts),
    )
    return whole, len(parts) - len(originals)


def _joined_parts(parts: Sequence[Windows], name: str, order: np.ndarray) -> np.ndarray | None:
    """Join an attribute that all parts know, else None; recordings of different parts get different numbers."""
    values = [getattr(part, name) for part in parts]
    if any(value is None for value in values):
        return None
    if name == "recording":
        first = np.cumsum([0, *(int(value.max()) + 1 for value in values)])
        values = [value + offset for value, offset in zip(values, first[:-1], strict=True)]
    ordered: np.ndarray = np.concatenate(values)[order]
    return ordered


def _labelled(stretch: Stretch, settings: Preprocessing) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return first samples, majority labels and `Windows.test` of the labelled windows of sufficient purity."""
    window, tally = settings.window, stretch.tally
    starts = np.arange(0, len(stretch.labels) - window + 1, step_of(window, settings.overlap), dtype=np.int64)
    unlabelled = stretch.labels == UNLABELLED
    whole = _count(unlabelled, starts, window) == 0
    tally.unlabelled += int(np.count_nonzero(~whole))
    starts = starts[whole]
    if not len(starts):
        return starts, starts, starts
    labels = np.where(unlabelled, UNLABELLED, stretch.labels % stretch.classes)
    classes = np.unique(labels[~unlabelled])
    counts = np.stack([_count(labels == c, starts, window) for c in classes])
    most = counts.max(axis=0)
    pure = most >= settings.purity * window - 1e-9
    tally.impure += int(np.count_nonzero(~pure))
    tally.mixed += int(np.count_nonzero(most[pure] < window))
    tally.purity += float(most[pure].sum() / window)
    tested = _count(stretch.labels >= stretch.classes, starts, window)
    test = np.where((tested > 0) & (tested < window), STRADDLES, tested > 0).astype(np.int8)
    return starts[pure], classes[counts.argmax(axis=0)][pure], test[pure]  # on a tie the lowest class


def _around(stretch: Stretch, settings: Preprocessing, before: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return first samples, labels and `Windows.test` of the windows around events that lie wholly in a stretch."""
    events = np.flatnonzero(stretch.labels != UNLABELLED)
    starts = events - round(before * settings.rate)
    inside = (starts >= 0) & (starts + settings.window <= len(stretch.labels))
    kept = int(np.count_nonzero(inside))
    stretch.tally.possible += len(events)
    stretch.tally.purity += kept
    labels = stretch.labels[events[inside]]
    return starts[inside], labels % stretch.classes, (labels >= stretch.classes).astype(np.int8)


def _count(mask: np.ndarray, starts: np.ndarray, window: int) -> np.ndarray:
    """Count the true values of `mask` in each window."""
    total = np.concatenate([[0], np.cumsum(mask)])
    counts: np.ndarray = total[starts + window] - total[starts]
    return counts
