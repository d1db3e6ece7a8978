"""Plots of a section, as files for papers and for the HTML page. Needs matplotlib."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset_utils.files import replacing
from dataset_utils.letters import lettered
from fedkdx_plugin.engine.evaluation import SERVED
from fedkdx_plugin.reports import content, people, statistics
from fedkdx_plugin.reports.looks import Looks
from fedkdx_plugin.reports.sections import Method, Section, accuracy
from fedkdx_plugin.results.records import PARTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MANY = 12  # most methods in a plot; see `shown`
POINTS = 250  # most points of a line; more are not visible
MATRICES = 3  # most confusion matrices
LONGEST = 40  # most letters of a name in a plot; tables have the whole name
WIDTH = 7.2  # inches, of a plot
LINE = 0.6  # inches that a legend takes for a line and the space beside its name
BANDS = 6  # most methods with bands, which overlap
FONT_SIZE = 9
SERVER = {
    "epsilon": "threshold ε",
    "rank_share": "rank kept, %",
    "energy_kept": "energy kept, %",
    "bytes_share": "bytes, % of dense",
}


@dataclass(frozen=True)
class Plot:
    """Plot that has been written to files.

    Attributes:
        name: name of the files, without ending.
        caption: what the plot shows.
        width: width in inches.
    """

    name: str
    caption: str
    width: float


def shown(section: Section) -> list[Method]:
    """Return the methods that plots show: all, or of many at most `MANY`, of each algorithm the best in the last round.

    The references and FedAvg are among them, whatever they reach.
    """
    if len(section.methods) <= MANY:
        return list(section.methods)
    names = {method.name for method in section.references} | {"FedAvg"}
    best = {method.algorithm: method for method in sorted(section.methods, key=accuracy)}
    kept = [method for method in section.methods if method.name in names]
    others = sorted((method for method in best.values() if method not in kept), key=accuracy, reverse=True)
    kept += others[: max(MANY - len(kept), 0)]
    return [method for method in section.methods if method in kept]


def style() -> AbstractContextManager[None]:
    """Return a context in which plots have the style of the report."""
    import matplotlib

    return matplotlib.rc_context(
        {
            "font.size": FONT_SIZE,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.3,
            "legend.frameon": False,
            "pdf.fonttype": 42,  # text that can be searched and edited
        }
    )


def draw(section: Section, folder: Path, looks: Looks) -> Iterator[Plot]:
    """Write all plots of a section into `folder`, each as .png and .pdf."""
    methods = shown(section)
    some = ""
    if len(methods) < len(section.methods):
        some = (
            f" Of {len(section.methods)} methods {len(methods)} are shown: references, FedAvg, and the best of the "
            "others, at most one of each algorithm."
        )
    with style(), lettered([*section.first.classes, *(method.name for method in methods)]):
        for kind, make in {
            "convergence": convergence,
            "loss": loss,
            "clients": clients,
            "confusion": confusion,
            "compression": compression,
            "seconds": seconds,
        }.items():
            made = make(section, methods, looks)
            if made:
                figure, caption = made
                name = f"{section.slug}-{kind}"
                save(figure, folder / name)
                yield Plot(name, caption + some, figure.get_figwidth())


def save(figure: Figure, path: Path) -> None:
    """Write a plot as .png and .pdf, without a date, so that the same runs give the same files."""
    for ending, metadata in ((".png", {}), (".pdf", {"CreationDate": None})):
        with replacing(path.with_name(path.name + ending)) as part:
            figure.savefig(part, dpi=180, metadata=metadata)
        figure.set_layout_engine("none")  # the layout is done, and takes as long as drawing


def _figure(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """Return a new plot, and its axes."""
    from matplotlib.figure import Figure  # not pyplot, which opens displays and shares state with the caller's plots

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, **options)


def _legend(figure: Figure, axes: Any) -> None:
    """Add the legend of the lines of some axes below a plot, in as many columns as its names leave room for."""
    handles, names = axes.get_legend_handles_labels()
    names = [shortened(name) for name in names]
    columns = min(max(int(WIDTH / (LINE + max(map(text_width, names)))), 1), 4)
    figure.set_figheight(figure.get_figheight() + 0.18 * -(-len(names) // columns))
    figure.legend(handles, names, loc="outside lower center", ncols=columns, handlelength=2.2)


def convergence(section: Section, methods: Sequence[Method], looks: Looks) -> tuple[Figure, str]:
    """Plot accuracy over rounds, and over megabytes."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, (left, right) = _figure(WIDTH, 3.2, 2, sharey=True)
    for method in methods:
        rounds, values = _accuracies(method)
        sent = np.mean([statistics.sent(run) for run in method.runs], axis=0)[rounds - 1]
        few = np.unique(np.linspace(0, len(rounds) - 1, POINTS).astype(int))
        rounds, values, sent = rounds[few], 100 * values[:, few], sent[few]
        line = looks.line(method.name, len(rounds))
        left.plot(rounds, values.mean(0), **line)
        if len(values) > 1 and len(methods) <= BANDS:
            left.fill_between(rounds, values.min(0), values.max(0), color=looks.colour(method.name), alpha=0.15, lw=0)
        if sent[-1] > 0.1:  # the axis is logarithmic: methods that send almost nothing are left out
            right.plot(sent, values.mean(0), **line)
    left.set(xlabel="round", ylabel=f"{section.on} accuracy, %")
    if len(rounds) == 1:
        left.set_xticks(rounds)
    else:
        left.xaxis.get_major_locator().set_params(integer=True)
    right.set(xlabel="megabytes sent, up and down", xscale="log")
    low, high = right.get_xlim()
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
    right.xaxis.set_major_formatter("{x:g}")
    right.xaxis.set_minor_formatter(NullFormatter())
    _legend(figure, left)
    return figure, (
        f"{section.title}: {section.on} accuracy of the models that clients would use, over rounds (left) and over the "
        "megabytes that all clients sent and received until then (right, logarithmic). Lines: mean over seeds"
        f"{'; bands: from the lowest to the highest seed' if len(methods) <= BANDS else ''}."
    )


