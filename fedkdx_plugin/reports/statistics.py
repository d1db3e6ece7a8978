"""Metrics over seeds and clients, and significance tests."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedkdx_plugin.engine.evaluation import SERVED
from fedkdx_plugin.engine.metrics import Metrics
from fedkdx_plugin.reports.sections import Method, Section
from fedkdx_plugin.results.runs import Run

LEVEL = 0.05
LEVELS = (10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99)  # accuracies that may be targets, %
TARGETS = 3  # of them in a table
PAIRS = 6  # with fewer, the smallest p that a signed-rank test can give, 2 / 2^n, is above LEVEL


class Spread(NamedTuple):
    """Mean and standard deviation (ddof 1; NaN of one value) of `n` values."""

    mean: float
    std: float
    n: int


def spread(values: Sequence[float]) -> Spread:
    """Return the mean and standard deviation of all values that are not NaN."""
    known = np.array([value for value in values if not np.isnan(value)], dtype=float)
    mean = known.mean() if len(known) else np.nan
    return Spread(float(mean), float(known.std(ddof=1)) if len(known) > 1 else float("nan"), len(known))


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number m (Holm 1979): the k-th smallest times m + 1 - k, non-decreasing."""
    corrected, highest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = highest
    return corrected


@dataclass(frozen=True)
class Test:
    """Comparison of a method with the section's reference.

    Attributes:
        name: name of the method.
        over: kind of pairs: 'seeds' or 'clients'.
        pairs: number of pairs.
        better, worse: pairs in which the method is above, and below, the reference.
        difference: mean accuracy of the pairs, method minus reference, in [-1, 1].
        p: p-value of the Wilcoxon signed-rank test, two-sided; 1 if no pair differs.
        corrected: p corrected by Holm over all methods of the section.
    """

    name: str
    over: str
    pairs: int
    better: int
    worse: int
    difference: float
    p: float
    corrected: float

    @property
    def significant(self) -> bool:
        """Whether the corrected p-value is below `LEVEL`."""
        return self.corrected < LEVEL


def tests(section: Section) -> tuple[list[Test], list[str]]:
    """Compare every method's accuracy in the last round with the reference's; also name those that cannot be tested.

    Pairs are the seeds of both methods if there are enough, else clients, their accuracies averaged over those seeds.
    """
    reference = section.reference
    paired = {m.name: _differences(m, reference) for m in section.methods if m is not reference}
    tested = {name: pair for name, pair in paired.items() if len(pair[1]) >= PAIRS}
    p = [_wilcoxon(differences) for _, differences in tested.values()]
    results = [
        Test(name, over, len(d), int((d > 0).sum()), int((d < 0).sum()), float(d.mean()), raw, corrected)
        for (name, (over, d)), raw, corrected in zip(tested.items(), p, holm(p), strict=True)
    ]
    return results, [name for name in paired if name not in tested]


def _differences(method: Method, reference: Method) -> tuple[str, np.ndarray]:
    """Return the kind of pairs, 'seeds' or 'clients', and for each the method's accuracy minus the reference's."""
    seeds = set(method.seeds) & set(reference.seeds)
    if len(seeds) >= PAIRS:
        own, other = (np.array([one.accuracy for one in _last(m, seeds)]) for m in (method, reference))
        return "seeds", _difference(own, other)
    if not seeds:
        return "clients", np.empty(0)
    own, other = (client_mean(np.array([one.client_accuracy for one in _last(m, seeds)])) for m in (method, reference))
    return "clients", _difference(own, other)


def _difference(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the differences of known pairs, rounded so that sums in another order do not differ."""
    difference: np.ndarray = np.round(own - other, 12)
    known: np.ndarray = difference[~np.isnan(difference)]
    return known


def _last(method: Method, seeds: Collection[int]) -> list[Metrics]:
    """Return the metrics of the last round with each of these seeds."""
    return [run.evaluated[-1].metrics[SERVED] for run in method.runs if run.seed in seeds]


def client_mean(values: np.ndarray) -> np.ndarray:
    """Average (seeds, clients) to (clients,), over the seeds for which a client has a value; NaN if none."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0).sum(axis=0)
    mean = np.full(values.shape[1], np.nan)
    np.divide(total, known.sum(axis=0), out=mean, where=known.any(axis=0))
    return mean


def _wilcoxon(differences: np.ndarray) -> float:
    """Return the p-value of the two-sided signed-rank test; 1 if all differences are 0."""
    from scipy.stats import wilcoxon

    return float(wilcoxon(differences).pvalue) if differences.any() else 1.0


def per_client(method: Method) -> np.ndarray:
    """Return (clients,): accuracy in the last round, mean over seeds; NaN for a client without test windows."""
    return client_mean(np.array([one.client_accuracy for one in _last(method, method.seeds)]))


def sent(run: Run) -> np.ndarray:
    """Return (rounds,): megabytes (10^6 bytes) sent until the end of each round, up and down, by all clients."""
    return np.cumsum([record.bytes_up + record.bytes_down for record in run.records]) / 1e6


def reached(run: Run, target: float) -> tuple[int, float] | None:
    """Return the first evaluated round with an accuracy of at least `target`, and megabytes until then, or None."""
    for record in run.evaluated:
        if record.metrics[SERVED].accuracy >= target:
            return record.round, float(sent(run)[record.round - 1])
    return None


def targets(section: Section) -> dict[str, float]:
    """Return target accuracies, name -> share: the highest `LEVELS` that some run reaches, and one of FedAvg's.

    That is 99 % of its best accuracy, the mean over seeds, if it takes part. None is at or below `chance`.
    """
    bests = {method.name: [best_round(run)[1] for run in method.runs] for method in section.methods}
    most = max(value for values in bests.values() for value in values)
    fixed = {f"{level} %": level / 100 for level in LEVELS if level / 100 <= most}
    chosen = dict(list(fixed.items())[-TARGETS:])
    if own := bests.get("FedAvg"):
        mean = float(np.mean(own))
        chosen[f"99 % of FedAvg's best ({99 * mean:.1f} %)"] = 0.99 * mean
    least = max(map(chance, section.methods[0].runs))
    return {name: target for name, target in chosen.items() if target > least}


def chance(run: Run) -> float:
    """Return the accuracy that needs no training: the share of the largest class, or 1 / classes where that is more.

    Of all clients' windows in the last evaluation together.
    """
    matrix = run.confusion[SERVED]  # (clients, true, predicted)
    of_class = matrix.sum(axis=(0, 2))
    return float(max(of_class.max() / max(of_class.sum(), 1), 1 / len(of_class)))


def best_round(run: Run) -> tuple[int, float]:
    """Return the first round of the highest accuracy, and that accuracy."""
    best = max(run.evaluated, key=lambda record: record.metrics[SERVED].accuracy)
    return best.round, best.metrics[SERVED].accuracy


def smallest_p(pairs: int) -> float:
    """Return the smallest p-value that the signed-rank test can give for this number of pairs."""
    return 2.0 ** (1 - pairs)
