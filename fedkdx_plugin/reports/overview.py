"""All sections of a report at a glance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import rankdata

from fedkdx_plugin.engine.evaluation import SERVED
from fedkdx_plugin.engine.participation import UNSEEN
from fedkdx_plugin.reports.content import METRICS, last, whole_run
from fedkdx_plugin.reports.sections import CEILING, Section, slug
from fedkdx_plugin.reports.statistics import spread
from fedkdx_plugin.reports.tables import NONE, Cell, Table, number, plain, ranked
from fedkdx_plugin.results.runs import Run

ABREAST = 4  # sections whose four metrics stand side by side, as in the paper's tables
FEW = 3  # methods for which there is a row a section instead
USUAL = "usual setting"
CAPTION = "mean ± standard deviation over seeds. Bold: best, underlined: second."


def overview(sections: Sequence[Section]) -> list[Table]:
    """The paper's layout where it fits, else a table a data set: one of each metric, or with a row a section."""
    if len(sections) < 2:
        return []
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
    columns = [_column(section, methods, _served(metric)) for section in sections for metric in METRICS]
    heads = [(section.title, head.removesuffix(" %")) for section in sections for head in METRICS.values()]
    return Table("overview", f"Last round, %, {CAPTION}", [("", "method"), *heads], _rows(methods, columns))


def _across(sections: Sequence[Section], metric: str) -> Table:
    """One metric in all settings of a data set, and the methods' mean rank in them."""
    methods = list(dict.fromkeys(method.name for section in sections for method in section.methods))
    heads, columns, main = [], [], []
    for section in sections:
        name, figures = section.setting or USUAL, _figures(section, metric)
        main.append(_column(section, methods, _served(metric)))
        for group, figure in figures.items():
            heads.append((name, group) if len(figures) > 1 else ("", name))
            columns.append(_column(section, methods, figure))
    caption = f"{sections[0].data}: {METRICS[metric].removesuffix(' %')} in the last round, %, {CAPTION}"
    ranks = _mean_ranks(methods, main)
    if any(cell.value is not None for cell in ranks):
        heads.append(("", "mean rank"))
        columns.append(ranks)
        caption += " Mean rank: over the settings, of the methods that all of them have; 1 is best."
    name = slug(f"overview-{sections[0].data}-{metric}")
    return Table(name, caption, [("", "method"), *heads], _rows(methods, columns))


def _downwards(sections: Sequence[Section]) -> Table:
    rows = []
    for section in sections:
        for method in section.methods:
            setting, figures = section.setting or USUAL, [number(last(method, metric), 100) for metric in METRICS]
            rows.append([Cell(setting), Cell(method.name), *figures, number(whole_run(method), digits=0)])
    heads = ("setting", "method", *METRICS.values(), "whole run, s")
    caption = f"{sections[0].data}: last round, mean ± standard deviation over seeds."
    return Table(slug(f"overview-{sections[0].data}"), caption, [("", head) for head in heads], rows)


def _served(metric: str) -> Callable[[Run], float]:
    return lambda run: getattr(run.evaluated[-1].metrics[SERVED], metric)


def _figures(section: Section, metric: str) -> dict[str, Callable[[Run], float]]:
    """What is to be read from a run: of all clients that can train, and of those set apart."""
    figures = {"all": _served(metric)}
    for group in section.first.groups:
        if group == UNSEEN:
            figures[group] = _strangers(metric)
        elif metric == "accuracy":  # what clients have of the others does not add up to a group's
            figures[group] = lambda run, group=group: run.evaluated[-1].metrics[SERVED].accuracy_of(run.groups[group])
    return figures


def _strangers(metric: str) -> Callable[[Run], float]:
    """Of clients never trained on; NaN for a method that has no model for them."""

    def figure(run: Run) -> float:
        view = run.evaluated[-1].metrics.get(UNSEEN)
        return np.nan if view is None else getattr(view, metric)

    return figure


def _column(section: Section, methods: Sequence[str], figure: Callable[[Run], float]) -> list[Cell]:
    own = {method.name: number(spread([figure(run) for run in method.runs]), 100) for method in section.methods}
    return ranked([own.get(name, Cell(NONE)) for name in methods], _competing(methods))


def _competing(methods: Sequence[str]) -> list[int]:
    return [i for i, name in enumerate(methods) if name != CEILING]


def _mean_ranks(methods: Sequence[str], columns: Sequence[Sequence[Cell]]) -> list[Cell]:
    """Demšar, Statistical comparisons of classifiers over multiple data sets, 2006: what is equal shares its ranks."""
    there = [i for i in _competing(methods) if all(column[i].value is not None for column in columns)]
    cells = [Cell(NONE)] * len(methods)
    if len(there) > 1:
        ranks = rankdata([[-round(column[i].value, 2) for i in there] for column in columns], axis=1).mean(0)
        for i, rank in zip(there, ranks, strict=True):
            cells[i] = plain(float(rank), digits=1)
    return cells


def _rows(methods: Sequence[str], columns: Sequence[Sequence[Cell]]) -> list[list[Cell]]:
    return [[Cell(name), *cells] for name, *cells in zip(methods, *columns, strict=True)]
