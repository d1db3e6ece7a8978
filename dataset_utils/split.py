"""Split of windows into training and test windows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dataset_utils.recording import Windows
from registry.errors import UserError

STREAM = 1  # separates these random numbers from those of the partition and the reduction
TRIES = 10  # positions tried for a run, until one leaves training windows of every class
PIECES = 1 << 30  # replaces the class in the key of these random numbers
MOST = 2  # a recording is tested on as a whole up to this multiple of the share asked for; else it is cut


class Split(NamedTuple):
    """Indices into the windows, ascending.

    Attributes:
        train, test: windows to train and to test on.
        dropped: windows left out because they are too near to a test window.
    """

    train: np.ndarray
    test: np.ndarray
    dropped: np.ndarray


def split(
    windows: Windows, fraction: float, how: str, seed: int, stream: int = STREAM, barred: np.ndarray | None = None
) -> Split:
    """Divide the windows into train and test.

    `shuffled` draws the test windows of each class of each subject at random, as the paper and its peers do.
    Overlapping windows then fall on both sides, so that near-copies of test windows are trained on: results of every
    method are too good.

    `blocked` separates the sides in time by a gap: one window's length, or the reach of the filters if that is more.
    A subject's windows form pieces between which there is such a gap already. If a class is in several recordings of a
    subject, whole pieces are tested on, as near to the share as they allow; so are pieces of one recording if that
    gives at most twice the share. Of a class that still has no test window, one run of consecutive windows at a random
    position is tested on, and windows nearer to it than the gap are dropped. Copies of a window are on the same side.

    `loso` tests on all windows of one subject, number `seed` modulo the number of subjects; `given` on the windows that
    the data set names. Other windows nearer to these than the gap, and copies, are dropped.

    Of n windows of a class of a subject, round(n · fraction) are tested on, at least one and at most n - 1; a single
    window is trained on. So are the windows of a class of which `blocked` would leave no training window.

    Args:
        windows: the windows.
        fraction: share to test on, in (0, 1); not used by `loso` and `given`.
        how: 'shuffled', 'blocked', 'loso' or 'given'.
        seed: seed of the random numbers; for `loso` it selects the subject.
        stream: number that separates these random numbers from others of the same seed.
        barred: (n,), windows that `shuffled` may not test on.

    Raises:
        UserError: the data set names no test windows, or all windows; or it has one subject only.
    """
    if how == "shuffled":
        return _shuffled(windows, fraction, seed, stream, np.zeros(len(windows.y), bool) if barred is None else barred)
    if how == "blocked":
        _, first, copy_of = np.unique(_places(windows), return_index=True, return_inverse=True)
        tested = np.zeros(len(windows.y), dtype=bool)
        for subject in np.unique(windows.subject[first]):
            own = np.sort(first[windows.subject[first] == subject])
            _test_pieces(windows, own, fraction, [seed, stream, int(subject)], tested)
            _test_runs(windows, own, fraction, [seed, stream, int(subject)], tested)
        tested = tested[first][copy_of]
    else:
        tested = _left_out(windows, seed) if how == "loso" else _given(windows)
    test, rest = np.flatnonzero(tested), np.flatnonzero(~tested)
    near = nearer(windows, rest, test, gap(windows))
    if windows.test is not None and how == "given":
        near |= windows.test[rest] != 0  # windows that hold some samples to be tested on
    return Split(rest[~near], test, rest[near])


def gap(windows: Windows) -> int:
    """Return the number of samples that `blocked` leaves between training and test windows."""
    window: int = windows.x.shape[-1]
    return max(window, windows.reach)


def nearer(windows: Windows, others: np.ndarray, test: np.ndarray, apart: int) -> np.ndarray:
    """Return which of `others` lie less than `apart` samples from a test window; 0: which share a sample."""
    if not len(test) or not len(others):
        return np.zeros(len(others), dtype=bool)
    reach = windows.x.shape[-1] + apart  # from start to start
    line = _places(windows, reach)
    places = np.sort(line[test])
    right = np.searchsorted(places, line[others])
    after = places[np.minimum(right, len(places) - 1)]
    before = places[np.maximum(right - 1, 0)]
    near: np.ndarray = np.minimum(abs(line[others] - after), abs(line[others] - before)) < reach
    return near


def groups_of(windows: Windows) -> list[np.ndarray]:
    """Return the windows of each class of each subject, ordered by time."""
    order = np.lexsort((windows.start, windows.stretch, windows.y, windows.subject))
    keys = np.stack([windows.subject[order], windows.y[order]])
    return np.split(order, np.flatnonzero(np.diff(keys).any(axis=0)) + 1)


def draw(rng: np.random.Generator, group: np.ndarray, count: int, how: str) -> np.ndarray:
    """Draw `count` of a group: at random for `shuffled`, else consecutive ones from a random position."""
    if how == "shuffled":
        return rng.permutation(group)[:count]
    first = rng.integers(len(group) - count + 1)
    return group[first : first + count]


def _wanted(windows: int, fraction: float) -> int:
    """Return how many windows of a class are to be tested on."""
    return min(max(1, round(windows * fraction)), windows - 1)


def _shuffled(windows: Windows, fraction: float, seed: int, stream: int, barred: np.ndarray) -> Split:
    tested = np.zeros(len(windows.y), dtype=bool)
    for group in groups_of(windows):
        if len(group) > 1:
            rng = np.random.default_rng([seed, stream, windows.subject[group[0]], windows.y[group[0]]])
            tested[draw(rng, group[~barred[group]], _wanted(len(group), fraction), "shuffled")] = True
    return Split(np.flatnonzero(~tested), np.flatnonzero(tested), np.empty(0, dtype=np.int64))


def _left_out(windows: Windows, seed: int) -> np.ndarray:
    subjects = len(windows.subjects)
    if subjects < 2:
        raise UserError("--split loso leaves one subject out, but there is only one; choose another --split")
    left_out: np.ndarray = windows.subject == seed % subjects
    return left_out


def _given(windows: Windows) -> np.ndarray:
    """Return which windows are to be tested on; windows that hold samples of both are neither tested nor trained on."""
    if windows.test is None or not (windows.test == 1).any():
        raise UserError(
            "--split given: no window is to be tested on; name recordings under 'test' in the YAML of your own data "
            "(docs/guide/own-data.md), each long enough for a window, or choose another --split"
        )
    if (windows.test != 0).all():
        raise UserError(
            "--split given: all windows are to be tested on, so that none is left to train on; name fewer under 'test'"
        )
    tested: np.ndarray = windows.test == 1
    return tested


def _places(windows: Windows, beyond: int = 1) -> np.ndarray:
    """Return the begin of each window, (n,), on one axis on which different lines are at least `beyond` apart."""
    start: np.ndarray = windows.start - windows.start.min()
    places: np.ndarray = windows.stretch * (int(start.max()) + beyond + 1) + start
    return places


def _pieces(windows: Windows, own: np.ndarray) -> np.ndarray:
    """Return the number of each window's piece, (len(own),); between pieces there is the gap already."""
    reach = windows.x.shape[-1] + gap(windows)
    place = _places(windows, reach)[own]
    order = np.argsort(place, kind="stable")
    piece = np.empty(len(own), dtype=np.int64)
    piece[order] = np.concatenate([[0], np.cumsum(np.diff(place[order]) >= reach)])
    return piece


