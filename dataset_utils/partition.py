"""Partition of train and test windows among clients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dataset_utils.counts import some
from dataset_utils.spec import ShardSpec
from registry.errors import UserError

STREAM = 2  # separates these random numbers from the split's


class Partition(NamedTuple):
    """Windows of each client.

    Attributes:
        train, test: for each client, ascending indices into the windows.
        moved: numbers of train and test windows that were moved to another client than drawn, to reach the minimum.
        left_out: numbers of the subjects that are no clients, as fewer clients were asked for.
    """

    train: list[np.ndarray]
    test: list[np.ndarray]
    moved: tuple[int, int] = (0, 0)
    left_out: tuple[int, ...] = ()


def partition(
    spec: ShardSpec,
    labels: np.ndarray,
    subjects: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    names: Sequence[str] = (),
) -> Partition:
    """Divide both pools among the clients; every window goes to exactly one.

    - `subject`: one client for each subject; with fewer clients than subjects, the first subjects, and the others are
      left out. A subject with test windows only is no client: its windows are divided equally among the clients, and
      each predicts its part.
    - `iid`: every client gets an equal share of each class.
    - `dirichlet`: each class is divided in proportions drawn from Dir(alpha) over the clients (Yurochkin et al.
      2019, https://arxiv.org/abs/1905.12022; Hsu et al. 2019 draw each client's classes instead).
    - `pathological`: a client holds `classes_per_client` classes; each class is divided equally among its
      holders (after McMahan et al. 2017, https://arxiv.org/abs/1602.05629).

    Train and test windows were split before, so the partition keeps them separate, and a client's test windows have
    the class proportions of its training windows. If a client falls short of the minimum, nothing is drawn again:
    windows are moved to it from the largest clients, first of the classes that it should hold most of. This always
    terminates, and leaves the rest of the drawn partition unchanged.

    Args:
        spec: kind of partition and its parameters.
        labels: (windows,), class of every window.
        subjects: (windows,), subject of every window.
        names: name of every subject, for messages; none: their numbers.
        train: indices of the training pool.
        test: indices of the test pool.

    Raises:
        UserError: more clients than subjects, or a minimum that cannot be met.
    """
    if spec.partition == "subject":
        return _by_subject(spec, labels, subjects, train, test, names)
    clients = len(np.unique(subjects[train])) if spec.clients is None else spec.clients
    classes = int(labels.max()) + 1
    rng = np.random.default_rng([spec.seed, STREAM])
    amount, test_amount = (np.bincount(labels[pool], minlength=classes) for pool in (train, test))
    _check_amounts(spec, clients, len(train), len(test))

    shares = _shares(spec, rng, amount + test_amount, clients)
    drawn = apportion(amount, shares)
    counts = fill(drawn, amount * shares, spec.min_samples)
    if counts is None:
        raise UserError(
            f"not every client can get {spec.min_samples} training windows of its "
            f"{spec.classes_per_client} classes; lower --min-samples or -nc, or raise --classes-per-client"
        )
    # a class without training windows keeps the shares that were drawn
    shares = np.where(amount > 0, counts / np.maximum(amount, 1), shares)
    test_drawn = apportion(test_amount, shares)
    test_counts = fill(test_drawn, test_amount * shares, 1)
    if test_counts is None:
        raise UserError(
            f"not every one of {clients} clients can get a test window of a class it trains on; "
            "raise --test-fraction or lower -nc"
        )
    return Partition(
        _deal(rng, labels, train, counts),
        _deal(rng, labels, test, test_counts),
        (int(abs(counts - drawn).sum()) // 2, int(abs(test_counts - test_drawn).sum()) // 2),
    )


def apportion(amount: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Round `amount * shares` to whole numbers that add up to `amount` (largest remainder method).

    Among equal remainders, clients with the fewest windows so far come first, so that equal shares give equal totals.

    Args:
        amount: (classes,), number of windows of each class.
        shares: (clients, classes), every column adds up to 1.

    Returns:
        (clients, classes), int64.
    """
    exact = amount * shares
    counts: np.ndarray = np.floor(exact).astype(np.int64)
    for c in range(len(amount)):
        remainder = np.round(exact[:, c] - counts[:, c], 9)  # rounding errors must not break ties
        left = amount[c] - counts[:, c].sum()
        counts[np.lexsort((counts.sum(axis=1), -remainder))[:left], c] += 1
    return counts


def fill(counts: np.ndarray, wanted: np.ndarray, minimum: int) -> np.ndarray | None:
    """Move windows from the largest clients until each has `minimum`.

    A client receives windows of the class with its largest `wanted` first, from the client with the largest surplus
    over the minimum that holds this class. Every step fills the client, or uses up the giver's windows of the class or
    its surplus, so the number of steps is bounded.

    Args:
        counts: (clients, classes), number of windows that each client holds.
        wanted: (clients, classes), number that it should hold; a client receives nothing of a class where this is 0.
        minimum: windows that each client must hold.

    Returns:
        the new counts, or None where the minimum cannot be met.
    """
    counts = counts.copy()
    while (totals := counts.sum(axis=1)).min() < minimum:
        poor = int(totals.argmin())
        for c in np.argsort(-wanted[poor], kind="stable"):
            surplus = np.where(counts[:, c] > 0, totals - minimum, 0)
            giver = int(surplus.argmax())
            if wanted[poor, c] > 0 and surplus[giver] > 0:
                moved = min(surplus[giver], counts[giver, c], minimum - totals[poor])
                counts[giver, c] -= moved
                counts[poor, c] += moved
                break
        else:
            return None
    return counts


def people(spec: ShardSpec, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the subjects that are clients with the partition `subject`, and those who are left out for `-nc`.

    Args:
        spec: kind of partition and its parameters.
        trained: numbers of the subjects with training windows, ascending.

    Raises:
        UserError: more clients than subjects.
    """
    clients = len(trained) if spec.clients is None else spec.clients
    if clients > len(trained):
        raise UserError(
            f"-nc {clients}: there are only {len(trained)} subjects; choose at most {len(trained)}, or another "
            "--partition"
        )
    return trained[:clients], trained[clients:]


def left_out(spec: ShardSpec, subjects: Sequence[str], numbers: Sequence[int]) -> list[str]:
    """Return a line on the subjects left out for `-nc`; none where nobody is.

    Args:
        spec: kind of partition and its parameters.
        subjects: names of all subjects.
        numbers: numbers of those that are left out.
    """
    names = some(subjects[number] for number in numbers)
    return [f"{len(numbers)} of {len(subjects)} subjects are left out (-nc {spec.clients}): {names}"] if names else []


def _by_subject(
    spec: ShardSpec,
    labels: np.ndarray,
    subjects: np.ndarray,
    train: np.ndarray,
    test: np.ndarray,
    names: Sequence[str],
) -> Partition:
    trained = np.unique(subjects[train])
    chosen, others = people(spec, trained)
    clients = len(chosen)
    parts = [[pool[subjects[pool] == subject] for subject in chosen] for pool in (train, test)]
    strangers = test[~np.isin(subjects[test], trained)]
    if len(strangers):
        amount = np.bincount(labels[strangers])
        counts = apportion(amount, np.full((clients, len(amount)), 1 / clients))
        dealt = _deal(np.random.default_rng([spec.seed, STREAM]), labels, strangers, counts)
        parts[1] = [np.union1d(own, more) for own, more in zip(parts[1], dealt, strict=True)]
    for number, own, tested in zip(chosen, *parts, strict=True):
        who = f"subject {names[number] if names else number}"
        if len(own) < spec.min_samples:
            raise UserError(f"{who} has only {len(own)} training windows; lower --min-samples (now {spec.min_samples})")
        if not len(tested):
            more = "name a recording of each subject under 'test'" if spec.split == "given" else "raise --test-fraction"
            raise UserError(
                f"{who} has no test window; {more}, leave the subject out (--exclude-subjects), or choose another "
                "--partition"
            )
    return Partition(parts[0], parts[1], left_out=tuple(others.tolist()))


def _check_amounts(spec: ShardSpec, clients: int, train: int, test: int) -> None:
    if train < clients * spec.min_samples:
        raise UserError(
            f"{clients} clients need {clients * spec.min_samples} training windows ({spec.min_samples} each), "
            f"but there are {train}; lower -nc or --min-samples"
        )
    if test < clients:
        raise UserError(
            f"{clients} clients need as many test windows, but there are {test}; lower -nc or raise --test-fraction"
        )


def _shares(spec: ShardSpec, rng: np.random.Generator, amount: np.ndarray, clients: int) -> np.ndarray:
    """Return the share of each class that a client gets, (clients, classes); every column adds up to 1."""
    if spec.partition == "iid":
        return np.full((clients, len(amount)), 1 / clients)
    if spec.partition == "dirichlet":
        drawn = rng.dirichlet(np.full(clients, spec.alpha), size=len(amount)).T
        # a tiny alpha underflows to 0, and a client with share 0 in all classes could not be filled up
        return np.asarray(np.maximum(drawn, np.finfo(float).tiny))
    return _pathological(spec.classes_per_client, rng, amount, clients)


def _pathological(classes_per_client: int, rng: np.random.Generator, amount: np.ndarray, clients: int) -> np.ndarray:
    """Give each client the classes with most windows per holder so far; classes without a holder come first."""
    present = np.flatnonzero(amount)
    if classes_per_client > len(present):
        raise UserError(f"--classes-per-client {classes_per_client}: there are only {len(present)} classes")
    if clients * classes_per_client < len(present):
        raise UserError(
            f"-nc {clients} with --classes-per-client {classes_per_client} cannot hold all {len(present)} "
            "classes; raise one of them"
        )
    holds = np.zeros((clients, len(amount)), dtype=bool)
    for k in range(clients):
        holders = holds.sum(axis=0)[present]
        left = np.where(holders > 0, amount[present] / np.maximum(holders, 1), np.inf)
        chosen = np.lexsort((rng.random(len(present)), -left))[:classes_per_client]
        holds[k, present[chosen]] = True
    shares: np.ndarray = holds / np.maximum(holds.sum(axis=0), 1)
    return shares


def _deal(rng: np.random.Generator, labels: np.ndarray, pool: np.ndarray, counts: np.ndarray) -> list[np.ndarray]:
    """Draw each client's number of windows of each class at random; return ascending indices."""
    hands: list[list[np.ndarray]] = [[] for _ in counts]
    for c in range(counts.shape[1]):
        shuffled = rng.permutation(pool[labels[pool] == c])
        for hand, part in zip(hands, np.split(shuffled, np.cumsum(counts[:, c])[:-1]), strict=True):
            hand.append(part)
    return [np.sort(np.concatenate(hand)) for hand in hands]
