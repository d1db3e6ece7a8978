"""Tables of each reference of a section against all other methods: tests, and differences seed by seed."""

from __future__ import annotations

from collections.abc import Sequence

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
    "clients do not show how much results would change with other seeds, which the differences by seed do. In pairs of "
    "clients, each client has the same weight; in differences by seed, each window."
)
DRAWN_ANEW = (
    "Each seed has data of its own, in which clients are not known to be the same subjects, so that none can be "
    f"followed from seed to seed: pairs are seeds, and fewer than {statistics.PAIRS} cannot give a p below "
    f"{statistics.LEVEL}."
)
SEVERAL = (
    "Each of these tables of tests is corrected for its own comparisons: a claim that takes from several of them needs "
    "a correction for the comparisons of all."
)


def significance(section: Section) -> list[str | Table]:
    """Return the tables of all references, and what they mean; or why there are none."""
    if not section.references:
        return ["None of the methods that were named as reference takes part here, so there are no comparisons."]
    if len(section.methods) < 2:
        return ["Significance cannot be tested: there is nothing to compare with."]
    parts: list[str | Table] = []
    done: list[Test] = []
    for reference, name in zip(section.references, _file_names(section.references), strict=True):
        tests, untested = statistics.tests(section, reference)
        if tests:
            parts.append(_tests(section, reference, tests, f"{section.slug}-significance-{name}"))
        found = statistics.by_seed(section, reference, tests)
        parts.append(_differences(section, reference, found, f"{section.slug}-differences-{name}"))
        parts += _limits(reference, tests, untested)
        done += tests
    return [*parts, _meaning(section, done)]


def _file_names(references: Sequence[Method]) -> list[str]:
    """Return a part of file names for each reference; FedKDX+ and FedKDX have different ones."""
    names: list[str] = []
    for place, method in enumerate(references, 1):
        name = slug(method.name.replace("+", " plus "))
        names.append(f"{name}-{place}" if name in names else name)
    return names


def _tests(section: Section, reference: Method, tests: Sequence[Test], name: str) -> Table:
    """Return the table of significance tests."""
    rows = [
        [
            Cell(test.name),
            Cell(f"{test.pairs} {test.over}", test.pairs),
            plain(round(100 * test.difference, 9), sign=True),
            Cell(f"{test.better} / {test.pairs - test.better - test.worse} / {test.worse}"),
            _p(test.p),
            _p(test.corrected),
            Cell({1: reference.name, -1: test.name}.get(test.favours if test.significant else 0, "neither")),
        ]
        for test in tests
    ]
    counts = f"{reference.name} better / equal / worse"
    heads = ("against", "pairs", "difference, points", counts, "p", "p, Holm", "the test favours")
    caption = (
        f"{section.title}: accuracy in the last round, {reference.name} against each other method: mean difference of "
        f"the pairs ({reference.name} minus method) and Wilcoxon's signed-rank test, corrected by Holm for the "
        f"{len(tests)} comparison{'s' * (len(tests) > 1)} here."
    )
    return Table(name, caption, [("", head) for head in heads], rows)


def _limits(reference: Method, tests: Sequence[Test], untested: Sequence[str]) -> list[str]:
    """Return which methods were not tested against a reference, and whether no test could be significant."""
    said = []
    if untested:
        names = ", ".join(untested)
        said.append(f"Not tested against {reference.name}, as there are fewer than {statistics.PAIRS} pairs: {names}.")
    most = max((test.pairs for test in tests), default=0)
    if tests and statistics.smallest_p(most) * len(tests) >= statistics.LEVEL:
        said.append(f"With {most} pairs and {len(tests)} comparisons, no difference can be significant.")
    return [" ".join(said)] if said else []


def _meaning(section: Section, tests: Sequence[Test]) -> str:
    """Return what is compared in the tables of tests, what a pair is, and what follows from p."""
    kinds, said = {test.over for test in tests}, []
    if tests:
        by_client = "by client, whose accuracies are averaged over the seeds that both methods have"
        both = f"by seed where both have at least {statistics.PAIRS} in common, else {by_client}"
        said = [
            "Accuracies in the last round are paired "
            + (both if len(kinds) > 1 else by_client if "clients" in kinds else "by seed")
            + ". p: Wilcoxon signed-rank test, two-sided; corrected by Holm for all comparisons of a table.",
            CHANCE,
        ]
    said += [CLIENTS] if "clients" in kinds else []
    said += [] if same_clients(section.runs) else [DRAWN_ANEW]
    said += [SEVERAL] if tests and len(section.references) > 1 else []
    return " ".join(said or [f"Fewer than {statistics.PAIRS} pairs cannot give a p below {statistics.LEVEL}."])


def _differences(section: Section, reference: Method, found: Sequence[BySeed], name: str) -> Table:
    """Return the table of differences seed by seed, and of what may be called better."""
    seeds = sorted({seed for one in found for seed in one.differences})
    titles = tuple(map(str, seeds)) if len(seeds) <= EACH else ("lowest", "highest")
    rows = []
    for one in found:
        points, count = {seed: 100 * value for seed, value in one.differences.items()}, len(one.differences)
        of_seeds = [points.get(seed) for seed in seeds]
        if len(seeds) > EACH:
            of_seeds = [min(points.values(), default=None), max(points.values(), default=None)]
        rows.append(
            [
                Cell(one.name),
                Cell(str(count), count),
                number(spread(list(points.values())), sign=True),
                *(Cell(NONE) if value is None else plain(round(value, 9), sign=True) for value in of_seeds),
                Cell(f"{one.better} of {count}", one.better) if count else Cell(NONE),
                _p(one.test.corrected) if one.test else Cell(NONE),
                Cell(VERDICTS[one.verdict] if count else NONE),
            ]
        )
    caption = (
        f"{section.title}: {reference.name} minus each other method, accuracy in the last round, points, in the seeds "
        f"that both have on the same data: mean ± standard deviation, and of each seed (of more than {EACH}: lowest "
        f"and highest). Better: yes where {reference.name} is better in the mean over seeds, in every seed, and by the "
        f"test (p below {statistics.LEVEL}), worse where it is worse by all three, else no. One seed decides nothing."
    )
    difference = ("difference in points", "difference with seed" if len(seeds) <= EACH else "difference of a seed")
    heads = [("", "against"), ("", "seeds"), (difference[0], "mean"), *((difference[1], title) for title in titles)]
    heads += [("", "better in seeds"), ("", "p, Holm"), ("", "better")]
    return Table(name, caption, heads, rows)


def _p(value: float) -> Cell:
    """Return the cell of a p-value."""
    return Cell(f"{value:.3f}" if value >= 0.001 else "< 0.001", value)
