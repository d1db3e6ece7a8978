"""Findings of attacks on the runs of a section: a table of methods by attack, and curves of membership inference."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dataset_utils.letters import lettered
from fedkdx_plugin.reports.looks import COLOURS, DASHES, Looks
from fedkdx_plugin.reports.plots import Plot, save, style
from fedkdx_plugin.reports.sections import Section
from fedkdx_plugin.reports.statistics import spread
from fedkdx_plugin.reports.tables import Cell, Table, number
from fedkdx_plugin.results import audits
from fedkdx_plugin.results.audits import Audit, Figure, Roc
from registry.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawing

LEAST = 1e-3  # of the axes
NAMES = {"auc": "AUC", "advantage": "advantage", "correlation": "correlation", "accuracy": "accuracy"}
HOW_TO_READ = (
    "Where nothing leaks, an AUC is 0.5 and an advantage 0; a correlation is then that with windows of other people, "
    "and an accuracy one out of the number of clients, both in brackets. Membership: 'members drawn by chance' is "
    "free of differences between training and test windows, as chance decided what was trained on. A leak that these "
    "attacks do not find may still be there."
)


def described(section: Section, folder: Path, looks: Looks) -> list[str | Table | Plot]:
    """Return the part of the report on a section's audits, and write its plot; [] if no run was audited."""
    found: dict[str, list[Audit]] = {}
    damaged: list[str | Table | Plot] = []
    for method in section.methods:
        for run in method.runs:
            try:
                if (one := audits.read(run.folder)) is not None:
                    found.setdefault(method.name, []).append(one)
            except UserError as error:
                damaged.append(f"Not in this part: {error}.")
    if not found:
        return damaged
    table = _table(section, found)
    notes = list(
        dict.fromkeys(f"{name}: {note}" for name, several in found.items() for one in several for note in one.notes)
    )
    parts: list[str | Table | Plot] = [table, HOW_TO_READ, *notes, *damaged]
    panels = _panels(found)
    if panels:
        with style(), lettered(found):
            drawing = curves(panels, {name: looks.line(name) for own in panels.values() for name in own})
            name = f"{section.slug}-audit"
            save(drawing, folder / name)
        parts.append(
            Plot(
                name,
                f"{section.title}: membership inference by {_clearest(found)}; first seed. Dotted: "
                "chance. Above it and to the left, members are found with few false alarms.",
                drawing.get_figwidth(),
            )
        )
    return parts


def main_figures(audit: Audit) -> list[Figure]:
    """Return the figure that stands for each attack on each target: of several methods, the clearest one."""
    chosen: dict[tuple[str, str], Figure] = {}
    for one in audit.figures:
        if one.name == audits.MAIN[one.attack]:
            chosen[one.attack, one.target] = one  # methods are in order, the clearest last
    return list(chosen.values())


def _clearest(found: Mapping[str, Sequence[Audit]]) -> str:
    methods = [
        one.method
        for several in found.values()
        for audit in several
        for one in main_figures(audit)
        if one.attack == audits.MEMBERSHIP
    ]
    return " or ".join(dict.fromkeys(methods))


def _table(section: Section, found: Mapping[str, Sequence[Audit]]) -> Table:
    figures = {name: [main_figures(audit) for audit in several] for name, several in found.items()}
    columns = dict.fromkeys(
        (one.attack, one.target, one.method) for several in figures.values() for own in several for one in own
    )
    heads = [("", "method"), ("", "audits")]
    heads += [(attack, f"{target}: {NAMES[audits.MAIN[attack]]}") for attack, target, _ in columns]
    rows = []
    for name, several in figures.items():
        cells = [Cell(name), Cell(str(len(several)), len(several))]
        for key in columns:
            same = [one for own in several for one in own if (one.attack, one.target, one.method) == key]
            cells.append(_cell(same))
        rows.append(cells)
    methods = dict.fromkeys(f"{attack} by {method}" for attack, _, method in columns)
    return Table(
        f"{section.slug}-audit",
        f"{section.title}: attacks on these runs, mean ± standard deviation over audited seeds. {'; '.join(methods)}.",
        heads,
        rows,
    )


def _cell(same: Sequence[Figure]) -> Cell:
    """Return the mean of a figure over seeds, followed by its chance where that is not the same for all."""
    if not same:
        return Cell("–")
    cell = number(spread([one.value for one in same]), digits=3)
    if same[0].attack == audits.MEMBERSHIP:
        return cell
    chance = f"{np.mean([one.chance for one in same]):.3f}".replace("-", "−")
    return replace(cell, text=f"{cell.text} ({chance})")


def _panels(found: Mapping[str, Sequence[Audit]]) -> dict[str, dict[str, Roc]]:
    """Return target -> method of the section -> curve of the clearest attack, of the first audited seed."""
    panels: dict[str, dict[str, Roc]] = {}
    for name, several in found.items():
        for curve in several[0].curves:  # the last of a target is the clearest
            panels.setdefault(curve.target, {})[name] = curve
    return panels


def of_run(audit: Audit) -> Drawing | None:
    """Return the plot of all membership inferences on one run; None if there are none."""
    panels: dict[str, dict[str, Roc]] = {}
    for curve in audit.curves:
        panels.setdefault(curve.target, {})[curve.method] = curve
    names = dict.fromkeys(name for own in panels.values() for name in own)
    kinds = zip(names, COLOURS, itertools.cycle(DASHES), strict=False)
    with style():
        return curves(panels, {n: {"color": c, "linestyle": d, "label": n} for n, c, d in kinds}) if panels else None


def curves(panels: Mapping[str, Mapping[str, Roc]], lines: Mapping[str, Mapping[str, object]]) -> Drawing:
    """Draw curves on logarithmic axes, which show the few false alarms that matter (Carlini et al. 2022).

    Args:
        panels: title -> name of a line -> curve.
        lines: name of a line -> matplotlib's options for it.
    """
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(2.7 * len(panels) + 0.3, 3.3 + 0.2 * len(lines)), layout="constrained")
    for place, (axes, (title, own)) in enumerate(
        zip(drawing.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels.items(), strict=True)
    ):
        for name, curve in own.items():
            axes.plot(np.maximum(curve.false, LEAST), np.maximum(curve.true, LEAST), **lines[name])
        axes.plot([LEAST, 1], [LEAST, 1], color="0.5", linestyle=":", linewidth=1)
        axes.set(xscale="log", yscale="log", xlim=(LEAST, 1), ylim=(LEAST, 1.05), title=title)
        axes.set(xlabel="others taken for members", ylabel="" if place else "members found")
    handles = {
        label: handle for axes in drawing.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    drawing.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=1 if len(panels) < 2 else 2)
    return drawing
