"""Mean ranks of methods over the sections of a report, with tests of them.

Demšar, Statistical comparisons of classifiers over multiple data sets, 2006.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import friedmanchisquare, rankdata, studentized_range

from fedkdx_plugin.reports.content import METRICS, last
from fedkdx_plugin.reports.sections import CEILING, Section
from fedkdx_plugin.reports.statistics import LEVEL
from fedkdx_plugin.reports.tables import NONE, Cell, Table, plain

FEWEST = 3  # methods for Friedman's test
DIGITS = 2  # of percentages in tables: what reads the same ranks the same
Values = Mapping[str, float]  # method -> metric


class Friedman(NamedTuple):
    """Friedman's test and Nemenyi's critical difference.

    Attributes:
        methods, blocks: numbers of methods, and of the sections or data sets in which they were ranked.
        p: p-value of Friedman's test (chi-square), with correction for ties; 1 if all values are equal.
        critical: least difference of two mean ranks that is significant at `LEVEL`, corrected for all pairs.
    """

    methods: int
    blocks: int
    p: float
    critical: float


def values_of(section: Section, metric: str) -> dict[str, float]:
    """Return a metric of each method in the last round, %, mean over seeds, as shown; those without it are left out."""
    found = {method.name: last(method, metric).mean for method in section.methods if method.name != CEILING}
    return {name: round(100 * value, DIGITS) for name, value in found.items() if not np.isnan(value)}


def in_all(blocks: Sequence[Values]) -> list[str]:
    """Return the methods that have a value in every block, in the order of the first."""
    return [name for name in blocks[0] if all(name in values for values in blocks)]


def mean_ranks(blocks: Sequence[Values]) -> dict[str, float]:
    """Return the mean rank of each method that every block has; {} if there are fewer than two.

    1 is the best, which is the highest value; equal values share the mean of their ranks.
    """
    names = in_all(blocks)
    if len(names) < 2:
        return {}
    ranks = rankdata(-_matrix(blocks, names), axis=0).mean(axis=1)
    return dict(zip(names, ranks.tolist(), strict=True))


def friedman(blocks: Sequence[Values]) -> Friedman | None:
    """Test whether the methods that every block has differ; None with fewer than `FEWEST` of them, or one block."""
    names = in_all(blocks)
    if len(names) < FEWEST or len(blocks) < 2:
        return None
    values = _matrix(blocks, names)
    equal = (values == values[0]).all()
    p = 1.0 if equal else float(friedmanchisquare(*values).pvalue)
    return Friedman(len(names), len(blocks), p, critical_difference(len(names), len(blocks)))


def critical_difference(methods: int, blocks: int) -> float:
    """Return Nemenyi's critical difference of two mean ranks at `LEVEL`: q √(k (k + 1) / (6 N)).

    k is the number of methods, N of blocks, and q √2 the quantile of the studentized range of k values.
    """
    q = studentized_range.ppf(1 - LEVEL, methods, np.inf) / np.sqrt(2)
    return float(q * np.sqrt(methods * (methods + 1) / (6 * blocks)))


def _matrix(blocks: Sequence[Values], names: Sequence[str]) -> np.ndarray:
    """Return (methods, blocks) values."""
    return np.array([[values[name] for values in blocks] for name in names])


def by_data(sections: Sequence[Section], metric: str) -> list[dict[str, float]]:
    """Return for each data set the methods' mean ranks over its sections, negative, so that the highest is the best.

    Of a method that some section lacks, there is none.
    """
    names = in_all([values_of(section, metric) for section in sections])
    found = []
    for data in dict.fromkeys(section.data for section in sections):
        own = [values_of(section, metric) for section in sections if section.data == data]
        ranks = mean_ranks([{name: values[name] for name in names} for values in own])
        found.append({name: round(-rank, 9) for name, rank in ranks.items()})
    return found


def overview(sections: Sequence[Section]) -> list[Table]:
    """Return the table of mean ranks over all sections, with tests; [] with too few sections or methods for tests.

    Sections measured on validation windows are not ranked together with those on test windows.
    """
    tested = [section for section in sections if section.on == "test"]
    sections = tested or sections
    blocks = {metric: [values_of(section, metric) for section in sections] for metric in METRICS}
    test = friedman(blocks["accuracy"]) if sections else None
    if test is None:
        return []
    ranks = {metric: mean_ranks(own) for metric, own in blocks.items()}
    counts = {name: sum(name in own for own in blocks["accuracy"]) for own in blocks["accuracy"] for name in own}
    rows = [
        [
            Cell(name),
            Cell(f"{counts[name]} of {len(sections)}", counts[name]),
            *(plain(own[name]) if name in own else Cell(NONE) for own in ranks.values()),
        ]
        for name in sorted(counts, key=lambda name: ranks["accuracy"].get(name, np.inf))
    ]
    heads = [("", "method"), ("", "sections"), *(("mean rank", head.removesuffix(" %")) for head in METRICS.values())]
    return [Table("overview-ranks", _caption(sections, test), heads, rows)]


def _caption(sections: Sequence[Section], test: Friedman) -> str:
    """Return what the table of mean ranks shows, and what its tests mean."""
    ceiling = any(method.name == CEILING for section in sections for method in section.methods)
    said = [
        f"Mean rank in the last round over {test.blocks} sections, among the {test.methods} methods that all of them "
        f"have; {NONE}: not in all of them. 1 is the best; equal values share the mean of their ranks (Demšar 2006)."
        + (f" {CEILING} is not ranked." if ceiling else ""),
        f"Accuracy, over the sections: {_meaning(test)}",
    ]
    data = len({section.data for section in sections})
    if data < len(sections):
        said.append(
            "This takes sections as independent. Sections of one data set are not, as they share its recordings: p is "
            "too small and the critical difference too narrow by an unknown factor."
        )
        whole = friedman(by_data(sections, "accuracy"))
        said.append(
            f"Over the {data} data sets, each with its mean rank over its sections: {_meaning(whole)}"
            if whole
            else "With one data set, nothing can be said of others."
        )
    return " ".join(said)


def _meaning(test: Friedman) -> str:
    """Return the outcome of a test in words."""
    p = f"= {test.p:.3f}" if test.p >= 0.001 else "< 0.001"
    chance = f"Friedman's test has p {p} (by chi-square, rough with fewer than ten of them)"
    if test.p >= LEVEL:
        return f"{chance}: these ranks show no difference between the methods."
    least = f"the critical difference (Nemenyi, {LEVEL}) is {test.critical:.2f}"
    if test.critical > test.methods - 1:
        return f"{chance}: not all methods are equal, but {least}, more than any two mean ranks can differ by."
    return f"{chance}: not all methods are equal; {least}: two whose mean ranks are nearer are not shown to differ."
