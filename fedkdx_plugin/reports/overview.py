"""Overview tables, over all sections of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fedkdx_plugin.engine.evaluation import SERVED
from fedkdx_plugin.engine.participation import UNSEEN, measured
from fedkdx_plugin.reports import ranks
from fedkdx_plugin.reports.content import METRICS, last, whole_run
from fedkdx_plugin.reports.sections import CEILING, Section, slug
from fedkdx_plugin.reports.statistics import spread
from fedkdx_plugin.reports.tables import NONE, Cell, Table, number, plain, ranked
from fedkdx_plugin.results.runs import Run

ABREAST = 4  # most sections whose four metrics are side by side, as in the paper's tables
FEW = 3  # most methods for which the table has one row for each section and method
USUAL = "usual options"
Reader = Callable[[Run], float]  # a metric of a run
CAPTION = "mean ± standard deviation over seeds. Bold: best, underlined: second."


def overview(sections: Sequence[Section]) -> list[Table]:
    """Return the tables over all sections, and the one of mean ranks; [] for a single section."""
    return [*_results(sections), *ranks.overview(sections)] if len(sections) > 1 else []


def _results(sections: Sequence[Section]) -> list[Table]:
    """Return one table in the paper's layout if it fits; else for each data set one table, or one for each metric."""
    methods = list(dict.fromkeys(method.name for section in sections for method in section.methods))
    if len(sections) <= ABREAST:
        return [_abreast(sections, methods)]
    by_data: dict[str, list[Section]] = {}
    for section in sections:
        by_data.setdefault(section.data, []).append(section)
    if len(methods) <= FEW:
        return [_downwards(same) for same in by_data.values()]
    return [_across(same, metric) for same in by_data.values() for metric in METRICS]


def _abreast(sections: Sequence[Section], methods: Sequence[str]) -> Table:
    """Return a table with the four metrics of all sections side by side."""
    columns = [_column(section, methods, _served(metric)) for section in sections for metric in METRICS]
    heads = [(section.title, head.removesuffix(" %")) for section in sections for head in METRICS.values()]
    return Table("overview", f"Last round, %, {CAPTION}", [("", "method"), *heads], _rows(methods, columns))


def _across(sections: Sequence[Section], metric: str) -> Table:
    """Return a table of one metric in all sections of a data set, with the methods' mean rank."""
    methods = list(dict.fromkeys(method.name for section in sections for method in section.methods))
    heads: list[tuple[str, str]] = []
    columns = []
    for section in sections:
        name, readers = section.particular or USUAL, _readers(section, metric)
        for group, read in readers.items():
            heads.append((name, group) if len(readers) > 1 else ("", name))
            columns.append(_column(section, methods, read))
    caption = f"{sections[0].data}: {METRICS[metric].removesuffix(' %')} in the last round, %, {CAPTION}"
    found = ranks.mean_ranks([ranks.values_of(section, metric) for section in sections])
    if found:
        heads.append(("", "mean rank"))
        columns.append([plain(found[name], digits=1) if name in found else Cell(NONE) for name in methods])
        caption += " Mean rank: over the sections, of the methods that all of them have; 1 is best."
    name = slug(f"overview-{sections[0].data}-{metric}")
    return Table(name, caption, [("", "method"), *heads], _rows(methods, columns))


def _downwards(sections: Sequence[Section]) -> Table:
    """Return a table with one row for each section and method of a data set."""
    rows = []
    for section in sections:
        for method in section.methods:
            name, cells = section.particular or USUAL, [number(last(method, metric), 100) for metric in METRICS]
            rows.append([Cell(name), Cell(method.name), *cells, number(whole_run(method), digits=0)])
    heads = ("options", "method", *METRICS.values(), "whole run, s")
    caption = f"{sections[0].data}: last round, mean ± standard deviation over seeds."
    return Table(slug(f"overview-{sections[0].data}"), caption, [("", head) for head in heads], rows)


def _served(metric: str) -> Reader:
    """Return a reader of a metric of all clients that can train."""
    return lambda run: float(getattr(run.evaluated[-1].metrics[SERVED], metric))


def _readers(section: Section, metric: str) -> dict[str, Reader]:
    """Return readers of a metric by group: of all clients that can train, and of the clients set apart."""
    readers = {"all": _served(metric)}
    groups = section.first.groups
    if UNSEEN in groups:
        readers[UNSEEN] = _unseen(metric)
    for group in measured(groups):
        if metric == "accuracy":  # the other metrics of a group do not follow from those of its clients
            readers[group] = _accuracy_of(group)
    return readers


def _accuracy_of(group: str) -> Reader:
    """Return a reader of the accuracy of a group of clients."""
    return lambda run: run.evaluated[-1].metrics[SERVED].accuracy_of(run.groups[group])


def _unseen(metric: str) -> Reader:
    """Return a reader of a metric of unseen clients; NaN for a method that has no model for them."""

    def read(run: Run) -> float:
        view = run.evaluated[-1].metrics.get(UNSEEN)
        return float(np.nan if view is None else getattr(view, metric))

    return read


def _column(section: Section, methods: Sequence[str], read: Reader) -> list[Cell]:
    """Return the cells of a section, one for each method, with ranks."""
    own = {method.name: number(spread([read(run) for run in method.runs]), 100) for method in section.methods}
    return ranked([own.get(name, Cell(NONE)) for name in methods], _competing(methods))


def _competing(methods: Sequence[str]) -> list[int]:
    """Return the positions of the methods that are ranked."""
    return [i for i, name in enumerate(methods) if name != CEILING]


def _rows(methods: Sequence[str], columns: Sequence[Sequence[Cell]]) -> list[list[Cell]]:
    """Return the rows of a table from its columns."""
    return [[Cell(name), *cells] for name, *cells in zip(methods, *columns, strict=True)]
