"""Keys of a description: the value of each, and from what it follows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataset_utils.counts import many, some
from dataset_utils.draft.clock import Clock, rate_of
from dataset_utils.draft.columns import Roles
from dataset_utils.draft.folder import Listed, spread
from dataset_utils.draft.groups import Group, pattern_of
from dataset_utils.draft.look import Look, look
from dataset_utils.draft.marks import Marked
from dataset_utils.draft.names import Named, fields_of, named
from dataset_utils.sources.own.checked import TO_FILL
from registry.errors import UserError

FOUND, GUESSED, MISSING = "found", "guess", "to be filled in"
LOOKED = 8
"""Most files of which many rows are looked at."""
SAMPLES, SHORTEST = 128, 2.0
"""Samples and seconds that a window has at least."""


@dataclass(frozen=True)
class Entry:
    """A key of the description.

    Attributes:
        key, value: as in the YAML file.
        why: from what it follows, or what was seen.
        how: FOUND, GUESSED or MISSING.
    """

    key: str
    value: Any
    why: str = ""
    how: str = FOUND


def looked_into(group: Group) -> list[Look]:
    """Return many rows of some of a group's files; those that fail are left out, as their first rows were read."""
    looks = list[Look]()
    for file in spread(group.files, LOOKED):
        try:
            own = look(file)
        except UserError:
            continue
        if set(group.names) <= set(own.names):
            looks.append(replace(own, columns={name: own.columns[name] for name in group.names if name in own.columns}))
    return looks


def remarks(looks: Sequence[Look]) -> list[str]:
    """Return the remarks on files, each once, with the number of files that it is on."""
    counts = Counter(text for one in looks for text in one.told)
    return [f"{text} ({many(count, 'file')})" for text, count in counts.items()]


def files_entry(files: Sequence[Path], found: Listed, folder: Path, of_labels: Sequence[Path]) -> list[Entry]:
    """Return the key `files`, where it is needed."""
    try:
        pattern = pattern_of(files, found, folder, of_labels)
    except UserError as error:
        return [Entry("files", TO_FILL, f"{error}: give a pattern, such as '*_acc.csv'", MISSING)]
    return [] if pattern is None else [Entry("files", pattern, f"{many(len(files), 'file')}")]


def dialect_entries(looks: Sequence[Look]) -> list[Entry]:
    """Return the key `dialect`, where the reader does not find it out."""
    dialects = [one.dialect for one in looks if one.dialect]
    if not dialects:
        return []
    same = all(one.dialect == dialects[0] for one in looks)
    why = "names for the columns of files that have none, or none that can be used; give them better ones"
    return [Entry("dialect", dialects[0], why if same else f"{why}; files differ in it", GUESSED)]


def time_entries(clock: Clock, looks: Sequence[Look]) -> list[Entry]:
    """Return the keys `time` and `rate`."""
    entries = list[Entry]()
    if clock.column is not None:
        how = MISSING if clock.unit == TO_FILL else FOUND if clock.sure else GUESSED
        entries.append(Entry("time", {"column": clock.column, "unit": clock.unit}, clock.why, how))
    stated = [one.rate for one in looks if one.rate]
    rates = stated or list(clock.rates)
    if not rates:
        why = "samples in a second: there is no column of times from which it follows"
        why = "Hz: it follows from the unit of the times" if clock.column else why
        return [*entries, Entry("rate", TO_FILL, why, MISSING)]
    rate, alike = rate_of(rates)
    why = f"Hz, {'stated in' if stated else 'measured by the times of'} {many(len(rates), 'file')}"
    why += f": {min(rates):.5g} to {max(rates):.5g}" if max(rates) > min(rates) * 1.0001 else f": {rates[0]:.5g}"
    if alike:
        return [*entries, Entry("rate", plain(rate), why)]
    return [
        *entries,
        Entry("resample", plain(rate), f"{why}: rates differ, all are brought to the middle one", GUESSED),
    ]


