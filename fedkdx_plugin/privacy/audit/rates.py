"""Figures of an attack that tells members from others by a score: area, advantage, true positives at few false ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

FEW = (0.01, 0.001)  # false-positive rates at which true positives are counted (Carlini et al. 2022)
RESAMPLES = 500  # of the clients
LEVEL = 0.95  # of the intervals
POINTS = 200  # of a curve, at most


class Interval(NamedTuple):
    """Value of a figure, and a 95 % interval around it; NaN where it cannot be told."""

    value: float
    low: float = float("nan")
    high: float = float("nan")


class Curve(NamedTuple):
    """Receiver operating characteristic: rates for each threshold, both ascending from 0 to 1, (points,)."""

    false: np.ndarray
    true: np.ndarray


def curve(scores: np.ndarray, member: np.ndarray, weights: np.ndarray | None = None) -> Curve:
    """Return the rates at every threshold "score of at least"; equal scores are one threshold.

    Args:
        scores: (n,), higher for what the attack takes for a member.
        member: (n,), bool; some are members and some are not.
        weights: (n,), how often each counts; None: once.
    """
    weights = np.ones(len(scores)) if weights is None else weights
    order = np.argsort(-scores, kind="stable")
    last = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)  # of each group of equal scores
    true, false = (np.cumsum(np.where(kind, weights, 0)[order])[last] for kind in (member, ~member))
    return Curve(np.append(0, false / false[-1]), np.append(0, true / true[-1]))


def area(rates: Curve) -> float:
    """Return the area under the curve: the probability that a member scores above another window, ties half."""
    return float(np.sum(np.diff(rates.false) * (rates.true[1:] + rates.true[:-1]) / 2))


def advantage(rates: Curve) -> float:
    """Return the largest difference of true and false positives of any threshold (Yeom et al. 2018, definition 4)."""
    return float(np.max(rates.true - rates.false))


def at(rates: Curve, few: float) -> float:
    """Return the largest share of true positives with at most the share `few` of false ones."""
    return float(rates.true[rates.false <= few].max())


def figures(
    scores: np.ndarray, member: np.ndarray, clients: np.ndarray, rng: np.random.Generator
) -> dict[str, Interval]:
    """Return 'auc', 'advantage' and 'tpr_<rate>' for each rate of `FEW`, with intervals.

    Windows of one client are not independent, so the intervals come from drawing clients with replacement (percentiles
    of the bootstrap). Where there are fewer others than 1 / rate, that rate cannot be told, and its figure is NaN.

    Args:
        scores, member: see `curve`.
        clients: (n,), client of each window.
    """
    measures: dict[str, Callable[[Curve], float]] = {"auc": area, "advantage": advantage}
    others = int((~member).sum())
    for few in FEW:
        measures[f"tpr_{few:g}"] = lambda rates, few=few: at(rates, few) if others * few >= 1 else float("nan")  # type: ignore[misc]
    names, place = np.unique(clients, return_inverse=True)
    drawn = []
    for _ in range(RESAMPLES if len(names) > 1 else 0):
        weights = np.bincount(rng.integers(len(names), size=len(names)), minlength=len(names))[place]
        if weights[member].any() and weights[~member].any():
            rates = curve(scores, member, weights)
            drawn.append([measure(rates) for measure in measures.values()])
    whole = curve(scores, member)
    values = [measure(whole) for measure in measures.values()]
    limits = _percentiles(np.array(drawn)) if drawn else np.full((2, len(measures)), np.nan)
    return {
        name: Interval(value, *map(float, limits[:, i]))
        for i, (name, value) in enumerate(zip(measures, values, strict=True))
    }


def mean(values: np.ndarray, clients: np.ndarray, rng: np.random.Generator) -> Interval:
    """Return the mean of (n,) values, with an interval from drawing the clients, (n,), with replacement.

    Where every value is 0, or every value 1, all draws are alike; the interval is then that of Clopper and Pearson
    (1934) with a trial for each client.
    """
    names, place = np.unique(clients, return_inverse=True)
    if len(names) < 2:
        return Interval(float(values.mean()))
    if (values == 0).all() or (values == 1).all():
        beyond = ((1 - LEVEL) / 2) ** (1 / len(names))
        return Interval(1.0, beyond, 1.0) if values[0] else Interval(0.0, 0.0, 1 - beyond)
    sums, counts = np.bincount(place, values), np.bincount(place)
    drawn = rng.integers(len(names), size=(RESAMPLES, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = _percentiles(means[:, None])[:, 0]
    return Interval(float(values.mean()), float(low), float(high))


def thinned(rates: Curve) -> Curve:
    """Return a curve of at most about `POINTS` points that looks the same, also near 0 on a logarithmic axis."""
    if len(rates.false) <= POINTS:
        return rates
    places = np.concatenate([np.linspace(0, 1, POINTS // 2), np.geomspace(1e-4, 1, POINTS // 2)])
    kept = np.unique(np.searchsorted(rates.false, places).clip(max=len(rates.false) - 1))
    kept = np.union1d(kept, [0, len(rates.false) - 1])
    return Curve(rates.false[kept], rates.true[kept])


def _percentiles(drawn: np.ndarray) -> np.ndarray:
    limits: np.ndarray = np.percentile(drawn, [50 * (1 - LEVEL), 50 * (1 + LEVEL)], axis=0)
    return limits
