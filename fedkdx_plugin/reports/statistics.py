"""Metrics over seeds and clients, and significance tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from fedkdx_plugin.engine.evaluation import SERVED
from fedkdx_plugin.engine.metrics import Metrics
from fedkdx_plugin.reports.people import same_clients
from fedkdx_plugin.reports.sections import Method, Section
from fedkdx_plugin.results.runs import Run

LEVEL = 0.05
LEVELS = (10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99)  # accuracies that may be targets, %
TARGETS = 3  # of them in a table
EXACT = 200  # differences of which p is computed exactly, in milliseconds
PAIRS = 6  # with fewer, the smallest p that a signed-rank test can give, 2 / 2^n, is above LEVEL


class Spread(NamedTuple):
    """Mean and standard deviation (ddof 1; NaN of one value) of `n` values.

    `of` is the number of values with those that are NaN, which are left out; 0 where that is no question.
    """

    mean: float
    std: float
    n: int
    of: int = 0


def spread(values: Sequence[float]) -> Spread:
    """Return the mean and standard deviation of all values, one a seed, that are not NaN."""
    known = np.array([value for value in values if not np.isnan(value)], dtype=float)
    mean = known.mean() if len(known) else np.nan
    std = float(known.std(ddof=1)) if len(known) > 1 else float("nan")
    return Spread(float(mean), std, len(known), len(values))


def holm(p: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number m (Holm 1979): the k-th smallest times m + 1 - k, non-decreasing."""
    corrected, highest = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        highest = max(highest, min(1.0, (len(p) - rank) * p[index]))
        corrected[index] = highest
    return corrected


class Pairs(NamedTuple):
    """Differences of two methods' accuracies, one for each pair that has both.

    Attributes:
        over: kind of pairs: 'seeds' or 'clients'.
        differences: (pairs,), the first method's accuracy minus the second's, in [-1, 1].
    """

    over: str
    differences: np.ndarray


@dataclass(frozen=True)
class Test:
    """Comparison of a reference with another method, by the Wilcoxon signed-rank test.

    Attributes:
        name: name of the other method.
        over: kind of pairs: 'seeds' or 'clients'.
        pairs: number of pairs.
        better, worse: pairs in which the reference is above, and below, the method.
        difference: mean accuracy of the pairs, reference minus method, in [-1, 1].
        favours: 1 if the ranks of pairs in which the reference is better have the larger sum, -1 if the others', 0 if
            both sums are equal. The mean can have another sign.
        p: p-value of the test, two-sided; 1 if no pair differs.
        corrected: p corrected by Holm over all comparisons with the reference.
    """

    name: str
    over: str
    pairs: int
    better: int
    worse: int
    difference: float
    favours: int
    p: float
    corrected: float

    @property
    def significant(self) -> bool:
        """Whether the corrected p-value is below `LEVEL`."""
        return self.corrected < LEVEL


def tests(section: Section, reference: Method) -> tuple[list[Test], list[str]]:
    """Compare the reference's accuracy in the last round with every other method's.

    What is a pair follows from `paired`. Corrected p-values are corrected for the comparisons with this reference.

    Returns:
        the tests, in the order of methods, and the names of the methods with too few pairs for one.
    """
    same = same_clients(section.runs)
    found = {m.name: _pairs(reference, m, same) for m in section.methods if m is not reference}
    tested = {name: pairs for name, pairs in found.items() if len(pairs.differences) >= PAIRS}
    p = [signed_rank(differences) for _, differences in tested.values()]
    results = [
        Test(name, over, len(d), int((d > 0).sum()), int((d < 0).sum()), float(d.mean()), favours(d), raw, corrected)
        for (name, (over, d)), raw, corrected in zip(tested.items(), p, holm(p), strict=True)
    ]
    return results, [name for name in found if name not in tested]


def common(one: Method, other: Method) -> tuple[list[Run], list[Run]]:
    """Return the runs of both methods with the seeds that both have on the same data, ascending."""
    runs = {run.seed: run for run in other.runs}
    first = [
        run
        for run in one.runs
        if run.seed in runs and run.data["manifest_sha256"] == runs[run.seed].data["manifest_sha256"]
    ]
    return first, [runs[run.seed] for run in first]


def _last(runs: Sequence[Run]) -> list[Metrics]:
    """Return the metrics of the last round."""
    return [run.evaluated[-1].metrics[SERVED] for run in runs]


def _pairs(one: Method, other: Method, same: bool) -> Pairs:
    """Pair two methods in the last round; see `paired`."""
    own, others = common(one, other)
    return paired(_last(own), _last(others), same)


