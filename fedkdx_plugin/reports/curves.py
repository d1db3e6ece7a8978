"""Plot of a comparison: accuracy, or another metric, over rounds and over bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dataset_utils.files import replacing
from dataset_utils.letters import lettered
from fedkdx_plugin.engine.evaluation import SERVED
from fedkdx_plugin.reports.looks import Looks
from fedkdx_plugin.reports.sections import named
from fedkdx_plugin.results.records import SHARES
from fedkdx_plugin.results.runs import Run
from registry.errors import UserError
from registry.parameters import suggest

if TYPE_CHECKING:
    from matplotlib.figure import Figure


METRICS = (*SHARES, "accuracy_std", "accuracy_worst")
FEW = 8  # methods whose legend has room within the axes
COLUMNS = 5  # of a legend below them


def plotted(runs: Sequence[Run], title: str, metric: str = "accuracy") -> Figure:
    """Plot a metric over rounds and over megabytes: mean over seeds as a line, mean ± std as a band. Needs matplotlib.

    Args:
        runs: finished runs of one comparison.
        metric: one of `METRICS`; all but the loss are shown in percent.

    Raises:
        UserError: there is no such metric.
    """
    if metric not in METRICS:
        raise UserError(f"metric: '{metric}' is unknown{suggest(metric, METRICS)}; choose from {', '.join(METRICS)}")
    methods: dict[str, list[Run]] = {}
    for name, run in named(runs):
        methods.setdefault(name, []).append(run)
    with lettered([title, *methods]):
        return _plotted(methods, title, metric)


def _plotted(methods: Mapping[str, Sequence[Run]], title: str, metric: str) -> Figure:
    from matplotlib.figure import Figure

    factor, unit = (1, "") if metric == "loss" else (100, ", %")
    names, first = list(methods), next(iter(methods.values()))[0]
    below = -(-len(names) // COLUMNS) if len(names) > FEW else 0  # lines of the legend below the axes
    figure = Figure(figsize=(9, 3.6 + 0.2 * below), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    looks = Looks(names)
    for name, same in methods.items():
        style = looks.line(name, len(first.evaluated))
        rounds = [record.round for record in same[0].records if record.metrics]
        values = factor * np.array(
            [[getattr(r.metrics[SERVED], metric) for r in run.records if r.metrics] for run in same]
        )
        sent = np.mean([_megabytes(run) for run in same], axis=0)
        mean, std = values.mean(0), values.std(0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
        left.plot(rounds, mean, **style)
        left.fill_between(rounds, mean - std, mean + std, color=style["color"], alpha=0.2, linewidth=0)
        if sent[-1] > 0.1:  # the axis is logarithmic: methods that send almost nothing are left out
            right.plot(sent, mean, **style)
    left.set(xlabel="round", ylabel=f"{first.evaluated_on} {metric}{unit}", title=title)
    if len(rounds) == 1:
        left.set_xticks(rounds)
    else:
        left.xaxis.get_major_locator().set_params(integer=True)
    right.set(xlabel="megabytes sent, up and down", xscale="log", title="the same over megabytes")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    if below:
        figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=COLUMNS, fontsize="small")
    else:
        left.legend()
    return figure


def draw(path: Path, runs: Sequence[Run], title: str) -> None:
    """Write the plot to a file, whose ending determines the format."""
    with lettered([title, *(name for name, _ in named(runs))]), replacing(path) as part:
        plotted(runs, title).savefig(part, dpi=150)


def _megabytes(run: Run) -> np.ndarray:
    """Return the megabytes sent until each evaluated round, up and down together."""
    total = np.cumsum([record.bytes_up + record.bytes_down for record in run.records]) / 1e6
    return np.array([megabytes for record, megabytes in zip(run.records, total, strict=True) if record.metrics])
