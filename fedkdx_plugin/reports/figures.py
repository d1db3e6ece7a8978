"""Figures of a section, as files for papers and for the page. Needs matplotlib."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset_utils.files import replacing
from fedkdx_plugin.engine.evaluation import SERVED
from fedkdx_plugin.reports import statistics
from fedkdx_plugin.reports.sections import Method, Section, accuracy
from fedkdx_plugin.results.records import PARTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Paul Tol's muted scheme, which colour-blind readers can tell apart (https://personal.sron.nl/~pault/), with black,
# dark grey and orange in place of its pale grey; FedKDX gets the first, and so always the same
COLOURS = (
    *("#cc6677", "#332288", "#117733", "#88ccee", "#ddcc77", "#882255", "#44aa99", "#999933", "#aa4499"),
    *("#000000", "#777777", "#ee7733"),
)
DASHES = ("-", "--", ":", "-.")
MANY = 12  # methods from which on a figure shows the best variant of each algorithm alone
POINTS = 250  # of a line: more cannot be seen
MATRICES = 3
LONGEST = 40  # letters of a class's name in a figure; tables have the whole
BANDS = 6  # methods up to which bands can be told apart
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "pdf.fonttype": 42,  # text that can be searched and edited
}
SERVER = {
    "epsilon": "threshold ε",
    "rank_share": "rank kept, %",
    "energy_kept": "energy kept, %",
    "bytes_share": "bytes, % of dense",
}


@dataclass(frozen=True)
class Drawn:
    """A figure that lies in files. `name` is theirs, without ending; `caption` says what is seen; `width` in inches."""

    name: str
    caption: str
    width: float


class Looks:
    """One colour and one kind of line for each method, through all figures."""

    def __init__(self, names: Sequence[str]) -> None:
        ordered = sorted(dict.fromkeys(names), key=lambda name: name != "FedKDX")
        kinds = [(colour, dashes) for dashes in DASHES for colour in COLOURS]
        self._of = dict(zip(ordered, itertools.cycle(kinds), strict=False))

    def colour(self, name: str) -> str:
        return self._of[name][0]

    def line(self, name: str) -> dict[str, Any]:
        colour, dashes = self._of[name]
        return {"color": colour, "linestyle": dashes, "linewidth": 1.6, "label": name}


def shown(section: Section) -> list[Method]:
    """The methods that figures show: all, or where they are many, of each algorithm the best in the last round."""
    if len(section.methods) <= MANY:
        return list(section.methods)
    return [
        max((m for m in section.methods if m.algorithm == name), key=accuracy)
        for name in dict.fromkeys(method.algorithm for method in section.methods)
    ]


def draw(section: Section, folder: Path, looks: Looks) -> Iterator[Drawn]:
    """Write all figures of a section into `folder`, each as .png and .pdf."""
    import matplotlib

    methods = shown(section)
    some = "" if len(methods) == len(section.methods) else " Of each algorithm, its best variant."
    with matplotlib.rc_context(STYLE):
        for kind, make in {
            "convergence": convergence,
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
                yield Drawn(name, caption + some, figure.get_figwidth())


def save(figure: Figure, path: Path) -> None:
    """As .png and .pdf, without a date, so that the same runs give the same files."""
    for ending, metadata in ((".png", {}), (".pdf", {"CreationDate": None})):
        with replacing(path.with_name(path.name + ending)) as part:
            figure.savefig(part, dpi=180, metadata=metadata)
        figure.set_layout_engine("none")  # it is laid out now, which takes as long as to draw it


def _figure(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    from matplotlib.figure import Figure  # no pyplot: no display, no state shared with the caller's figures

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, **options)


def convergence(section: Section, methods: Sequence[Method], looks: Looks) -> tuple[Figure, str]:
    """Accuracy over rounds, and over megabytes."""
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, (left, right) = _figure(7.2, 3.2 + 0.18 * -(-len(methods) // 4), 2, sharey=True)
    for method in methods:
        rounds, values = _accuracies(method)
        sent = np.mean([statistics.sent(run) for run in method.runs], axis=0)[rounds - 1]
        few = np.unique(np.linspace(0, len(rounds) - 1, POINTS).astype(int))
        rounds, values, sent = rounds[few], 100 * values[:, few], sent[few]
        left.plot(rounds, values.mean(0), **looks.line(method.name))
        if len(values) > 1 and len(methods) <= BANDS:
            left.fill_between(rounds, values.min(0), values.max(0), color=looks.colour(method.name), alpha=0.15, lw=0)
        if sent[-1] > 0.1:  # who sends next to nothing has no place on this axis
            right.plot(sent, values.mean(0), **looks.line(method.name))
    left.set(xlabel="round", ylabel=f"{section.on} accuracy, %")
    left.xaxis.get_major_locator().set_params(integer=True)
    right.set(xlabel="megabytes sent, up and down", xscale="log")
    low, high = right.get_xlim()
    right.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 50 * low else (1,)))
    right.xaxis.set_major_formatter("{x:g}")
    right.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=4, handlelength=2.2)
    return figure, (
        f"{section.title}: {section.on} accuracy of the models that clients would use, over rounds (left) and over the "
        "megabytes that all clients sent and received until then (right, logarithmic). Lines: mean over seeds"
        f"{'; bands: from the lowest to the highest seed' if len(methods) <= BANDS else ''}."
    )


def _accuracies(method: Method) -> tuple[np.ndarray, np.ndarray]:
    """Evaluated rounds (n,) and accuracies (seeds, n)."""
    rounds = np.array([record.round for record in method.runs[0].evaluated])
    return rounds, np.array([[r.metrics[SERVED].accuracy for r in run.evaluated] for run in method.runs])


def clients(section: Section, methods: Sequence[Method], looks: Looks) -> tuple[Figure, str]:
    """How accuracy spreads over clients."""
    figure, axes = _figure(7.2, 1.1 + 0.32 * len(methods))
    values = [100 * statistics.per_client(method) for method in methods]
    known = [own[~np.isnan(own)] for own in values]
    boxes = axes.boxplot(
        known, orientation="horizontal", widths=0.6, showfliers=False, patch_artist=True, medianprops={"color": "black"}
    )
    for place, (method, box, own) in enumerate(zip(methods, boxes["boxes"], known, strict=True), 1):
        box.set(facecolor=looks.colour(method.name), alpha=0.35)
        # the same for the same data: clients in order, up and down in turn
        height = place + 0.18 * (np.arange(len(own)) % 3 - 1)
        axes.plot(own, height, ".", color=looks.colour(method.name), markersize=4, alpha=0.8)
    axes.set(
        yticks=range(1, len(methods) + 1),
        yticklabels=[m.name for m in methods],
        xlabel=f"{section.on} accuracy of a client, %",
    )
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    return figure, (
        f"{section.title}: each client's accuracy in the last round, mean over seeds. A point is a client; boxes hold "
        "the middle half of the clients, the line is the median, whiskers reach at most 1.5 box lengths."
    )


def confusion(section: Section, methods: Sequence[Method], looks: Looks) -> tuple[Figure, str]:
    """What is taken for what."""
    chosen = _chosen(section)
    names = [shortened(name) for name in section.first.classes]
    size = max(1.6, 0.26 * len(names))
    label = max(map(text_width, names))
    figure, axes = _figure(
        label + 1.3 + len(chosen) * (size + 0.15), size + label + 0.6, len(chosen), squeeze=False, sharey=True
    )
    for place, (own, method) in enumerate(zip(axes[0], chosen, strict=True)):
        counts = sum(run.confusion[SERVED].sum(axis=0) for run in method.runs)
        total = counts.sum(axis=1, keepdims=True)
        shares = 100 * np.divide(counts, total, out=np.zeros(counts.shape), where=total > 0)
        image = own.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        ticks = range(len(names))
        own.set(title=method.name, xticks=ticks, yticks=ticks, xlabel="predicted", ylabel="" if place else "true class")
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
        else (f" Of {len(section.methods)} methods: the reference, FedAvg, and the best of the others.")
    )
    return figure, (
        f"{section.title}: which class (row) is taken for which (column), last round, all clients and seeds together; "
        f"rows add up to 100 %.{which}"
    )


def shortened(name: str) -> str:
    """A name that fits beside a figure: of a longer one, both ends. A dollar sign is one, and begins no formula."""
    short = name if len(name) <= LONGEST else f"{name[: LONGEST // 2]}…{name[-(LONGEST // 2 - 1) :]}"
    return short.replace("$", r"\$")


def text_width(text: str) -> float:
    """Inches that a text takes in a figure's letters."""
    from matplotlib.textpath import TextPath

    return TextPath((0, 0), text, size=STYLE["font.size"]).get_extents().x1 / 72