def paired(own: Sequence[Metrics], other: Sequence[Metrics], same: bool) -> Pairs:
    """Pair the accuracies of two methods, or of two networks.

    A pair is a seed if there are at least `PAIRS` of them. With fewer, it is a client, whose accuracies are averaged
    over the seeds, but only if the clients are the same with every seed. Else the pairs remain the seeds, and are too
    few for a test. Each client of each seed could be a pair as well, but these are no independent observations: the
    clients of a seed divide the same recordings and share their models, and p would fall with their number, which is
    chosen freely.

    Args:
        own, other: metrics of each seed, in the same order.
        same: whether a number names the same client in all seeds (`people.same_clients`).
    """
    if len(own) >= PAIRS or not same:
        accuracies = (np.array([one.accuracy for one in side]) for side in (own, other))
        return Pairs("seeds", _difference(*accuracies))
    if not own:
        return Pairs("clients", np.empty(0))
    clients = (over_seeds(np.array([one.client_accuracy for one in side])) for side in (own, other))
    return Pairs("clients", _difference(*clients))


def _difference(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the differences of known pairs, rounded so that sums in another order do not differ."""
    difference: np.ndarray = np.round(own - other, 12)
    known: np.ndarray = difference[~np.isnan(difference)]
    return known


def over_seeds(values: np.ndarray) -> np.ndarray:
    """Average (seeds, n) to (n,), each over the seeds that have a value; NaN if none has."""
    known = ~np.isnan(values)
    total = np.where(known, values, 0).sum(axis=0)
    mean = np.full(values.shape[1], np.nan)
    np.divide(total, known.sum(axis=0), out=mean, where=known.any(axis=0))
    return mean


def signed_rank(differences: np.ndarray) -> float:
    """Return the p-value of Wilcoxon's signed-rank test, two-sided; 1 if all differences are 0.

    Differences of 0 are left out, and equal ones share the mean of their ranks, as Wilcoxon has it. p is exact for
    these ranks: the share of all 2^n choices of signs with sums at least as far apart. Of more than `EXACT` differences
    it is the normal approximation, which with ties among a few is wrong by a factor of 2 and more.
    """
    from scipy.stats import rankdata, wilcoxon

    some = differences[differences != 0]
    if len(some) > EXACT:
        return float(wilcoxon(some, method="approx").pvalue)
    ranks = np.rint(2 * rankdata(abs(some))).astype(int)  # doubled, so that means of two are whole
    total = int(ranks.sum())
    shares = np.eye(1, total + 1)[0]  # of all choices, by the sum of the positive differences' ranks
    for rank in ranks:
        shifted = np.concatenate([np.zeros(rank), shares[:-rank]])
        shares = (shares + shifted) / 2
    apart = abs(2 * np.arange(total + 1) - total)
    observed = abs(2 * int(ranks[some > 0].sum()) - total)
    return float(shares[apart >= observed].sum())


def favours(differences: np.ndarray) -> int:
    """Return the sign of the signed ranks' sum, as the test has them: of the differences that are not 0."""
    from scipy.stats import rankdata

    some = differences[differences != 0]
    return int(np.sign(np.sign(some) @ rankdata(abs(some))))


@dataclass(frozen=True)
class BySeed:
    """Difference of a reference and another method, seed by seed.

    Attributes:
        name: name of the other method.
        differences: by seed that both have, accuracy in the last round, reference minus method.
        test: the test of both; None if there were too few pairs for one.
    """

    name: str
    differences: Mapping[int, float]
    test: Test | None

    @property
    def better(self) -> int:
        """Number of seeds in which the reference is better."""
        return sum(difference > 0 for difference in self.differences.values())

    @property
    def verdict(self) -> int | None:
        """Sign of a difference that is called one: in every seed, and so in their mean, and significant by the test.

        1 if the reference is better, -1 if it is worse, 0 if the seeds and the test do not agree that it is either;
        None with fewer than two seeds, which decide nothing.
        """
        if len(self.differences) < 2:
            return None
        signs = {int(np.sign(difference)) for difference in self.differences.values()}
        agreed = self.test is not None and self.test.significant and signs == {self.test.favours}
        return self.test.favours if self.test and agreed else 0


def by_seed(section: Section, reference: Method, tests: Sequence[Test]) -> list[BySeed]:
    """Return the differences of the reference and each other method, seed by seed, with the tests of both."""
    tested = {test.name: test for test in tests}
    found = []
    for method in section.methods:
        if method is not reference:
            runs, others = common(reference, method)
            differences = {
                run.seed: round(one.accuracy - other.accuracy, 12)
                for run, one, other in zip(runs, _last(runs), _last(others), strict=True)
            }
            found.append(BySeed(method.name, differences, tested.get(method.name)))
    return found


def per_client(method: Method, same: bool) -> dict[int | None, np.ndarray]:
    """Return (clients,) accuracies in the last round; NaN for a client without test windows.

    Args:
        method: the method.
        same: whether a number names the same client in all seeds (`people.same_clients`).

    Returns:
        the means over seeds, under None; or if clients are others with each seed, those of each seed.
    """
    values: dict[int | None, np.ndarray] = {
        run.seed: run.evaluated[-1].metrics[SERVED].client_accuracy for run in method.runs
    }
    return {None: over_seeds(np.array(list(values.values())))} if same else values


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
