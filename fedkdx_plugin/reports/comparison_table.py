"""The comparison table: final and best round, mean ± standard deviation over seeds."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dataset_utils.files import replacing
from fedkdx_plugin.engine.evaluation import SERVED
from fedkdx_plugin.engine.participation import ATTACKERS, measured
from fedkdx_plugin.engine.record import RoundRecord
from fedkdx_plugin.privacy.accounting import Sampling
from fedkdx_plugin.privacy.client import SPENT, SPENT_SERVER
from fedkdx_plugin.privacy.options import EXAMPLE
from fedkdx_plugin.reports.sections import named, not_finite
from fedkdx_plugin.reports.statistics import spread
from fedkdx_plugin.reports.tables import number
from fedkdx_plugin.results.records import field
from fedkdx_plugin.results.runs import Run

PERCENT = ("accuracy", "best accuracy", "auc", "f1", "recall", "worst client")
REJECTED = "rejected"
PLAIN = ("MB up", "MB down", "s/round", REJECTED)
COLUMNS = {"MB up": "megabytes_up", "MB down": "megabytes_down", "s/round": "seconds_per_round"}  # in data frames
VARIED = {  # what differs between seeds, by `--vary`
    "training": "initial weights, batches, client sampling, and the clients set apart differ; the windows, their split "
    "and their partition are the same (--vary data varies them, too).",
    "data": "split, kept windows and partition differ, and so do initial weights, batches, client sampling, and the "
    "clients set apart (--vary data).",
}
TUNING = "Measured on validation windows, for the choice of hyper-parameters: these are not results."


@dataclass(frozen=True)
class Row:
    """Metrics of one algorithm, or one of its networks, with one seed: those of the last round, and the best accuracy.

    Attributes:
        name: name in the table.
        seed: seed of the run.
        values: metric -> value; shares in [0, 1], megabytes and rejected replies of the whole run, seconds.
    """

    name: str
    seed: int
    values: dict[str, float]


def remarks(*runs: Run) -> list[str]:
    """Return the sentences that a table of these runs needs."""
    return [text for text in (honest_alone(runs[0]), other_sites(runs), guarded(runs)) if text]


def honest_alone(run: Run) -> str:
    """Return a sentence that says whom the metrics of a run leave out; '' if it has no attackers."""
    if not (ids := run.groups.get(ATTACKERS)):
        return ""
    kind = run.config.get("attack")
    return f"Metrics are of the honest clients alone: the {len(ids)} that attack (--attack {kind}) are not measured."


def other_sites(runs: Sequence[Run]) -> str:
    """Return a sentence about runs between sites that were measured at the end by different ones; '' if there are none.

    Their metrics are of other windows then, which a comparison side by side does not show.
    """
    at = {}
    for run in runs:
        if run.evaluated and "sites" in run.data:
            counts = run.evaluated[-1].metrics[SERVED].client_samples
            at[f"{run.name} (seed {run.seed})"] = ", ".join(map(str, np.flatnonzero(counts)))
    if len(set(at.values())) < 2:
        return ""
    named = "; ".join(f"{name} by {clients}" for name, clients in at.items())
    return f"Not all runs were measured by the same sites, so their metrics are of different windows: {named}."


def guarded(runs: Sequence[Run]) -> str:
    """Return a sentence about the differential privacy of what each of the runs shared; '' if it had none."""
    run, count = runs[0], len(runs[0].records)
    spent = [record.server[SPENT] for record in run.records if SPENT in record.server]
    if not spent:
        return ""
    server = [record.server[SPENT_SERVER] for record in run.records if SPENT_SERVER in record.server]
    if run.config["dp"] == EXAMPLE:
        what = "What a client shares and keeps is differentially private for any one of its windows: at most"
    else:
        what = f"What is shared is differentially private for {Sampling(1, 1, run.config['sampling']).relation} client:"
    text = f"{what} ε = {spent[-1]:.3g}"
    text += f" of {run.config['epsilon']:g}, δ = {run.config['delta']:g}, after {count} round{'s' * (count > 1)}"
    if server:
        text += f" (against the server, ε = {server[-1]:.3g})"
    if len(runs) > 1:
        total = sum(max(record.server.get(SPENT, 0) for record in one.records) for one in runs)
        delta = len(runs) * run.config["delta"]
        text += f", in each run; who sees all {len(runs)} runs has seen their sums, ε = {total:.3g} and δ = {delta:g}"
    return f"{text}; the metrics here were measured without noise."


def rows(name: str, seed: int, records: Sequence[RoundRecord], groups: Mapping[str, Sequence[int]]) -> list[Row]:
    """Return the row of the models that predict, and one for each network whose predictions differ from theirs.

    Args:
        name: name of the method.
        seed: seed of the run.
        records: all rounds of one run.
        groups: clients set apart (see `Participation.groups`).
    """
    evaluated = [record for record in records if record.metrics]
    if not evaluated:
        return []
    last = evaluated[-1].metrics
    megabytes = [sum(getattr(r, f"bytes_{way}") for r in records) / 1e6 for way in ("up", "down")]
    pace = float(np.median([sum(record.seconds.values()) for record in records]))
    rejected = sum(len(record.rejected) for record in records)
    result = []
    for view, metrics in last.items():
        if view != SERVED and np.array_equal(metrics.client_loss, last[SERVED].client_loss, equal_nan=True):
            continue
        best = max(record.metrics[view].accuracy for record in evaluated)
        shares = (metrics.accuracy, best, metrics.auc, metrics.f1, metrics.recall, metrics.accuracy_worst)
        values = dict(zip(PERCENT, shares, strict=True))
        for group, ids in measured(groups).items():
            values[f"{group} clients"] = metrics.accuracy_of(ids)
        values |= dict(zip(PLAIN, (*megabytes, pace, rejected), strict=True))
        result.append(Row(name if view == SERVED else f"{name} ({view})", seed, values))
    return result


def of_seeds(runs: Sequence[Run]) -> list[Row]:
    """Return the rows of all seeds, each with the same rows of networks: those that some seed of its method has.

    In a seed in which a network predicts as the method does, its row is the method's.
    """
    table = [(method, rows(method, run.seed, run.records, run.groups)) for method, run in named(runs)]
    result = []
    for method, same in table:
        own = {row.name: row for row in same}
        for name in dict.fromkeys(row.name for other, others in table if other == method for row in others):
            if method in own:
                result.append(replace(own.get(name, own[method]), name=name))
    return result


def _columns(table: Sequence[Row]) -> list[str]:
    """Return the names of all metrics, without rejected replies if there were none."""
    names = dict.fromkeys(name for row in table for name in row.values)
    return [name for name in names if name != REJECTED or any(row.values.get(name) for row in table)]


def markdown(table: Sequence[Row]) -> str:
    """Return an aligned Markdown table with mean, ± std (ddof 1) if there are several seeds, of those with a value."""
    names = list(dict.fromkeys(row.name for row in table))
    columns = _columns(table)
    header = ["algorithm", *(name if name in PLAIN else f"{name} %" for name in columns)]
    cells = [[name, *_cells([row for row in table if row.name == name], columns)] for name in names]
    widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]

    def line(texts: Iterable[str]) -> str:
        first, *rest = (
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(texts, widths, strict=True))
        )
        return "| " + " | ".join([first, *rest]) + " |"

    rule = "|" + "|".join("-" * (w + 2) if i == 0 else "-" * (w + 1) + ":" for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, cells)]) + "\n"


def _cells(same: Sequence[Row], columns: Sequence[str]) -> list[str]:
    """Return the cells of the rows of one method, without its name."""
    texts = []
    for name in columns:
        found = spread([row.values[name] for row in same])
        mean, *deviation = number(found, 1 if name in PLAIN else 100).text.partition(" ")
        texts.append("".join([f"{round(found.mean, 2):g}" if name == REJECTED else mean, *deviation]))
    return texts


def write(folder: Path, runs: Sequence[Run], vary: str) -> str:
    """Write `comparison.md` and `comparison.csv` (one row for each seed) into `folder`, and return the Markdown.

    Args:
        runs: finished runs of one comparison.
        vary: what differs between seeds: a key of `VARIED`.
    """
    table = of_seeds(runs)
    on = runs[0].evaluated_on
    text = markdown(table) if on == "test" else f"{TUNING}\n\n{markdown(table)}"
    text += "".join(f"\n{remark}\n" for remark in [*not_finite(named(runs)), *remarks(*runs)])
    if len(seeds := {row.seed for row in table}) > 1:
        text += f"\n± over {len(seeds)} seeds: {VARIED[vary]}\n"
    with replacing(folder / "comparison.md") as part:
        part.write_text(text, encoding="utf-8")
    with replacing(folder / "comparison.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        columns = _columns(table)
        writer.writerow(["algorithm", "seed", "evaluated on", *columns])
        writer.writerows([row.name, row.seed, on, *(field(row.values[name]) for name in columns)] for row in table)
    return text