def _chosen(section: Section) -> list[Method]:
    """All methods where they are few; else the reference, FedAvg and the best of the others."""
    if len(section.methods) <= MATRICES:
        return list(section.methods)
    first = [section.reference, *(m for m in section.methods if m.name == "FedAvg" and m is not section.reference)]
    rest = sorted((m for m in section.methods if m not in first), key=accuracy, reverse=True)
    return [*first, *rest][:MATRICES]


def compression(section: Section, methods: Sequence[Method], looks: Looks) -> tuple[Figure, str] | None:
    """What servers recorded of their compression; None where none did."""
    told = {method.name: _told(method) for method in methods}
    told = {name: figures for name, figures in told.items() if figures}
    if not told:
        return None
    figure, axes = _figure(7.2, 2.6 + 0.18 * -(-len(told) // 4), 3)
    for own, key in zip(axes, ("rank_share", "energy_kept", "bytes_share"), strict=True):
        for name, figures in told.items():
            if key in figures:
                own.plot(np.arange(1, len(figures[key]) + 1), 100 * figures[key], **looks.line(name))
            if key == "energy_kept" and "epsilon" in figures:
                own.plot(np.arange(1, len(figures[key]) + 1), 100 * figures["epsilon"], color="0.5", lw=0.8, zorder=0)
        own.set(xlabel="round", title=SERVER[key])
        own.title.set_fontsize(9)
        own.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure, (
        f"{section.title}: what the server's compressed broadcast keeps, round by round, mean over seeds: rank (mean "
        "over the weight matrices, 100 is full), energy (squared Frobenius norm) with the threshold ε it must exceed "
        "in grey, and bytes against sending the same uncompressed."
    )


def _told(method: Method) -> Mapping[str, np.ndarray]:
    """Figure -> (rounds,), mean over seeds, NaN where no seed has it; only the figures of compression."""
    found = {}
    for key in SERVER:
        values = np.array([[record.server.get(key, np.nan) for record in run.records] for run in method.runs])
        if not np.isnan(values).all():
            found[key] = statistics.client_mean(values)
    return found


def seconds(section: Section, methods: Sequence[Method], looks: Looks) -> tuple[Figure, str]:
    """Where a round's time goes."""
    figure, axes = _figure(7.2, 1.2 + 0.3 * len(methods))
    left = np.zeros(len(methods))
    for part, colour in zip(PARTS, ("#4477aa", "#ccbb44", "#bbbbbb"), strict=True):
        values = np.array([np.mean([[r.seconds[part] for r in run.records] for run in m.runs]) for m in methods])
        axes.barh([m.name for m in methods], values, left=left, height=0.65, color=colour, label=part)
        left += values
    axes.set(xlabel="seconds a round, mean")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    figure.legend(loc="outside lower center", ncols=3)
    return figure, f"{section.title}: wall time of a round: training, aggregation (with compression), evaluation."
