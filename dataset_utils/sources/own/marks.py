"""Labels from a separate file: a table of start, end and label, or events."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset_utils.files import is_file
from dataset_utils.sources.own import inventory
from dataset_utils.sources.own.description import Description, Dialect, Marks, Time
from dataset_utils.sources.own.labels import Text
from dataset_utils.sources.own.naming import ending, stem
from dataset_utils.sources.own.reading import read
from dataset_utils.sources.own.signal_files import edf_annotations, wfdb_annotations
from dataset_utils.sources.own.table import Table, Wanted
from dataset_utils.time_axis import UNITS
from registry.errors import UserError

TABLES = (".csv", ".tsv", ".txt", ".parquet")
"""Endings of tables; .edf and .bdf files hold annotations, and any other ending is an annotator of WFDB."""
OUTSIDE = "event outside of the recording"


class Places(NamedTuple):
    """Labelled intervals on the time axis.

    Attributes:
        start, end: (n,), seconds; equal for events.
        label: (n,), the labels.
        file: the file that holds them.
    """

    start: np.ndarray
    end: np.ndarray
    label: Text
    file: Path


def path_of(marks: Marks, file: Path, root: Path, subject: str, session: str) -> Path:
    """Return the file of a recording's marks. Raises UserError if it is not there."""
    words = {
        "file": stem(file),
        "folder": file.parent.relative_to(root).as_posix(),
        "subject": subject,
        "session": session,
    }
    name = marks.file
    for word, value in words.items():
        name = name.replace(f"{{{word}}}", value)
    if Path(name).is_absolute() or ".." in Path(name).parts or not name.isprintable():
        raise UserError(f"{file}: its labels would lie in '{name}', which is not below {root}")
    if "*" in name:
        hits = sorted(root.glob(name))
        if len(hits) != 1:
            raise UserError(f"{root}: {len(hits)} files fit '{name}', one should, with the labels of {file.name}")
        return hits[0]
    path = root / name
    if not is_file(path):
        raise UserError(f"{path}: there is no such file, which should hold the labels of {file.name}; correct 'label'")
    return path


def read_marks(path: Path, marks: Marks, subject: str | None, unit: str) -> Places:
    """Read the marks in a file, of one subject if there is a column of subjects.

    Args:
        path: the file.
        marks: its description.
        subject: the subject; None for all, if only the labels are wanted.
        unit: unit of the recording's times, used where the description gives none.

    Raises:
        UserError: the file is damaged.
    """
    if ending(path) not in TABLES:
        found = edf_annotations(path) if ending(path) in (".edf", ".bdf") else wfdb_annotations(path)
        end = found.onset if marks.end is None else found.onset + found.duration
        return Places(found.onset, end, Text.of(found.labels), path)
    texts = (marks.label, *([marks.subject] if marks.subject else []))
    table, time = _read_timed(path, marks.start, texts, marks.dialect)
    scale = UNITS[table.unit or unit]
    start: np.ndarray = time * scale
    rows, end = np.ones(len(time), dtype=bool), start
    if marks.end is not None:
        _, until = _read_timed(path, dataclasses.replace(marks.start, column=marks.end), texts, marks.dialect)
        end = until * scale
    if marks.subject and subject is not None:
        whose = table.texts[marks.subject]
        rows = np.array([value == subject for value in whose.values])[whose.codes]
    return Places(start[rows], end[rows], table.texts[marks.label].take(rows), path)


def _read_timed(path: Path, time: Time, texts: tuple[str, ...], dialect: Dialect) -> tuple[Table, np.ndarray]:
    table = read(path, Wanted((), time, texts), dialect)
    assert table.time is not None  # a table read with a column of times has them
    return table, table.time


def place(places: Places, seconds: np.ndarray, marks: Marks, name: str) -> tuple[Text, int]:
    """Return the label of each sample, '' where there is none, and the number of events outside the recording.

    Args:
        places: the labelled intervals or events.
        seconds: (samples,), times of the samples, ascending where the marks are events.
        marks: description of the marks.
        name: name of the recording, for messages.

    Raises:
        UserError: an interval ends before it starts, intervals of different labels overlap, or none of the marks lies
            in the recording.
    """
    values = ("", *places.label.values)
    codes = np.zeros(len(seconds), dtype=np.int32)
    label = places.label.codes + 1
    if marks.end is None:
        step = np.median(np.diff(seconds)) if len(seconds) > 1 else 0.0
        order = np.argsort(seconds, kind="stable")
        ordered = seconds[order]
        after = np.clip(np.searchsorted(ordered, places.start), 1, max(1, len(seconds) - 1))
        nearest = after - (places.start - ordered[after - 1] < ordered[after] - places.start)
        inside = np.abs(ordered[nearest] - places.start) <= step
        codes[order[nearest[inside]]] = label[inside]
        hit, outside = inside.any(), int(np.count_nonzero(~inside))
    else:
        order = np.argsort(places.start, kind="stable")
        start, end, label = places.start[order], places.end[order], label[order]
        wrong = np.flatnonzero(end <= start)
        if len(wrong):
            raise UserError(
                f"{places.file}: an interval ends at {end[wrong[0]]:g}, before or at its start {start[wrong[0]]:g}"
            )
        # of the intervals up to each, the one that ends last: an interval of the same label may lie within it
        longest = np.maximum.accumulate(np.where(end == np.maximum.accumulate(end), np.arange(len(end)), 0))
        clash = np.flatnonzero((start[1:] < end[longest[:-1]] - 1e-9) & (label[1:] != label[longest[:-1]]))
        if len(clash):
            one, two = (values[label[place]] for place in (longest[clash[0]], clash[0] + 1))
            raise UserError(f"{places.file}: '{one}' and '{two}' overlap at {start[clash[0] + 1]:g} s; correct them")
        begun = np.searchsorted(start, seconds + 1e-9, side="right")  # how many intervals have begun at each sample
        there = np.flatnonzero(begun)
        last = longest[begun[there] - 1]
        covered = seconds[there] < end[last] - 1e-9
        codes[there[covered]] = label[last[covered]]
        hit, outside = covered.any(), 0
    if len(places.start) and not hit:
        raise UserError(
            f"{places.file}: none of its {len(places.start)} marks lies within {name}, whose times go from "
            f"{seconds[0]:.10g} to {seconds[-1]:.10g} s; are their times counted from the same moment, in one unit?"
        )
    return Text(codes, values), outside


def labels_of(description: Description, root: Path) -> set[str]:
    """Return all labels in files of marks."""
    marks = description.label
    assert isinstance(marks, Marks)
    paths = inventory.label_files(description, root)
    if not paths:
        raise UserError(f"{root}: holds no '{marks.file}', which should hold the labels; correct 'label'")
    return {value for path in paths for value in read_marks(path, marks, None, "s").label.values}
