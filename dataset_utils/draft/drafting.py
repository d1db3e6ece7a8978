"""Draft of a description: the values of its keys, and from what each follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset_utils.counts import many, some
from dataset_utils.draft.clock import clock_of
from dataset_utils.draft.columns import roles_of
from dataset_utils.draft.entries import (
    GUESSED,
    MISSING,
    Entry,
    channel_entries,
    dialect_entries,
    files_entry,
    label_entries,
    looked_into,
    plain,
    remarks,
    time_entries,
    who_entries,
    window_entries,
)
from dataset_utils.draft.folder import listed
from dataset_utils.draft.groups import Group, first_key, merged, sort
from dataset_utils.draft.look import Look
from dataset_utils.draft.marks import beside, marked
from dataset_utils.draft.names import fields_of, named
from dataset_utils.draft.sensors import draft_streams, sensors_of
from dataset_utils.sources.own.checked import TO_FILL
from registry.errors import UserError
from registry.text import is_plain_name, shown


@dataclass(frozen=True)
class Draft:
    """A draft of a description.

    Attributes:
        folder: the recordings' folder.
        entries: its keys, in order.
        files: the recordings.
        looked: number of files of which many rows were looked at.
        told: remarks: what was left out.
    """

    folder: Path
    entries: tuple[Entry, ...]
    files: tuple[Path, ...]
    looked: int
    told: tuple[str, ...]

    @property
    def values(self) -> dict[str, Any]:
        """Key -> value."""
        return {entry.key: entry.value for entry in self.entries}


def draft(folder: Path) -> Draft:
    """Draft the description of the recordings in a folder. Raises UserError where nothing can be drafted."""
    found = listed(folder)
    sorting = sort(found, folder)
    everything = sorted((file for group in sorting.groups for file in group.files), key=first_key)
    sensors = sensors_of(sorting.groups, everything, folder)
    if sensors is not None:
        entries, looked, told = draft_streams(sensors, sorting, found, folder)
        return Draft(folder, (*_first(folder), *entries), tuple(everything), looked, (*sorting.told, *told))
    group, left = merged(sorting.groups)
    looks = looked_into(group)
    if not looks:
        raise UserError(
            f"{shown(folder)}: nothing can be drafted, none of {many(len(group.files), 'file')} can be read"
        )
    told = [*sorting.told, *left]
    told += remarks(looks)
    names = named(fields_of(group.files, folder), False)
    subjects = names.subject.values if names.subject else None
    labels = beside(looks, found.beside) or marked(group.files, sorting.marks, folder, subjects)
    of_labels = [one.file for one in sorting.marks] if labels else []
    if sorting.marks and not labels:
        told.append(f"{many(len(sorting.marks), 'table')} of start, end and label that fit no recording by name")
    entries = [*_first(folder), *files_entry(group.files, found, folder, of_labels)]
    if looks[0].rates:
        signals, more = _signals(looks)
        entries += [*signals, *label_entries(None, labels, group, folder), *who_entries(None, group, folder, labels)]
    elif looks[0].windows:
        windows, more = _windows(looks, group, folder)
        entries += windows
    else:
        clock = clock_of(looks, group.names)
        taken = [*clock.counters, *([clock.column] if clock.column else [])]
        roles = roles_of(looks, group.names, taken)
        more = [*clock.told, *roles.told]
        if counted := [name for name in clock.counters if name in group.names]:
            more.append(f"{some(map(repr, counted))}: numbers of rows or times, no channels")
        entries += [*dialect_entries(looks), *time_entries(clock, looks), *channel_entries(roles)]
        entries += label_entries(roles, labels, group, folder)
        entries += who_entries(roles, group, folder, labels)
    entries += window_entries({entry.key: entry.value for entry in entries}, labels)
    return Draft(folder, tuple(entries), group.files, len(looks), tuple(dict.fromkeys([*told, *more])))


def _first(folder: Path) -> list[Entry]:
    name = folder.resolve().name
    plain = name if is_plain_name(name) else "recordings"
    return [Entry("name", plain), Entry("folder", str(folder), "relative to this file")]


def _signals(looks: Sequence[Look]) -> tuple[list[Entry], list[str]]:
    """Return the keys of EDF and WFDB files: signals of one rate."""
    shared = {n: r for n, r in looks[0].rates.items() if all(one.rates.get(n) == r for one in looks)}
    shared = {name: rate for name, rate in shared.items() if name and "annotation" not in name.lower()}
    if not shared:
        return [
            Entry("rate", TO_FILL, "Hz: no signal has one rate in all files", MISSING),
            Entry("columns", TO_FILL, "signals of one rate", MISSING),
        ], []
    rate = max(shared.values(), key=lambda own: (list(shared.values()).count(own), own))
    channels = [name for name, own in shared.items() if own == rate]
    others = [f"{name} ({own:g} Hz)" for name, own in shared.items() if own != rate]
    told = [f"signals of another rate: {some(others)}; describe them with 'streams'"] if others else []
    why = f"{many(len(channels), 'signal')} of this rate in all files looked at"
    return [Entry("rate", plain(rate), "Hz, stated in the files"), Entry("columns", channels, why)], told


def _windows(looks: Sequence[Look], group: Group, folder: Path) -> tuple[list[Entry], list[str]]:
    """Return the keys of files that hold windows in an array `x`."""
    shape = looks[0].windows or (0, 0, 0)
    shape = (shape[0], shape[1], shape[-1])
    first = shape[1] <= shape[2]
    channels, samples = (shape[1], shape[2]) if first else (shape[2], shape[1])
    rates = [one.rate for one in looks if one.rate]
    roles = roles_of(looks, [name for name in group.names if "[" not in name], (), True)
    entries = [
        Entry(
            "cut_already",
            "channels first" if first else "time first",
            f"x has shape {looks[0].windows}: the longer axis is time",
            GUESSED,
        ),
        Entry(
            "columns",
            [f"c{n + 1}" for n in range(channels)],
            f"{many(channels, 'channel')} without names: give them better ones",
            GUESSED,
        ),
        Entry("window", f"{samples} samples", "the longer axis of x"),
        Entry("rate", plain(rates[0]), "Hz, stated in the files")
        if rates
        else Entry("rate", TO_FILL, "Hz: files do not say it", MISSING),
        Entry(
            "overlap", TO_FILL, "share of samples that consecutive windows have in common: files do not say it", MISSING
        ),
        *label_entries(roles, None, group, folder),
        *who_entries(roles, group, folder, None),
    ]
    return entries, list(roles.told)
