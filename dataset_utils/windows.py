"""From continuous stretches to labelled windows."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np

from dataset_utils.preprocessing import Stretch
from dataset_utils.recording import UNLABELLED, Windows
from registry.errors import UserError


def cut(stretches: Iterable[Stretch], window: int, overlap: float) -> Windows:
    """Slide a window over each stretch; one that touches an unlabelled sample is dropped.

    A window's label is the class of most of its samples, the lowest such class on a tie. x is (n, channels,
    1, time) by transposing the (time, channels) of a recording; reshaping would scramble the channels.

    Args:
        window: samples.
        overlap: share of a window that the next one repeats, in [0, 1).

    Returns:
        windows in the natural order of their subjects ("2" before "10"), each subject's in the order given.

    Raises:
        UserError: not one window is left.
    """
    step = max(1, round(window * (1 - overlap)))
    pieces = []
    for number, stretch in enumerate(stretches):
        starts, labels = _labelled(stretch.labels, window, step)
        if len(starts):
            views = np.lib.stride_tricks.sliding_window_view(stretch.signals, window, axis=0)
            line = ("alone", number) if stretch.line is None else ("line", stretch.line)
            pieces.append((stretch, views, labels, starts, line))
    if not pieces:
        raise UserError(
            f"no window of {window} samples fits between gaps and unlabelled samples; try a smaller --window"
        )
    pieces.sort(key=lambda piece: natural(piece[0].subject))
    subjects = tuple(dict.fromkeys(piece[0].subject for piece in pieces))
    lines = list(dict.fromkeys(piece[4] for piece in pieces))
    number_of = {line: number for number, line in enumerate(lines)}
    counts = [len(piece[3]) for piece in pieces]
    x = np.empty((sum(counts), pieces[0][1].shape[1], 1, window), dtype=np.float32)
    end = 0
    for (_, views, _, starts, _), count in zip(pieces, counts, strict=True):
        end += count
        x[end - count : end, :, 0] = views[starts]  # a view is (starts, channels, time): transposed already
    return Windows(
        x=x,
        y=np.concatenate([piece[2] for piece in pieces]),
        subject=np.repeat([subjects.index(piece[0].subject) for piece in pieces], counts),
        stretch=np.repeat([number_of[piece[4]] for piece in pieces], counts),
        start=np.concatenate([piece[3] + piece[0].start for piece in pieces]),
        subjects=subjects,
        recording=np.repeat([piece[0].recording for piece in pieces], counts),
        test=np.repeat([piece[0].test for piece in pieces], counts),
    )


def natural(name: str) -> tuple[list[str | int], str]:
    """A sorting key that puts "subject2" before "subject10"."""
    parts: list[str | int] = list(re.split(r"(\d+)", name))
    parts[1::2] = [int(digits) for digits in parts[1::2]]
    return parts, name


def _labelled(labels: np.ndarray, window: int, step: int) -> tuple[np.ndarray, np.ndarray]:
    """First samples and majority labels of the windows that hold no unlabelled sample."""
    starts = np.arange(0, len(labels) - window + 1, step, dtype=np.int64)
    starts = starts[_count(labels == UNLABELLED, starts, window) == 0]
    classes = np.unique(labels[labels != UNLABELLED])
    if not len(starts):
        return starts, starts
    counts = np.stack([_count(labels == c, starts, window) for c in classes])
    return starts, classes[counts.argmax(axis=0)]  # the first, that is the lowest, of equals


def _count(mask: np.ndarray, starts: np.ndarray, window: int) -> np.ndarray:
    """How many of `mask` are true in each window."""
    total = np.concatenate([[0], np.cumsum(mask)])
    return total[starts + window] - total[starts]