def _accuracies(method: Method) -> tuple[np.ndarray, np.ndarray]:
    """Return the evaluated rounds (n,) and accuracies (seeds, n)."""
    rounds = np.array([record.round for record in method.runs[0].evaluated])
    return rounds, np.array([[r.metrics[SERVED].accuracy for r in run.evaluated] for run in method.runs])


def loss(section: Section, methods: Sequence[Method], looks: Looks) -> tuple[Figure, str] | None:
    """Plot the training loss over rounds; None if no run recorded any above 0."""
    figure, axes = _figure(WIDTH, 2.6)
    drawn = False
    for method in methods:
        values = statistics.over_seeds(np.array([[r.train_loss for r in run.records] for run in method.runs]))
        rounds = 1 + np.flatnonzero(values > 0)  # no client trained in the others; the axis is logarithmic
        if len(rounds):
            few = rounds[np.unique(np.linspace(0, len(rounds) - 1, POINTS).astype(int))]
            axes.plot(few, values[few - 1], **looks.line(method.name))
            drawn = True
    if not drawn:
        return None
    axes.set(xlabel="round", ylabel="training loss", yscale="log")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes)
    return figure, (
        f"{section.title}: training loss of each round (logarithmic), mean over the clients that trained, by number of "
        "windows, and over seeds. It is the sum of all that a method minimises, of both its networks if it has two, so "
        "methods cannot be compared by it."
    )


def clients(section: Section, methods: Sequence[Method], looks: Looks) -> tuple[Figure, str]:
    """Plot the distribution of accuracy over clients."""
    figure, axes = _figure(WIDTH, 1.1 + 0.32 * len(methods))
    same = people.same_clients(section.runs)
    values = [100 * np.concatenate(list(statistics.per_client(method, same).values())) for method in methods]
    known = [own[~np.isnan(own)] for own in values]
    boxes = axes.boxplot(
        known, orientation="horizontal", widths=0.6, showfliers=False, patch_artist=True, medianprops={"color": "black"}
    )
    for place, (method, box, own) in enumerate(zip(methods, boxes["boxes"], known, strict=True), 1):
        box.set(facecolor=looks.colour(method.name), alpha=0.35)
        # not random: by the order of clients, so that the same data give the same plot
        height = place + 0.18 * (np.arange(len(own)) % 3 - 1)
        axes.plot(own, height, ".", color=looks.colour(method.name), markersize=4, alpha=0.8)
    axes.set(
        yticks=range(1, len(methods) + 1),
        yticklabels=[shortened(m.name) for m in methods],
        xlabel=f"{section.on} accuracy of a client, %",
    )
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    return figure, (
        f"{section.title}: each client's accuracy in the last round, {content.clients_of(section)}. A point is a client"
        f"{'' if same else ' of one seed'}; boxes "
        "contain the middle half of the clients, the line is the median, whiskers extend at most 1.5 box lengths."
    )


