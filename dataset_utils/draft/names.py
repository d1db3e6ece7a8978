"""Subject, session, label and sensor, as the names of files and folders say them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset_utils.counts import many, some
from dataset_utils.draft.words import ACTIVITIES, OF_SESSION, OF_SUBJECT, SENSORS, SPLITS
from dataset_utils.sources.own.naming import stem
from registry.text import natural, shown

SEPARATOR = re.compile(r"[ _\-.]+")
WORD_AND_NUMBER = re.compile(r"([^\W\d_]+)([0-9]+)")
MOST_LABELS = 30
"""Most distinct words that are taken for labels in names."""


@dataclass(frozen=True)
class Field:
    """A part of the files' paths.

    Attributes:
        rule: value of a key such as `subject` that reads it.
        what: its place, in words.
        values: its value for each file.
        parent: whether it is the name of the file's own folder.
    """

    rule: Any
    what: str
    values: tuple[str, ...]

    @property
    def distinct(self) -> tuple[str, ...]:
        """Its distinct values, sorted."""
        return tuple(sorted(set(self.values), key=natural))

    @property
    def words(self) -> bool:
        """Tell whether all values are words without numbers."""
        return all(re.fullmatch(r"[^\W\d]+", value.replace(" ", "_").replace("-", "_")) for value in self.values)

    def says(self) -> str:
        """Return where it is, and what its values are."""
        return f"{self.what}: {many(len(self.distinct), 'value')}, {some(repr(shown(v, 30)) for v in self.distinct)}"


@dataclass(frozen=True)
class Named:
    """Fields by what they are; None where none is.

    Attributes:
        unsure: roles that follow from what is left over rather than from words or numbers.
        others: varying fields that are none of them.
    """

    subject: Field | None
    session: Field | None
    label: Field | None
    sensor: Field | None
    unsure: frozenset[str]
    others: tuple[Field, ...]


def fields_of(files: Sequence[Path], root: Path) -> list[Field]:
    """Return the parts of the files' paths that vary among them; names with different numbers of parts have one."""
    inside = [file.relative_to(root) for file in files]
    fields = list[Field]()
    depths = {len(path.parts) - 1 for path in inside}
    if len(depths) == 1:
        (depth,) = depths
        for level in range(depth):
            before = f"(?:[^/]+/){{{level}}}" if level else ""
            rule: Any = "folder" if level == depth - 1 else {"pattern": f"^{before}([^/]+)/"}
            what = "the folder's name" if level == depth - 1 else f"the name of folder {level + 1} of {depth}"
            fields.append(Field(rule, what, tuple(path.parts[level] for path in inside)))
    stems = [stem(file) for file in files]
    parts = [[part for part in SEPARATOR.split(name) if part] for name in stems]
    if len({len(own) for own in parts}) == 1 and len(parts[0]) > 1:
        lead = "[ _.-]*" if any(map(SEPARATOR.match, stems)) else ""
        for place, values in enumerate(zip(*parts, strict=True)):
            skipped = "[^ _.-]+[ _.-]+"
            before = lead + (f"(?:{skipped}){{{place}}}" if place > 1 else skipped * place)
            fields.append(Field({"pattern": f"^{before}([^ _.-]+)"}, f"part {place + 1} of the file's name", values))
    elif all(WORD_AND_NUMBER.fullmatch(name) for name in stems):
        hits = [hit for name in stems if (hit := WORD_AND_NUMBER.fullmatch(name))]
        words = tuple(hit[1] for hit in hits)
        if len(set(words)) > 1:
            fields.append(Field({"pattern": r"^([^\W\d_]+)"}, "the word in the file's name", words))
            fields.append(Field({"pattern": "([0-9]+)$"}, "the number in the file's name", tuple(h[2] for h in hits)))
        else:
            fields.append(Field("file", "the file's name", tuple(stems)))
    else:
        fields.append(Field("file", "the file's name", tuple(stems)))
    # a folder or word that tells training from test data is neither a subject nor a label
    varying = [field for field in fields if len(field.distinct) > 1]
    return [field for field in varying if not all(value.lower() in SPLITS for value in field.distinct)]


def named(fields: Sequence[Field], wants_label: bool) -> Named:
    """Return what the parts of names are.

    Args:
        fields: the parts.
        wants_label: whether neither a column nor a file of their own has the labels.
    """
    left, unsure = list(fields), set[str]()

    def take(role: str, fits: object, sure: bool = True) -> Field | None:
        assert callable(fits)
        hit = next((field for field in left if fits(field)), None)
        if hit is not None:
            left.remove(hit)
            if not sure:
                unsure.add(role)
        return hit

    sensor = take("sensor", lambda f: all(value.lower() in SENSORS for value in f.distinct))
    label = take("label", _activities) if wants_label else None
    subject = take("subject", lambda f: all(OF_SUBJECT.fullmatch(v) and not _session_word(v) for v in f.distinct))
    session = take("session", lambda f: all(OF_SESSION.fullmatch(value) for value in f.distinct))
    if subject is None and session is not None and not any(f for f in left if f.rule != "file"):
        subject = take("subject", lambda f: True, False)
    if wants_label and label is None:
        words = [field for field in left if _may_be_label(field)]
        if words and (subject is not None or len(left) > 1):
            label = take("label", lambda f: f is words[-1], False)
    if subject is None:
        subject = take("subject", lambda f: True, False)
    if session is None and subject is not None:
        session = take("session", lambda f: f.rule != "file" and not f.words, False)
    return Named(subject, session, label, sensor, frozenset(unsure), tuple(left))


def _session_word(value: str) -> bool:
    return bool(re.match(r"(session|sess|run|trial|visit)", value, re.IGNORECASE))


def _activities(field: Field) -> bool:
    known = [value for value in field.distinct if value.lower().startswith(ACTIVITIES)]
    return field.words and 1 < len(field.distinct) <= MOST_LABELS and len(known) >= 0.5 * len(field.distinct)


def _may_be_label(field: Field) -> bool:
    return field.words and len(field.distinct) <= MOST_LABELS and len(field.values) > len(field.distinct)
