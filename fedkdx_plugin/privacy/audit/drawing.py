"""Plot of the windows that inversion found, beside the true ones. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedkdx_plugin.privacy.audit.inversion import matched
from fedkdx_plugin.privacy.audit.inverting import Recovered
from fedkdx_plugin.reports.plots import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHANNELS = 3  # drawn of each window
COLOURS = ("#332288", "#cc6677", "#117733")


def windows(recovered: Sequence[Recovered]) -> Figure:
    """Return a plot with a row for each kind of update: of each client the window that was found best."""
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys((one.kind, one.when) for one in recovered))
    rows = [[one for one in recovered if (one.kind, one.when) == kind] for kind in kinds]
    columns = max(map(len, rows))
    with style():
        figure = Figure(figsize=(2.4 * columns + 0.4, 1.75 * len(rows) + 0.4), layout="constrained")
        grid = figure.subplots(len(rows), columns, squeeze=False, sharex=True)
        for axes in grid.flat:
            axes.set_axis_off()
        for own, line in zip(rows, grid, strict=True):
            for one, axes in zip(own, line, strict=False):
                _draw(one, axes)
        figure.supxlabel(
            "sample; solid: trained on, dashed: found in the update; each colour is a channel, scaled", fontsize=8
        )
    return figure


def _draw(one: Recovered, axes: object) -> None:
    places, values = matched(one.found, one.true)
    best = int(np.argmax(values))
    found, true = one.found[best, :, 0], one.true[int(places[best]), :, 0]
    shown = true.std(dim=1).argsort(descending=True)[:CHANNELS].sort().values.tolist()  # those with most in them
    axes.set_axis_on()  # type: ignore[attr-defined]
    for channel, colour in zip(shown, COLOURS, strict=False):
        axes.plot(true[channel].numpy(), color=colour, linewidth=1.1)  # type: ignore[attr-defined]
        axes.plot(found[channel].numpy(), color=colour, linewidth=1.1, linestyle="--")  # type: ignore[attr-defined]
    axes.set_title(f"{one.kind}, {one.when}\nclient {one.client}, correlation {values[best]:.2f}", fontsize=7)  # type: ignore[attr-defined]
    axes.tick_params(labelsize=6)  # type: ignore[attr-defined]
