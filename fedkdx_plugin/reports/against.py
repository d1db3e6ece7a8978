"""Tables of each reference of a section against all other methods: tests, and differences seed by seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedkdx_plugin.reports import statistics
from fedkdx_plugin.reports.people import same_clients
from fedkdx_plugin.reports.sections import Method, Section, slug
from fedkdx_plugin.reports.statistics import BySeed, Test, spread
from fedkdx_plugin.reports.tables import NONE, Cell, Table, number, plain

EACH = 5  # most seeds whose differences are written one by one
VERDICTS = {1: "yes", 0: "no", -1: "worse", None: "one seed decides nothing"}
CHANCE = (
    f"Below {statistics.LEVEL}, such a difference is unlikely to come from chance alone; above it, these runs show no "
    "difference between the methods, which does not mean that they are equal."
)
CLIENTS = (
    "Clients of one run share its models and are not independent, so p is too small by an unknown factor; and pairs of "
    "clients do not show how much results would change with other seeds, which the differences by seed do."
)
DRAWN_ANEW = (
    "Each seed divides the windows among other clients, so that clients cannot be followed from seed to seed: pairs "
    f"are seeds, and fewer than {statistics.PAIRS} cannot give a p below {statistics.LEVEL}."
)
SEVERAL = (
    "Each of these tables of tests is corrected for its own comparisons: a claim that takes from several of them needs "
    "a correction for the comparisons of all."
)


def significance(section: Section) -> list[str | Table]:
    """Return the tables of all references, each followed by an explanation, or why there are none."""
    if not section.references:
        return ["None of the methods that were named as reference takes part here, so there are no comparisons."]
    parts: list[str | Table] = []
    for reference, name in zip(section.references, _file_names(section.references), strict=True):
        parts += _compared(section, reference, name)
    return [*parts, SEVERAL] if len(section.references) > 1 else parts


def _file_names(references: Sequence[Method]) -> list[str]:
    """Return a part of file names for each reference; FedKDX+ and FedKDX have different ones."""
    names: list[str] = []
    for place, method in enumerate(references, 1):
        name = slug(method.name.replace("+", " plus "))
        names.append(f"{name}-{place}" if name in names else name)
    return names


def _compared(section: Section, reference: Method, name: str) -> list[str | Table]:
    """Return the tables of one reference, with explanations."""
    if len(section.methods) < 2:
        return ["Significance cannot be tested. There is nothing to compare with."]
    tests, untested = statistics.tests(section, reference)
    parts: list[str | Table] = []
    if tests:
        parts.append(_tests(section, reference, tests, f"{section.slug}-significance-{name}"))
    found = statistics.by_seed(section, reference, tests)
    return [
        *parts,
        _meaning(section, reference, tests, untested),
        _differences(section, reference, found, f"{section.slug}-differences-{name}"),
    ]


def _tests(section: Section, reference: Method, tests: Sequence[Test], name: str) -> Table:
    """Return the table of significance tests."""
    rows = [
        [
            Cell(test.name),
            Cell(f"{test.pairs} {test.over}", test.pairs),
            plain(100 * test.difference, sign=True),
            Cell(f"{test.better} / {test.pairs - test.better - test.worse} / {test.worse}"),
            _p(test.p),
            _p(test.corrected),
            Cell(_outcome(test)),
        ]
        for test in tests
    ]
    counts = f"{reference.name} better / equal / worse"
    heads = ("against", "pairs", "difference, points", counts, "p", "p, Holm", "the test favours")
    caption = f"{section.title}: tests of the accuracy of {reference.name}, differences: {reference.name} minus method."
    return Table(name, caption, [("", head) for head in heads], rows)


def _outcome(test: Test) -> str:
    """Return which of the two the test favours, in words."""
    if not test.significant:
        return "neither"
    return {1: "the reference", -1: "the method", 0: "neither"}[test.favours]


def _meaning(section: Section, reference: Method, tests: Sequence[Test], untested: Sequence[str]) -> str:
    """Return what the tests of a reference mean, and which methods were not tested and why."""
    same, left_out = same_clients(section.runs), ""
    if untested:
        left_out = (
            f"Fewer than {statistics.PAIRS} pairs, so not tested against {reference.name}: {', '.join(untested)}."
        )
    if not tests:
        return " ".join(["Significance cannot be tested.", *([] if same else [DRAWN_ANEW]), left_out])
    kinds = {test.over for test in tests}
    by_client = "by client, whose accuracies are averaged over the seeds that both methods have"
    sentences = [
        f"Accuracy of {reference.name} in the last round, paired with each other method's "
        + (f"by seed where both have at least {statistics.PAIRS} in common, else " if len(kinds) > 1 else "")
        + (f"{by_client}." if "clients" in kinds else "by seed."),
        "p: Wilcoxon signed-rank test, two-sided; corrected by Holm for the "
        f"{len(tests)} comparison{'s' * (len(tests) > 1)} of this table.",
        CHANCE,
        *([CLIENTS] if "clients" in kinds else []),
        *([] if same else [DRAWN_ANEW]),
    ]
    most = max(test.pairs for test in tests)
    if statistics.smallest_p(most) * len(tests) >= statistics.LEVEL:
        sentences.append(f"With {most} pairs and {len(tests)} comparisons, no difference can be significant.")
    return " ".join([*sentences, *([left_out] if left_out else [])])


def _differences(section: Section, reference: Method, found: Sequence[BySeed], name: str) -> Table:
    """Return the table of differences seed by seed, and of what may be called better."""
    heads = ("against", "seeds", "mean difference, points", "of each seed", "better in", "p, Holm", "better")
    rows = []
    for one in found:
        points, count = 100 * one.differences, len(one.differences)
        rows.append(
            [
                Cell(one.name),
                Cell(str(count), count),
                number(spread(list(points)), sign=True),
                Cell(_listed(points)),
                Cell(f"{one.better} of {count}" if count else NONE),
                _p(one.test.corrected) if one.test else Cell(NONE),
                Cell(VERDICTS[one.verdict] if count else NONE),
            ]
        )
    caption = (
        f"{section.title}: {reference.name} minus each other method, accuracy in the last round, percentage points, in "
        "the seeds that both have on the same data: mean ± standard deviation, and each seed's (with more than "
        f"{EACH}: lowest … highest). p: of the test, corrected; – without one. Better: yes if {reference.name} is "
        f"better in the mean over seeds, in every seed, and by the test (p below {statistics.LEVEL}); worse if it is "
        "worse by all three; else no. One seed decides nothing, whatever its p."
    )
    return Table(name, caption, [("", head) for head in heads], rows)


def _listed(points: np.ndarray) -> str:
    """Return the differences of all seeds in their order, or of many the lowest and the highest."""
    if not len(points):
        return NONE
    if len(points) > EACH:
        return " … ".join(plain(float(value), sign=True).text for value in (points.min(), points.max()))
    return ", ".join(plain(float(value), sign=True).text for value in points)


def _p(value: float) -> Cell:
    """Return the cell of a p-value."""
    return Cell(f"{value:.3f}" if value >= 0.001 else "< 0.001", value)
