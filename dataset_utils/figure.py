"""Plot of the windows of each client and class, from the manifest (after the paper's Figures 3 to 5)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dataset_utils import shards
from dataset_utils.files import replacing
from dataset_utils.letters import lettered
from registry.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TRAIN, TEST = "#2b5c8a", "#e0913a"
FORMATS = (".png", ".pdf")
MANY = 60  # most clients for which bars and cells are drawn with gaps between them
UNNAMED = 200  # most clients that are drawn in the order of their numbers; more are ordered by size


def draw(folder: Path, out: Path) -> None:
    """Draw the training and test windows of each client (left) and the windows of each class and client (right).

    Args:
        folder: folder of shards; only its manifest is read.
        out: file to write, .png or .pdf.

    Raises:
        UserError: another file type, matplotlib is not installed, or the manifest is damaged.
    """
    if out.suffix.lower() not in FORMATS:
        raise UserError(f"{out}: a plot's file name must end in {' or '.join(FORMATS)}")
    try:
        # not pyplot, which opens displays and shares state with the caller's own plots
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise UserError("plots need matplotlib: pip install matplotlib") from error
    manifest = shards.read_manifest(folder)
    train, test = (np.array([client[part]["histogram"] for client in manifest["clients"]]).T for part in shards.PARTS)
    label = "client"
    if train.shape[1] > UNNAMED:
        order = np.argsort(-(train + test).sum(axis=0), kind="stable")
        train, test, label = train[:, order], test[:, order], "client, by number of windows"
    height = min(max(2.8, 1.2 + 0.2 * len(train)), 8.0)
    with lettered(manifest["classes"]), replacing(out) as part:
        figure = Figure(figsize=(9.5, height), layout=ConstrainedLayoutEngine(wspace=0.04))
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
        _sizes(left, train.sum(axis=0), test.sum(axis=0), shards.evaluated_on(manifest))
        _classes(figure, right, train + test, manifest["classes"])
        for axes in (left, right):
            _number_clients(axes, train.shape[1], label)
        # no date, so that the same shards give the same file
        figure.savefig(part, dpi=200, metadata={"CreationDate": None} if out.suffix.lower() == ".pdf" else {})


def _sizes(axes: Axes, train: np.ndarray, test: np.ndarray, name: str) -> None:
    """Draw stacked bars, or a filled outline for many clients; `name` labels the test windows."""
    clients = np.arange(len(train))
    if len(train) <= MANY:
        axes.bar(clients, train, color=TRAIN, label="train")
        axes.bar(clients, test, bottom=train, color=TEST, label=name)
    else:
        edges = np.arange(len(train) + 1) - 0.5
        axes.stairs(train, edges, fill=True, color=TRAIN, label="train")
        axes.stairs(train + test, edges, baseline=train, fill=True, color=TEST, label=name)
    axes.set(ylabel="windows", ylim=(0, 1.05 * (train + test).max()))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0.2)


def _classes(figure: Figure, axes: Axes, counts: np.ndarray, names: list[str]) -> None:
    """Draw a heat map of counts (classes, clients); white where a client has no window of a class."""
    from matplotlib.colors import PowerNorm

    # the square root, because a few large cells would leave the many small ones without contrast
    cells = axes.pcolormesh(
        np.arange(counts.shape[1] + 1) - 0.5,
        np.arange(counts.shape[0] + 1) - 0.5,
        np.ma.masked_equal(counts, 0),
        cmap="viridis_r",
        norm=PowerNorm(0.5, vmin=1, vmax=max(2, counts.max())),
        edgecolors="white" if counts.shape[1] <= MANY else "none",
        linewidth=0.5 if counts.shape[1] <= MANY else 0,
        rasterized=counts.shape[1] > MANY,
    )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right"]].set_visible(False)
    figure.colorbar(cells, ax=axes, label="windows (white: none)", pad=0.02)


def _number_clients(axes: Axes, clients: int, label: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel=label, xlim=(-0.5, clients - 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
