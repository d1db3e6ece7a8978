"""Tables of a section of the report."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fedkdx_plugin.engine.evaluation import SERVED
from fedkdx_plugin.engine.participation import ATTACKERS, UNSEEN
from fedkdx_plugin.reports import comparison_table, people, statistics
from fedkdx_plugin.reports.sections import CEILING, Method, Section
from fedkdx_plugin.reports.statistics import spread
from fedkdx_plugin.reports.tables import NONE, Cell, Table, number, plain, ranked
from fedkdx_plugin.results.records import PARTS

METRICS = {"accuracy": "accuracy %", "auc": "AUC %", "f1": "F1 %", "recall": "recall %"}
PAPER = Path(__file__).parent / "paper.yaml"
# options of the paper's own runs, except model and join ratio
PAPER_OPTIONS = {
    "partition": "subject",
    "split": "shuffled",
    "train_fraction": 1.0,
    "unseen": 0.0,
    "late": None,
    "rare": None,
    "dropout": 0.0,
    "stragglers": 0.0,
    "corrupt": 0.0,
    "attackers": 0.0,
    "aggregate": "mean",
    "max_share": 1.0,
    "dp": "none",
    "sampling": "fixed",
}
PAPER_ROUNDS = 500


def last(method: Method, metric: str) -> statistics.Spread:
    """Return mean and standard deviation over seeds of a metric in the last round."""
    return spread([getattr(run.evaluated[-1].metrics[SERVED], metric) for run in method.runs])


def whole_run(method: Method) -> statistics.Spread:
    """Return mean and standard deviation over seeds of the seconds of all rounds together."""
    return spread([sum(sum(record.seconds.values()) for record in run.records) for run in method.runs])


def results(section: Section) -> Table:
    """Return the section's main table: last round, best round, cost."""
    rows = {name: same for method in section.methods for name, same in _rows(method).items()}
    names = list(dict.fromkeys(name for same in rows.values() for row in same for name in row.values))
    apart = [name for name in names if name.endswith("clients")]
    final = ["accuracy", "auc", "f1", "recall", "worst client", *apart]
    columns = [
        [number(spread([row.values.get(name, np.nan) for row in same]), 100) for same in rows.values()]
        for name in (*final, "best accuracy")
    ]
    served = {method.name for method in section.methods}
    for kind in (served - {CEILING}, {name for name in rows if name.endswith(" (unseen)")}):
        among = [i for i, name in enumerate(rows) if name in kind]
        columns = [_merge(column, ranked(column, among)) for column in columns]
    rounds = {m.name: spread([statistics.best_round(run)[0] for run in m.runs]) for m in section.methods}
    columns.append([number(rounds[name], digits=0) if name in rounds else Cell(NONE) for name in rows])
    cost = [name for name in comparison_table.PLAIN if name != comparison_table.REJECTED or _any(rows, name)]
    columns += [
        [
            number(spread([row.values[name] for row in same]), digits=2 if name == "s/round" else 1)
            for same in rows.values()
        ]
        for name in cost
    ]
    heads = [("last round", METRICS.get(name, f"{name} %")) for name in final]
    heads += [("best round", "accuracy %"), ("best round", "number"), *(("whole run", name) for name in cost)]
    seeds = [Cell(str(len(same)), len(same)) for same in rows.values()]
    return Table(
        f"{section.slug}-results",
        f"{section.title}: mean ± standard deviation over seeds, on {section.on} windows. Bold: best, underlined: "
        f"second{f', without {CEILING}' if CEILING in served else ''}. The best round is chosen on these same windows, "
        "so it is too optimistic. A row with a name in brackets is one of a method's networks alone."
        + "".join(f" {text}" for text in comparison_table.remarks(*section.runs)),
        [("", "method"), ("", "seeds"), *heads],
        [[Cell(name), n, *cells] for name, n, *cells in zip(rows, seeds, *columns, strict=True)],
    )


def _any(rows: Mapping[str, Sequence[comparison_table.Row]], name: str) -> bool:
    """Return whether a metric is not 0 in some row."""
    return any(row.values[name] for same in rows.values() for row in same)


def _rows(method: Method) -> dict[str, list[comparison_table.Row]]:
    """Return the rows of a method and of its networks, by name, one for each seed."""
    seeds = [
        {row.name: row for row in comparison_table.rows(method.name, r.seed, r.records, r.groups)} for r in method.runs
    ]
    names = dict.fromkeys(name for rows in seeds for name in rows)
    # a network has no row for a seed with which its predictions equal those of the method
    return {name: [rows.get(name, rows[method.name]) for rows in seeds] for name in names}


def _merge(old: Sequence[Cell], new: Sequence[Cell]) -> list[Cell]:
    """Return the cells of `old` that have a rank, and those of `new` elsewhere."""
    return [before if before.rank else after for before, after in zip(old, new, strict=True)]


def reaching(section: Section) -> Table:
    """Return the table of rounds and megabytes until an accuracy is reached."""
    targets = statistics.targets(section)
    rows = []
    for method in section.methods:
        cells = [Cell(method.name)]
        for target in targets.values():
            hits = [statistics.reached(run, target) or (np.nan, np.nan) for run in method.runs]
            cells += [number(spread([hit[part] for hit in hits]), digits=part) for part in (0, 1)]
        rows.append(cells)
    return Table(
        f"{section.slug}-targets",
        f"{section.title}: rounds, and megabytes sent both ways by all clients, until {section.on} accuracy first "
        f"reaches a target; '{NONE}' if it never does. Mean ± standard deviation over the seeds that do.",
        [("", "method"), *((name, unit) for name in targets for unit in ("rounds", "MB"))],
        rows,
    )