def plain(rate: float) -> int | float:
    """Return a number as it is written: whole ones without a point."""
    return int(rate) if rate == int(rate) else rate


def channel_entries(roles: Roles) -> list[Entry]:
    """Return the key `columns`."""
    if not roles.channels:
        return [Entry("columns", TO_FILL, "the channels: there is no column of numbers that may be one", MISSING)]
    return [
        Entry("columns", list(roles.channels), f"{many(len(roles.channels), 'channel')}: all columns of numbers left")
    ]


def label_entries(roles: Roles | None, labels: Marked | None, group: Group, folder: Path) -> list[Entry]:
    """Return the keys `label` and `ignore`."""
    if labels is not None:
        return [Entry("label", labels.label, labels.why, GUESSED)]
    if roles is not None and roles.label is not None:
        how = FOUND if "label" in roles.sure else GUESSED
        value = roles.label if not roles.label.isdigit() else {"column": roles.label}
        entries = [Entry("label", value, roles.why["label"], how)]
        if {"-1", "-1.0"} & roles.labels.keys():
            entries.append(Entry("ignore", [-1], "-1 often means no label; if it is a class, list 'classes'", GUESSED))
        return entries
    names = named(fields_of(group.files, folder), True)
    if names.label is None:
        why = "neither a column, nor a table of start and end, nor files' names say it; see docs/guide/own-data.md"
        return [Entry("label", TO_FILL, why, MISSING)]
    rule = names.label.rule
    value = rule if isinstance(rule, dict) else {"from": rule}
    why = names.label.says() + _others(names)
    return [Entry("label", value, why, GUESSED)]


def _others(names: Named) -> str:
    return f"; other parts of names: {some(field.says() for field in names.others)}" if names.others else ""


def who_entries(roles: Roles | None, group: Group, folder: Path, labels: Marked | None) -> list[Entry]:
    """Return the keys `subject` and `session`."""
    wants_label = labels is None and (roles is None or roles.label is None)
    names = named(fields_of(group.files, folder), wants_label)
    entries = list[Entry]()
    if roles is not None and roles.subject is not None:
        how = FOUND if "subject" in roles.sure else GUESSED
        entries.append(Entry("subject", {"column": roles.subject}, roles.why["subject"], how))
    elif names.subject is not None:
        entries.append(Entry("subject", names.subject.rule, names.subject.says() + _others(names), GUESSED))
    else:
        alone = "there is one file" if len(group.files) == 1 else "nothing in names tells persons apart"
        entries.append(Entry("subject", "file", f"{alone}, so each file is a person", GUESSED))
    if roles is not None and roles.session is not None:
        entries.append(Entry("session", {"column": roles.session}, roles.why["session"], GUESSED))
    elif names.session is not None and not wants_label and not (roles is not None and roles.subject is not None):
        entries.append(Entry("session", names.session.rule, names.session.says(), GUESSED))
    return entries


def window_entries(values: dict[str, Any], labels: Marked | None) -> list[Entry]:
    """Return the keys `window` and `overlap`, which follow from the rate."""
    if "cut_already" in values:
        return []
    rate = values.get("resample", values.get("rate"))
    if labels is not None and labels.step:
        why = "seconds: labelled stretches are whole multiples of it"
        return [Entry("window", plain(labels.step), why, GUESSED), Entry("overlap", 0, "windows as labelled", GUESSED)]
    if not isinstance(rate, int | float):
        return [Entry("window", f"{SAMPLES} samples", "a usual length; or in seconds", GUESSED), _overlap()]
    window = plain(float(f"{max(SHORTEST, SAMPLES / rate):.4g}"))
    why = f"seconds, {round(window * rate)} samples: a default, {SAMPLES} samples or more and {SHORTEST:g} s or more"
    return [Entry("window", window, why, GUESSED), _overlap()]


def _overlap() -> Entry:
    return Entry("overlap", 0.5, "share that the next window repeats: a default", GUESSED)
