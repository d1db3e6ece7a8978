"""Figures of results, drawn from the CSV files in `data/`: accuracy against megabytes, by data set and setting.

An order is one of a table (see `csv_tables.make`) of the kind `figure`. The name of the picture holds a digest of what
it shows, so that one of other results is not taken for it.
"""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import NamedTuple

import csv_tables
import pandas as pd

from dataset_utils.files import replacing
from fedkdx_plugin.reports.looks import COLOURS
from fedkdx_plugin.reports.plots import style
from fedkdx_plugin.reports.statistics import spread

KIND, FOLDER = "figure", "figures"
LEAST = 0.5  # megabytes at which methods are drawn that send less, which is numbers of windows alone


class Point(NamedTuple):
    """A method in a data set and setting, over seeds: mean of the megabytes, mean and deviation of the accuracy, %."""

    data: str
    setting: str
    method: str
    sent: float
    accuracy: float
    deviation: float


def is_figure(order: str) -> bool:
    """Return whether an order is one of a figure."""
    return order.partition(" ")[0] == KIND


def points(order: str, data: Path) -> list[Point]:
    """Return what a figure shows, from the CSV files in the folder `data`. Raises UserError: see `csv_tables.make`."""
    kind, args = csv_tables.parsed(order)
    rows = csv_tables.rows_of(kind, args, data)
    csv_tables.check(rows)
    found = []
    for name, setting, own in csv_tables.parts(rows, args):
        for method in csv_tables.in_order(rows, args, "method"):
            if len(of_method := own[own["method"] == method]):
                sent = float((of_method["mb_up"] + of_method["mb_down"]).mean())
                accuracy = spread(list(100 * of_method["pooled"]))
                found.append(
                    Point(name, setting, method, round(sent, 3), round(accuracy.mean, 3), round(accuracy.std, 3))
                )
    return found


def path(order: str, data: Path) -> str:
    """Return where the picture is, relative to its page."""
    return f"{FOLDER}/{hashlib.sha256(repr(points(order, data)).encode()).hexdigest()[:12]}.png"


def line(order: str, data: Path) -> str:
    """Return the line of Markdown that shows the picture."""
    sets = ", ".join(dict.fromkeys(point.data for point in points(order, data)))
    return f"![Accuracy against megabytes sent: {sets}]({path(order, data)})\n"


def draw(order: str, data: Path, picture: Path) -> None:
    """Draw a figure: a line for each method, axes for each data set, and for the megabytes of the last of them.

    A setting has a colour and a place above or below the line; bars are ± one standard deviation over seeds.
    """
    from matplotlib.figure import Figure

    found = points(order, data)
    sets, settings, methods = (list(pd.DataFrame(found)[key].unique()) for key in ("data", "setting", "method"))
    place = {method: len(methods) - i for i, method in enumerate(methods)}
    step = 0.5 / len(settings)
    with style():
        figure = Figure(figsize=(2.6 * (len(sets) + 1), 0.32 * len(methods) + 1.2), layout="constrained")
        axes = figure.subplots(1, len(sets) + 1, sharey=True)
        for i, setting in enumerate(settings):
            look = {"color": COLOURS[i], "marker": "os^D"[i % 4], "linestyle": "none", "markersize": 4.5}
            for point in (one for one in found if one.setting == setting):
                y = place[point.method] + step * ((len(settings) - 1) / 2 - i)
                bar = None if math.isnan(point.deviation) else point.deviation
                axes[sets.index(point.data)].errorbar(point.accuracy, y, xerr=bar, elinewidth=1, label=setting, **look)
                if point.data == sets[-1]:
                    axes[-1].plot(max(point.sent, LEAST), y, **look)
        axes[0].set_yticks(list(place.values()), list(place))
        for axis, name in zip(axes, sets, strict=False):
            axis.set(title=name, xlabel="accuracy %")
        axes[-1].set(title=sets[-1], xlabel="MB up and down", xscale="log")
        handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(settings))
        picture.parent.mkdir(exist_ok=True)
        with replacing(picture) as part:
            figure.savefig(part, dpi=150, format="png")