def confusion(section: Section, methods: Sequence[Method], looks: Looks) -> tuple[Figure, str]:
    """Plot confusion matrices."""
    chosen = _chosen(section)
    names = [shortened(name) for name in section.first.classes]
    size = max(1.6, 0.26 * len(names))
    label = max(map(text_width, names))
    titles = [textwrap.fill(shortened(method.name), int(12 * size)) for method in chosen]  # 12 letters are an inch
    lines = 1 + max(title.count("\n") for title in titles)
    figure, axes = _figure(
        label + 1.3 + len(chosen) * (size + 0.15),
        size + label + 0.4 + 0.2 * lines,
        len(chosen),
        squeeze=False,
        sharey=True,
    )
    for place, (own, method, title) in enumerate(zip(axes[0], chosen, titles, strict=True)):
        counts = sum(run.confusion[SERVED].sum(axis=0) for run in method.runs)
        total = counts.sum(axis=1, keepdims=True)
        shares = 100 * np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
        image = own.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        ticks = range(len(names))
        own.set(
            xticks=ticks,
            yticks=ticks,
            xlabel="predicted",
            ylabel="" if place else "true class",
        )
        own.set_title(title, fontsize=FONT_SIZE)
        own.set_xticklabels(names, rotation=90)
        own.set_yticklabels(names)
        own.grid(visible=False)
        if len(names) <= 12:
            for (row, column), share in np.ndenumerate(shares):
                if share >= 0.5:
                    own.text(
                        column,
                        row,
                        f"{share:.0f}",
                        ha="center",
                        va="center",
                        fontsize=6.5,
                        color="white" if share > 55 else "black",
                    )
    figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.8)
    which = (
        ""
        if len(chosen) == len(section.methods)
        else (f" Of {len(section.methods)} methods: the first reference, FedAvg, and the best of the others.")
    )
    return figure, (
        f"{section.title}: predicted class (column) of each true class (row), last round, all clients and seeds "
        f"together; rows add up to 100 %.{which}"
    )


def shortened(name: str) -> str:
    """Shorten a name to `LONGEST` letters, from both its ends, and escape dollar signs, which begin formulas."""
    short = name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}…{name[-(LONGEST // 2 - 1) :]}"
    return short.replace("$", r"\$")


def text_width(text: str) -> float:
    """Return the width of a text in a plot, in inches."""
    from matplotlib.textpath import TextPath

    return float(TextPath((0, 0), text, size=FONT_SIZE).get_extents().x1 / 72)


def _chosen(section: Section) -> list[Method]:
    """Return the methods with a confusion matrix: all, or of many the first reference, FedAvg, the best of the rest."""
    if len(section.methods) <= MATRICES:
        return list(section.methods)
    names = [*(method.name for method in section.references[:1]), "FedAvg"]
    first = [method for name in dict.fromkeys(names) for method in section.methods if method.name == name]
    rest = sorted((m for m in section.methods if m.name not in names), key=accuracy, reverse=True)
    return [*first, *rest][:MATRICES]


def compression(section: Section, methods: Sequence[Method], looks: Looks) -> tuple[Figure, str] | None:
    """Plot what servers recorded of their compression; None if none did."""
    recorded = {method.name: _recorded(method) for method in methods}
    recorded = {name: metrics for name, metrics in recorded.items() if metrics}
    if not recorded:
        return None
    figure, axes = _figure(WIDTH, 2.6, 3)
    for own, key in zip(axes, ("rank_share", "energy_kept", "bytes_share"), strict=True):
        for name, metrics in recorded.items():
            if key in metrics:
                own.plot(np.arange(1, len(metrics[key]) + 1), 100 * metrics[key], **looks.line(name))
            if key == "energy_kept" and "epsilon" in metrics:
                own.plot(np.arange(1, len(metrics[key]) + 1), 100 * metrics["epsilon"], color="0.5", lw=0.8, zorder=0)
        own.set(xlabel="round", title=SERVER[key])
        own.title.set_fontsize(9)
        own.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes[0])
    return figure, (
        f"{section.title}: what remains after the server's compression in each round, mean over seeds: rank (mean over "
        "the weight matrices, 100 is full), energy (squared Frobenius norm) with the threshold ε that it must exceed "
        "in grey, and bytes relative to the same without compression."
    )


def _recorded(method: Method) -> Mapping[str, np.ndarray]:
    """Return compression metric -> (rounds,), mean over seeds, NaN for rounds in which no seed has it."""
    found = {}
    for key in SERVER:
        values = np.array([[record.server.get(key, np.nan) for record in run.records] for run in method.runs])
        if not np.isnan(values).all():
            found[key] = statistics.over_seeds(values)
    return found


def seconds(section: Section, methods: Sequence[Method], looks: Looks) -> tuple[Figure, str]:
    """Plot the seconds of each part of a round."""
    figure, axes = _figure(WIDTH, 1.2 + 0.3 * len(methods))
    left = np.zeros(len(methods))
    for part, colour in zip(PARTS, ("#4477aa", "#ccbb44", "#bbbbbb"), strict=True):
        values = np.array([np.mean([[r.seconds[part] for r in run.records] for run in m.runs]) for m in methods])
        axes.barh(range(len(methods)), values, left=left, height=0.65, color=colour, label=part)
        left += values
    names = [shortened(method.name) for method in methods]
    axes.set(yticks=range(len(methods)), yticklabels=names, xlabel="seconds a round, mean")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside lower center", ncols=3)
    return figure, f"{section.title}: wall time of a round: training, aggregation (with compression), evaluation."