def _test_pieces(windows: Windows, own: np.ndarray, fraction: float, key: list[int], tested: np.ndarray) -> None:
    """Mark whole pieces of one subject, in random order, each if it brings the classes nearer to their shares.

    Then, for a class still without test windows, mark the piece after which the classes are nearest to their shares.
    """
    classes, y = np.unique(windows.y[own], return_inverse=True)
    piece = _pieces(windows, own)
    counts = np.zeros((piece.max() + 1, len(classes)), dtype=np.int64)
    np.add.at(counts, (piece, y), 1)
    total = counts.sum(axis=0)
    target = np.array([_wanted(int(n), fraction) for n in total])
    recording = np.zeros(len(own), np.int64) if windows.recording is None else windows.recording[own]
    several = np.array([len(np.unique(recording[y == c])) > 1 for c in range(len(classes))])
    chosen = np.zeros(len(counts), dtype=bool)
    sums = np.zeros_like(total)  # of the chosen pieces

    def far(p: int) -> float:
        """Return the distance from the shares with one more piece; infinite if it leaves a class untrained."""
        more = sums + counts[p]
        return np.inf if (more >= total).any() else float(abs(more - target).sum())

    order = np.random.default_rng([*key, PIECES]).permutation(len(counts))
    for p in order:
        if far(p) < abs(sums - target).sum():
            chosen[p] = True
            sums += counts[p]
    for c in np.argsort((counts > 0).sum(axis=0), kind="stable"):
        having = [p for p in order if counts[p, c] and (several[c] or counts[p, c] <= MOST * target[c])]
        nearest = min(having, key=far, default=None)
        if not sums[c] and nearest is not None and far(nearest) < np.inf:
            chosen[nearest] = True
            sums += counts[nearest]
    tested[own[chosen[piece]]] = True


def _test_runs(windows: Windows, own: np.ndarray, fraction: float, key: list[int], tested: np.ndarray) -> None:
    """Mark a run of each class of one subject that has no test windows, if training windows remain."""
    order = own[np.lexsort((windows.start[own], windows.stretch[own]))]
    classes = np.unique(windows.y[own])
    for c in classes:
        group = order[windows.y[order] == c]
        if len(group) < 2 or tested[group].any():
            continue
        rng = np.random.default_rng([*key, int(c)])
        for _ in range(TRIES):
            drawn = draw(rng, group, _wanted(len(group), fraction), "blocked")
            test = np.concatenate([own[tested[own]], drawn])
            rest = np.setdiff1d(own, test)
            left = rest[~nearer(windows, rest, test, gap(windows))]
            if np.isin(classes, windows.y[left]).all():
                tested[drawn] = True
                break
