"""Results of an audit in a run folder: figures of each attack, and the curves of membership inference."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from dataset_utils.files import is_file, replacing
from dataset_utils.sealed import read_bytes
from fedkdx_plugin.results.records import field
from registry.errors import UserError

FOLDER, FILE, TABLE = "audit", "audit.json", "audit.csv"
FORMAT = 1
MEMBERSHIP, INVERSION, IDENTITY = "membership", "inversion", "identity"
ATTACKS = {
    MEMBERSHIP: "which windows were trained on",
    INVERSION: "the windows themselves, from an update",
    IDENTITY: "which client sent an update",
}
MAIN = {MEMBERSHIP: "auc", INVERSION: "correlation", IDENTITY: "accuracy"}  # the figure that stands for an attack


@dataclass(frozen=True)
class Figure:
    """One figure of one attack.

    Attributes:
        attack: one of `ATTACKS`.
        target: what is attacked.
        method: how.
        name: what the figure is: 'auc', 'advantage', 'tpr_0.01', 'correlation', ...
        value: the figure; NaN where it cannot be told.
        low, high: a 95 % interval; NaN without one.
        chance: what it would be if nothing leaked; NaN if that is not known.
    """

    attack: str
    target: str
    method: str
    name: str
    value: float
    low: float
    high: float
    chance: float


@dataclass(frozen=True)
class Roc:
    """Curve of a membership inference: true over false positives."""

    target: str
    method: str
    false: list[float]
    true: list[float]


@dataclass(frozen=True)
class Audit:
    """Results of an audit of one run.

    Attributes:
        method: name of the audited method.
        seed: seed of the run.
        round: number of rounds that the run had made.
        options: options of the audit.
        counts: numbers of audited windows, clients, ...
        notes: what has to be known to read the figures.
        seconds: how long it took.
        figures: the figures.
        curves: the curves.
    """

    method: str
    seed: int
    round: int
    options: Mapping[str, Any]
    counts: Mapping[str, int]
    notes: Sequence[str]
    seconds: float
    figures: Sequence[Figure]
    curves: Sequence[Roc]

    def write(self, folder: Path) -> None:
        """Write `audit.csv` and, at last, `audit.json` into a folder. Raises UserError: it cannot be written."""
        columns = [own.name for own in fields(Figure)]
        text = io.StringIO()
        rows = csv.DictWriter(text, columns, lineterminator="\n")
        rows.writeheader()
        rows.writerows({name: field(value) for name, value in asdict(one).items()} for one in self.figures)
        values = {"format": FORMAT} | _without_nan(asdict(self))
        for name, content in ((TABLE, text.getvalue()), (FILE, json.dumps(values, indent=1, allow_nan=False) + "\n")):
            with replacing(folder / name) as part:
                part.write_text(content, encoding="utf-8")


def read(run: Path) -> Audit | None:
    """Return the audit in a run folder; None if there is none. Raises UserError: it is damaged."""
    path = run / FOLDER / FILE
    if not is_file(path):
        return None
    advice = f"remove {path.parent} and audit the run again"
    try:
        values = json.loads(read_bytes(path, advice))
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']} instead of {FORMAT}")
        return Audit(
            method=str(values["method"]),
            seed=int(values["seed"]),
            round=int(values["round"]),
            options=dict(values["options"]),
            counts={str(name): int(count) for name, count in values["counts"].items()},
            notes=list(map(str, values["notes"])),
            seconds=float(values["seconds"]),
            figures=[_figure(one) for one in values["figures"]],
            curves=[_roc(one) for one in values["curves"]],
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())}); {advice}") from error


def _figure(values: Mapping[str, Any]) -> Figure:
    words = (str(values[key]) for key in ("attack", "target", "method", "name"))
    numbers = (math.nan if values[k] is None else float(values[k]) for k in ("value", "low", "high", "chance"))
    return Figure(*words, *numbers)  # type: ignore[arg-type]


def _roc(values: Mapping[str, Any]) -> Roc:
    false, true = ([float(v) for v in values[key]] for key in ("false", "true"))
    if len(false) != len(true) or not len(false):
        raise ValueError("a curve without points")
    return Roc(str(values["target"]), str(values["method"]), false, true)


def _without_nan(value: Any) -> Any:
    """Return values as JSON can hold them: None instead of NaN."""
    if isinstance(value, Mapping):
        return {key: _without_nan(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(own) for own in value]
    return None if isinstance(value, float) and math.isnan(value) else value
