"""Reduction of the training windows: validation windows are held out, and a share of the rest is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from dataset_utils.partition import Partition
from dataset_utils.recording import Windows
from dataset_utils.spec import ShardSpec
from dataset_utils.split import Split, draw, groups_of, nearer, split
from registry.errors import UserError

VALIDATION, THINNING = 3, 4  # separate these random numbers from each other and from those of split and partition
VALIDATION_FRACTION = 0.2


def reduced(
    windows: Windows, parts: Partition, test: np.ndarray, spec: ShardSpec, report: Callable[[str], None]
) -> Partition:
    """Apply `--evaluate-on validation` and `--train-fraction` to a partition, in this order.

    Validation windows are taken from all training windows, so that a small train fraction leaves enough of them.

    Args:
        windows: all windows.
        parts: the partition of `windows` among clients.
        test: indices of all test windows; no validation window shares a sample with one of them.
        spec: what to hold out and what to keep.
        report: called with one line of text for each reduction.

    Raises:
        UserError: a client has no validation window, or no training window left.
    """
    if spec.evaluate_on == "validation":
        train = parts.train
        divided = hold_out(windows, train, test, spec.split, spec.seed)
        for k, own in enumerate(divided):
            if not (len(own.train) and len(own.test)):
                raise UserError(
                    f"--evaluate-on validation: client {k} has too few training windows to hold some out that "
                    "share no sample with test windows"
                )
        parts = parts._replace(train=[own.train for own in divided], test=[own.test for own in divided])
        barred = sum(int(nearer(windows, own, test, 0).sum()) for own in train)
        report(
            f"{sum(len(own.test) for own in divided)} training windows held out for validation, "
            f"{sum(len(own.dropped) for own in divided)} dropped between"
            + (f"; {barred} could not be, as they share samples with test windows" if barred else "")
        )
    if spec.train_fraction < 1:
        kept = thin(windows, parts.train, spec.train_fraction, spec.split, spec.seed)
        before, after = (sum(map(len, train)) for train in (parts.train, kept))
        parts = parts._replace(train=kept)
        report(f"{after} of {before} training windows kept (--train-fraction {spec.train_fraction:g})")
    return parts


def hold_out(windows: Windows, train: Sequence[np.ndarray], test: np.ndarray, how: str, seed: int) -> list[Split]:
    """Divide each client's training windows into training and validation windows.

    The rules are those of `split`: `shuffled` if the test windows were drawn by it, among the windows that share no
    sample with a test window, as far as there are enough; else `blocked`, with the gap to all clients' validation
    windows.

    Args:
        windows: all windows.
        train: each client's training windows, ascending indices.
        test: indices of all test windows.
        how: the kind of split that made the test windows.
        seed: seed of the random numbers.

    Returns:
        a split for each client, whose `test` are the validation windows; all are indices into `windows`.
    """
    pool = np.concatenate(train)
    owner = np.repeat(np.arange(len(train)), [len(own) for own in train])
    shares = nearer(windows, pool, test, 0)
    divided = split(_taken(windows, pool, owner), VALIDATION_FRACTION, _alike(how), seed, VALIDATION, shares)
    return [Split(*(pool[part[owner[part] == k]] for part in divided)) for k in range(len(train))]


def thin(windows: Windows, train: Sequence[np.ndarray], fraction: float, how: str, seed: int) -> list[np.ndarray]:
    """Keep a share of each client's windows of each class: of n, round(n · fraction), at least one.

    `shuffled` keeps windows at random; every other split keeps one run of consecutive windows, as a shorter recording
    would give.

    Args:
        windows: all windows.
        train: each client's training windows, ascending indices.
        fraction: share to keep, in (0, 1].
        how: the kind of split.
        seed: seed of the random numbers.
    """
    kept = []
    for k, own in enumerate(train):
        taken = _taken(windows, own, np.full(len(own), k))
        parts = []
        for group in groups_of(taken):
            rng = np.random.default_rng([seed, THINNING, k, taken.y[group[0]]])
            parts.append(draw(rng, group, max(1, round(len(group) * fraction)), how))
        kept.append(own[np.sort(np.concatenate(parts))])
    return kept


def _alike(how: str) -> str:
    """Return the kind of split that divides the windows of one client further."""
    return "shuffled" if how == "shuffled" else "blocked"


def _taken(windows: Windows, index: np.ndarray, owner: np.ndarray) -> Windows:
    """Return the windows at `index` without their samples, with their clients as subjects."""
    return replace(
        windows,
        x=windows.x[:0],
        y=windows.y[index],
        subject=owner,
        stretch=windows.stretch[index],
        start=windows.start[index],
        recording=None if windows.recording is None else windows.recording[index],
        test=None,
    )
