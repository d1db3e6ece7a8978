"""Which windows to train on and which to test on, per subject."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dataset_utils.recording import Windows

STREAM = 1  # separates these random numbers from those of the partition and the reduction


class Split(NamedTuple):
    """Indices into the windows, ascending.

    Attributes:
        train, test: what to train and test on.
        dropped: windows left out because they lie too near to a test window.
    """

    train: np.ndarray
    test: np.ndarray
    dropped: np.ndarray


def split(windows: Windows, fraction: float, how: str, seed: int, stream: int = STREAM) -> Split:
    """Divide each subject's windows of each class into train and test.

    `shuffled` draws the test windows at random, as the paper and its peers do. Overlapping windows then fall
    on both sides, and near-copies of test windows are trained on: it flatters every method.

    `blocked` takes one run of consecutive windows of each class, at a random place, and drops every other
    window of the same stretch of time that shares a sample with a test window or begins or ends less than one
    window length from it. Nothing leaks, at the price of the dropped windows.

    Of n windows, round(n · fraction) are tested on, at least one and at most n - 1; a single window is
    trained on. So are the windows of a class that `blocked` would leave with nothing to train on.

    Args:
        fraction: share to test on, in (0, 1).
        how: 'shuffled' or 'blocked'.
        stream: of the random numbers.
    """
    tested = np.zeros(len(windows.y), dtype=bool)
    for group in groups_of(windows):
        if len(group) < 2:
            continue
        rng = np.random.default_rng([seed, stream, windows.subject[group[0]], windows.y[group[0]]])
        count = min(max(1, round(len(group) * fraction)), len(group) - 1)
        drawn = draw(rng, group, count, how)
        if how == "shuffled" or not _near(windows, np.setdiff1d(group, drawn), drawn).all():
            tested[drawn] = True
    test, rest = np.flatnonzero(tested), np.flatnonzero(~tested)
    near = _near(windows, rest, test) if how == "blocked" else np.zeros(len(rest), dtype=bool)
    return Split(rest[~near], test, rest[near])


def groups_of(windows: Windows) -> list[np.ndarray]:
    """The windows of each class of each subject, in the order of time."""
    order = np.lexsort((windows.start, windows.stretch, windows.y, windows.subject))
    keys = np.stack([windows.subject[order], windows.y[order]])
    return np.split(order, np.flatnonzero(np.diff(keys).any(axis=0)) + 1)


def draw(rng: np.random.Generator, group: np.ndarray, count: int, how: str) -> np.ndarray:
    """`count` of a group: at random, or, where `blocked`, one after the other from a random place on."""
    if how == "shuffled":
        return rng.permutation(group)[:count]
    first = rng.integers(len(group) - count + 1)
    return group[first : first + count]


def _near(windows: Windows, others: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Which of `others` overlap a test window of their stretch or leave less than a window length between."""
    if not len(test):
        return np.zeros(len(others), dtype=bool)
    reach = 2 * windows.x.shape[-1]  # from start to start: one window, then the gap
    line = windows.stretch * (int(windows.start.max()) + reach + 1) + windows.start  # stretches out of reach
    places = np.sort(line[test])
    right = np.searchsorted(places, line[others])
    after = places[np.minimum(right, len(places) - 1)]
    before = places[np.maximum(right - 1, 0)]
    return np.minimum(abs(line[others] - after), abs(line[others] - before)) < reach
