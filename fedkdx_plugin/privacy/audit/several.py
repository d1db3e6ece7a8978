"""Audits of several runs: each is written into its run folder, and all of them are compared in one table."""

from __future__ import annotations

import csv
import importlib.util
import io
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dataset_utils.files import replacing
from fedkdx_plugin.privacy.audit import run as one_run
from fedkdx_plugin.privacy.audit.drawing import windows
from fedkdx_plugin.privacy.audit.inverting import Recovered
from fedkdx_plugin.privacy.audit.options import AuditOptions
from fedkdx_plugin.privacy.audit.progress import Progress
from fedkdx_plugin.privacy.audit.rebuilt import check_folder
from fedkdx_plugin.reports import audits as drawn
from fedkdx_plugin.reports.plots import save
from fedkdx_plugin.reports.tables import Cell, Table, escaped, markdown
from fedkdx_plugin.results import audits, runs
from fedkdx_plugin.results.audits import FOLDER, Audit, Figure
from registry.errors import UserError

COMPARISON = "audit"  # name of the files that compare the runs of a folder, without ending


@dataclass(frozen=True)
class Audits:
    """Audits of several runs.

    Attributes:
        found: run folder -> audit.
        refused: run folder -> why it could not be audited.
    """

    found: dict[Path, Audit]
    refused: dict[Path, str]

    @property
    def table(self) -> pd.DataFrame:
        """A row for each figure of each run: method, seed, attack, target, how, figure, value, interval, chance."""
        rows: list[dict[str, Any]] = [
            {"run": str(folder), "method": audit.method, "seed": audit.seed}
            | {"attack": one.attack, "target": one.target, "by": one.method, "figure": one.name}
            | {"value": one.value, "low": one.low, "high": one.high, "chance": one.chance}
            for folder, audit in self.found.items()
            for one in audit.figures
        ]
        return pd.DataFrame(rows)

    @property
    def comparison(self) -> Table:
        """Attacks by run: the figure that stands for each attack, and its 95 % interval."""
        names = _names(list(self.found.values()))
        own = [{(one.attack, one.target): one for one in drawn.main_figures(a)} for a in self.found.values()]
        keys = dict.fromkeys(key for figures in own for key in figures)
        rows = [
            [
                Cell(f"{attack}, {target}: {drawn.NAMES[audits.MAIN[attack]]}"),
                *(_cell(figures.get((attack, target))) for figures in own),
                Cell(_chance([figures[attack, target] for figures in own if (attack, target) in figures])),
            ]
            for attack, target in keys
        ]
        heads = [("", "attack"), *(("", name) for name in names), ("", "chance")]
        return Table(COMPARISON, "Attacks on these runs, with 95 % intervals over clients.", heads, rows)

    @property
    def notes(self) -> list[str]:
        """Return what has to be known to read the figures, such as why an attack has none: a line for each."""
        return list(dict.fromkeys(f"{one.method}: {note}" for one in self.found.values() for note in one.notes))

    def write(self, folder: Path) -> None:
        """Write the comparison as `audit.md` and `audit.csv`. Raises UserError: the folder cannot be written."""
        text = io.StringIO()
        if self.found:
            self.table.to_csv(text, index=False, lineterminator="\n", quoting=csv.QUOTE_MINIMAL)
        notes = "".join(f"\n- {escaped(note)}" for note in self.notes)
        page = markdown(self.comparison) + (f"{notes}\n" if notes else "")
        for ending, content in ((".md", page), (".csv", text.getvalue())):
            with replacing(folder / f"{COMPARISON}{ending}") as part:
                part.write_text(content, encoding="utf-8")

    def __repr__(self) -> str:
        table = markdown(self.comparison) if self.found else ""
        refused = [f"not audited: {folder}: {reason}" for folder, reason in self.refused.items()]
        return table + "".join(f"{line}\n" for line in (*self.notes, *refused))


def audit_all(folders: Sequence[Path], options: AuditOptions, progress: bool = True) -> Audits:
    """Audit every run in these folders, at any depth; one that was audited with the same options is only read.

    Raises:
        UserError: a folder holds no run.
    """
    found: dict[Path, Audit] = {}
    refused: dict[Path, str] = {}
    for folder in dict.fromkeys(place for whole in folders for place in runs.find(whole)):
        try:
            found[folder] = _audited(folder, options, progress)
        except UserError as error:
            refused[folder] = str(error)
            if progress:
                print(f"not audited: {error}", file=sys.stderr, flush=True)
    return Audits(found, refused)


def _audited(folder: Path, options: AuditOptions, progress: bool) -> Audit:
    before = audits.read(folder)
    if before and before.options == one_run.as_values(options) and before.round == runs.rounds_done(folder):
        check_folder(folder)
        if progress:
            print(f"{folder}: audited before, read from {FOLDER}/ (remove that to repeat it)", file=sys.stderr)
        return before
    with Progress(folder.name, progress) as say:
        made, recovered = one_run.audit(folder, options, say)
    _write(folder / FOLDER, made, recovered)
    return made


def _write(folder: Path, audit: Audit, recovered: Sequence[Recovered]) -> None:
    """Write all files of an audit, those that others read at last.

    The plot of windows shows what clients trained on, so that only the owner may read it, whatever holds for the run.
    """
    folder.mkdir(exist_ok=True, mode=0o700)
    if importlib.util.find_spec("matplotlib"):
        if (figure := drawn.of_run(audit)) is not None:
            save(figure, folder / audits.MEMBERSHIP)
        if recovered:
            save(windows(recovered), folder / audits.INVERSION)
    audit.write(folder)


def _names(several: Sequence[Audit]) -> list[str]:
    """Return a name for each audit: that of its method, with the seed where methods have several."""
    counts = Counter(audit.method for audit in several)
    return [f"{a.method} seed {a.seed}" if counts[a.method] > 1 else a.method for a in several]


def _cell(one: Figure | None) -> Cell:
    if one is None or one.value != one.value:
        return Cell("–")
    limits = "" if one.low != one.low else f" ({one.low:.3f} to {one.high:.3f})"
    return Cell(f"{one.value:.3f}{limits}", one.value)


def _chance(several: Sequence[Figure]) -> str:
    """Return what a figure would be if nothing leaked, as a range over runs."""
    values = sorted(f"{one.chance:.3f}" for one in several if one.chance == one.chance)
    return "–" if not values else values[0] if values[0] == values[-1] else f"{values[0]} to {values[-1]}"