def clients(section: Section) -> Table:
    """Return the table of the distribution of accuracy over clients, with the client of the lowest accuracy."""
    rows, same = [], people.same_clients(section.runs)
    names = people.subjects(section.first) if same else []
    for method in section.methods:
        values = statistics.per_client(method, same)
        together = np.concatenate(list(values.values()))
        known = together[~np.isnan(together)]
        quartiles = np.percentile(known, (25, 50, 75))
        seed, worst = min(
            ((seed, int(np.nanargmin(own))) for seed, own in values.items()), key=lambda at: values[at[0]][at[1]]
        )
        summary = (known.mean(), known.std(), known.min(), *quartiles, known.max())
        whose = f" (subject {names[worst]})" if worst < len(names) else "" if seed is None else f" (seed {seed})"
        rows.append([Cell(method.name), *(plain(100 * float(f)) for f in summary), Cell(f"{worst}{whose}", worst)])
    heads = ("method", "mean", "std", "lowest", "quarter", "median", "three quarters", "highest", "lowest is client")
    return Table(
        f"{section.slug}-clients",
        f"{section.title}: distribution over clients of the accuracy in the last round, %, {clients_of(section)}. Each "
        "client has the same weight, regardless of its number of windows. The std is that of these clients as they are "
        "(ddof 0), other than ± over seeds (ddof 1).",
        [("", head) for head in heads],
        rows,
    )


def clients_of(section: Section) -> str:
    """Return in words what stands for a client in tables and plots of clients."""
    if not people.same_clients(section.runs):
        return "of the clients of all seeds side by side, as they are not known to be the same subjects with each seed"
    apart = [name for name in section.first.groups if name != ATTACKERS]
    if not apart or max(len(method.runs) for method in section.methods) < 2:
        return "mean over seeds"
    return (
        f"mean over seeds; each seed sets other clients apart ({', '.join(apart)}), so that a client's mean is over "
        "seeds in which it was set apart and others in which it was not" + _without(apart)
    )


def _without(apart: Collection[str]) -> str:
    """Return in words whom the accuracy of clients leaves out; '' if it leaves out none."""
    return f", and leaves out those in which it was {UNSEEN}" if UNSEEN in apart else ""


def seconds(section: Section) -> Table:
    """Return the table of seconds of each part of a round, and of whole runs."""
    rows = []
    for method in section.methods:
        parts = {part: [np.mean([r.seconds[part] for r in run.records]) for run in method.runs] for part in PARTS}
        cells = [number(spread([float(v) for v in values]), digits=3) for values in parts.values()]
        total = number(spread([float(sum(values)) for values in zip(*parts.values(), strict=True)]), digits=3)
        rows.append([Cell(method.name), *cells, total, number(whole_run(method), digits=0)])
    return Table(
        f"{section.slug}-seconds",
        f"{section.title}: wall time. Runs that share a machine slow each other down.",
        [("", "method"), *(("mean of a round, s", head) for head in (*PARTS, "all")), ("", "whole run, s")],
        rows,
    )


@cache
def _paper_rows() -> list[dict[str, Any]]:
    """Read the rows of the paper's tables."""
    rows: list[dict[str, Any]] = yaml.safe_load(PAPER.read_text(encoding="utf-8"))
    return rows


def _has_paper_options(config: Mapping[str, Any]) -> bool:
    """Return whether the options are those of the paper's runs."""
    return all(config.get(key, value) == value for key, value in PAPER_OPTIONS.items())


def paper(section: Section) -> Table | None:
    """Return the paper's metrics beside these; None if it has none for this data set, model and options."""
    if section.on != "test" or not _has_paper_options(section.config):
        return None
    rows = [
        (method, entry)
        for method in section.methods
        for entry in _paper_rows()
        if entry["method"] == method.name
        and section.data in entry
        and all(entry[key] == section.config[key] for key in ("model", "join_ratio"))
    ]
    if not rows:
        return None
    rounds = section.config["global_rounds"]
    caption = (
        f"{section.title}: this report's last round beside the paper's tables, %. "
        + (f"The paper's are after {PAPER_ROUNDS} rounds, these after {rounds}. " if rounds != PAPER_ROUNDS else "")
        + "The paper does not state the number of seeds, nor whether its round is the last or the best. Its tables "
        "1, 2 and 3 differ from each other for the same options."
    )
    heads = [(head, part) for head in METRICS.values() for part in ("here", "paper", "difference")]
    cells = [[Cell(m.name), Cell(str(entry["table"])), *_compared(m, entry[section.data])] for m, entry in rows]
    if any("seconds" in entry for _, entry in rows):
        heads += [("whole run, s", part) for part in ("here", "paper")]
        for line, (method, entry) in zip(cells, rows, strict=True):
            theirs = entry.get("seconds", {}).get(section.data, np.nan)
            line += [plain(whole_run(method).mean, digits=0), plain(theirs, digits=0)]
    return Table(f"{section.slug}-paper", caption, [("", "method"), ("", "table"), *heads], cells)


def _compared(method: Method, published: Iterable[float]) -> list[Cell]:
    """Return the cells of each metric: here, in the paper, and the difference in points."""
    cells = []
    for metric, value in zip(METRICS, published, strict=True):
        own = 100 * last(method, metric).mean
        cells += [plain(own), plain(value), plain(own - value, sign=True)]
    return cells
