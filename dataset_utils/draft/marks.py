"""Labels that lie in files of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dataset_utils.counts import some
from dataset_utils.draft.groups import mark_columns
from dataset_utils.draft.look import Look
from dataset_utils.draft.words import SUBJECTS, among, unit_in
from dataset_utils.sources.own.naming import stem


@dataclass(frozen=True)
class Marked:
    """Labels in files of their own.

    Attributes:
        label: value of the key `label`.
        why: from what it follows.
        step: seconds of which all stretches are whole multiples, where they are; else None.
    """

    label: dict[str, Any]
    why: str
    step: float | None = None


def marked(files: Sequence[Path], marks: Sequence[Look], root: Path, subjects: Sequence[str] | None) -> Marked | None:
    """Return how the tables of stretches belong to the recordings; None where they do not.

    Args:
        files: the recordings.
        marks: the tables.
        root: the folder.
        subjects: subject of each recording, where names tell it.
    """
    if not marks:
        return None
    table = _template(files, [one.file for one in marks], root, subjects)
    columns = mark_columns(marks[0])
    if table is None or columns is None:
        return None
    start, end, label = columns
    value: dict[str, Any] = {"table": table}
    value |= {key: own for key, own in (("start", start), ("end", end), ("label", label)) if own != key}
    who = next((n for n in marks[0].names if n not in columns and among(n, SUBJECTS)), None)
    if who is not None:
        value["subject"] = who
    unit = unit_in(start)
    if unit is not None:
        value["unit"] = unit
    labels = {text for one in marks for text in one.columns[label].distinct}
    return Marked(value, f"{marks[0].file.name} has columns of start, end and label: {some(map(repr, sorted(labels)))}")


def beside(looks: Sequence[Look], others: Sequence[Path]) -> Marked | None:
    """Return the annotations in EDF files themselves, or of WFDB records in files beside them; None without any."""
    if looks and all(one.annotations is not None for one in looks):
        spans = np.concatenate([one.annotations for one in looks if one.annotations is not None])
        if not (spans > 0).any():
            return Marked({"events": "{file}" + looks[0].kind}, "annotations without duration in the files")
        shortest = float(spans[spans > 0].min())
        whole = bool(np.allclose(spans / shortest, np.rint(spans / shortest), atol=1e-6))
        why = f"annotations in the files, of {shortest:g} s and more"
        return Marked({"table": "{file}" + looks[0].kind}, why, shortest if whole and shortest >= 1 else None)
    if looks and looks[0].kind == ".hea":
        there = set(others)
        if all(one.file.with_suffix(".atr") in there for one in looks):
            return Marked({"events": "{file}.atr"}, "each record has annotations of beats or rhythms, .atr, beside it")
    return None


def _template(files: Sequence[Path], tables: Sequence[Path], root: Path, subjects: Sequence[str] | None) -> str | None:
    """Return the tables' path with {file}, {folder} or {subject} in it, by which each recording finds its own."""
    there = {table.relative_to(root).as_posix() for table in tables}
    if len(there) == 1:
        return next(iter(there))
    words = [{"file": stem(file), "folder": file.parent.relative_to(root).as_posix()} for file in files]
    for number, word in enumerate(words):
        if subjects is not None:
            word["subject"] = subjects[number]
    for table in sorted(there):
        for key in ("file", "subject", "folder"):
            for word in words:
                value = word.get(key, "")
                if not value or value == "." or value not in table:
                    continue
                template = table.replace(value, f"{{{key}}}")
                if all(template.replace(f"{{{key}}}", own[key]) in there for own in words):
                    return template
    return None
