"""Which windows to train on and which to test on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dataset_utils.recording import Windows
from registry.errors import UserError

STREAM = 1  # separates these random numbers from those of the partition and the reduction
TRIES = 10  # places for a run, until one leaves every class something to train on
PIECES = 1 << 30  # in the place of a class
MOST = 2  # times the share asked for: more than that, and a recording is cut rather than tested on as a whole


class Split(NamedTuple):
    """Indices into the windows, ascending.

    Attributes:
        train, test: what to train and test on.
        dropped: windows left out because they lie too near to a test window.
    """

    train: np.ndarray
    test: np.ndarray
    dropped: np.ndarray


def split(
    windows: Windows, fraction: float, how: str, seed: int, stream: int = STREAM, barred: np.ndarray | None = None
) -> Split:
    """Divide the windows into train and test.

    `shuffled` draws the test windows of each class of each subject at random, as the paper and its peers do.
    Overlapping windows then fall on both sides, and near-copies of test windows are trained on: it flatters every
    method.

    `blocked` keeps the sides apart in time by a gap: one window's length, or the reach of the filters where that is
    more. A subject's windows fall into pieces between which there is such a gap already. Where a class is in several
    recordings of a subject, whole pieces are tested on, as near to the share as they allow; so are pieces of one
    recording where that gives at most twice the share. Of a class that has no test window then, one run of consecutive
    windows is tested on, at a random place, and what lies nearer to it than the gap is dropped. Copies of a window go
    where it goes.

    `loso` tests on all windows of one subject, number `seed` modulo the number of subjects; `given` on those the data
    set says. Of the others, what lies nearer than the gap, and copies, are dropped.

    Of n windows of a class of a subject, round(n · fraction) are to be tested on, at least one and at most n - 1; a
    single window is trained on. So are the windows of a class that `blocked` would leave with nothing to train on.

    Args:
        fraction: share to test on, in (0, 1); `loso` and `given` do not ask.
        how: 'shuffled', 'blocked', 'loso' or 'given'.
        stream: of the random numbers.
        barred: (n,), windows that may not be tested on, where `shuffled`.

    Raises:
        UserError: the data set gives no test windows, or all are, or there is one subject only.
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
        near |= windows.test[rest] != 0  # holds samples to be tested on, though too few for a window
    return Split(rest[~near], test, rest[near])


def gap(windows: Windows) -> int:
    """Samples that `blocked` leaves between training and test windows."""
    window: int = windows.x.shape[-1]
    return max(window, windows.reach)


def nearer(windows: Windows, others: np.ndarray, test: np.ndarray, apart: int) -> np.ndarray:
    """Which of `others` lie on a test window's line with less than `apart` samples between; 0: which share a sample."""
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
    """The windows of each class of each subject, in the order of time."""
    order = np.lexsort((windows.start, windows.stretch, windows.y, windows.subject))
    keys = np.stack([windows.subject[order], windows.y[order]])
    return np.split(order, np.flatnonzero(np.diff(keys).any(axis=0)) + 1)


def draw(rng: np.random.Generator, group: np.ndarray, count: int, how: str) -> np.ndarray:
    """`count` of a group: at random where `shuffled`, else one after the other from a random place on."""
    if how == "shuffled":
        return rng.permutation(group)[:count]
    first = rng.integers(len(group) - count + 1)
    return group[first : first + count]


def _wanted(windows: int, fraction: float) -> int:
    """How many of a class are to be tested on."""
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
    """What is to be tested on; windows that hold samples of both lie too near to it to be trained on."""
    if windows.test is None or not (windows.test == 1).any():
        raise UserError(
            "--split given: no window is to be tested on; name recordings under 'test' in the YAML of your own data "
            "(docs/datasets.md), each long enough for a window, or choose another --split"
        )
    if (windows.test != 0).all():
        raise UserError("--split given: all windows are to be tested on, so that none is left to train on")
    tested: np.ndarray = windows.test == 1
    return tested


def _places(windows: Windows, beyond: int = 1) -> np.ndarray:
    """(n,): where each window begins, on one axis on which different lines are at least `beyond` apart."""
    start: np.ndarray = windows.start - windows.start.min()
    places: np.ndarray = windows.stretch * (int(start.max()) + beyond + 1) + start
    return places


def _pieces(windows: Windows, own: np.ndarray) -> np.ndarray:
    """(len(own),): the piece each of these windows is in; pieces have the gap between them already."""
    reach = windows.x.shape[-1] + gap(windows)
    place = _places(windows, reach)[own]
    order = np.argsort(place, kind="stable")
    piece = np.empty(len(own), dtype=np.int64)
    piece[order] = np.concatenate([[0], np.cumsum(np.diff(place[order]) >= reach)])
    return piece


def _test_pieces(windows: Windows, own: np.ndarray, fraction: float, key: list[int], tested: np.ndarray) -> None:
    """Mark whole pieces of one subject, in random order, as long as each class comes nearer to its share by them.

    Then, of a class that is still without test windows, the piece that takes the classes least far from their shares.
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
        """How far from the shares with one more piece; infinitely where a class would have nothing to train on."""
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
    """Mark a run of each class of one subject that is without test windows, where something is left to train on."""
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
