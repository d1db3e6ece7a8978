"""Draft of recordings with a file for each sensor: `streams`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset_utils.counts import some
from dataset_utils.draft.clock import clock_of, rate_of
from dataset_utils.draft.columns import Roles, roles_of
from dataset_utils.draft.entries import (
    GUESSED,
    MISSING,
    Entry,
    label_entries,
    looked_into,
    plain,
    remarks,
    window_entries,
)
from dataset_utils.draft.folder import Listed
from dataset_utils.draft.groups import Group, Sorting, pattern_of
from dataset_utils.draft.look import Look
from dataset_utils.draft.marks import marked
from dataset_utils.draft.names import Field, Named, fields_of, named
from dataset_utils.draft.words import SENSORS
from dataset_utils.sources.own.checked import TO_FILL
from registry.errors import UserError


@dataclass(frozen=True)
class Sensors:
    """Files of several sensors.

    Attributes:
        field: the part of names that says the sensor.
        named: what the other parts say.
        files: all files, sorted as the fields' values are.
        groups: sensor -> its files.
    """

    field: Field
    named: Named
    files: tuple[Path, ...]
    groups: dict[str, Group]


def sensors_of(groups: Sequence[Group], files: Sequence[Path], root: Path) -> Sensors | None:
    """Return files of several sensors, of which each subject and session has one each; None where files are no such."""
    fields = fields_of(files, root)
    names_of = {file: group.names for group in groups for file in group.files}
    for field in fields:
        by_sensor: dict[str, list[Path]] = {}
        for value, file in zip(field.values, files, strict=True):
            by_sensor.setdefault(value, []).append(file)
        columns = {value: {names_of[file] for file in own} for value, own in by_sensor.items()}
        words = all(value.lower() in SENSORS for value in by_sensor)
        own_columns = len(groups) > 1 and all(len(c) == 1 for c in columns.values())
        own_columns &= len({names for c in columns.values() for names in c}) == len(columns) > 1
        if not (words or own_columns) or len(files) < 2 * len(by_sensor):
            continue
        others = named([other for other in fields if other is not field], False)
        keys = [
            tuple(part.values[n] for part in (others.subject, others.session) if part is not None)
            for n in range(len(files))
        ]
        if others.subject is None or others.subject.rule == "file" or not _complete(keys, field.values):
            continue
        of_file = {one.file: one for group in groups for one in group.heads}
        made = {
            value: Group(groups[0].kind, names_of[own[0]], tuple(own), tuple(of_file[f] for f in own if f in of_file))
            for value, own in by_sensor.items()
        }
        return Sensors(field, others, tuple(files), made)
    return None


def _complete(keys: Sequence[tuple[str, ...]], values: Sequence[str]) -> bool:
    """Return whether each subject and session has one file of each sensor."""
    counts = Counter(zip(keys, values, strict=True))
    return max(counts.values()) == 1 and len(counts) == len(set(keys)) * len(set(values))


def draft_streams(
    sensors: Sensors, sorting: Sorting, found: Listed, folder: Path
) -> tuple[list[Entry], int, list[str]]:
    """Return the keys of the description, the number of files looked into, and remarks."""
    streams, told, looked, labelled = list[dict[str, Any]](), list[str](), 0, list[tuple[str, Roles]]()
    rates, used = list[float](), Counter[str]()
    missing = False
    for sensor, group in sensors.groups.items():
        looks = looked_into(group)
        looked += len(looks)
        clock = clock_of(looks, group.names)
        roles = roles_of(looks, group.names, [*clock.counters, *([clock.column] if clock.column else [])])
        told += [f"{sensor}: {text}" for text in (*clock.told, *roles.told, *remarks(looks))]
        stated = [one.rate for one in looks if one.rate] or list(clock.rates)
        stream: dict[str, Any] = {"files": _pattern(group, found, folder), "columns": list(roles.channels) or TO_FILL}
        stream["rate"] = TO_FILL
        if stated:
            rate = rate_of(stated)[0]
            stream["rate"] = plain(rate)
            rates.append(rate)
        if clock.column:
            stream["time"] = {"column": clock.column, "unit": clock.unit}
        else:
            told.append(
                f"{sensor}: no column of times, so its first rows are taken to be of the same moment as others'"
            )
        dialect = next((one.dialect for one in looks if one.dialect), None)
        if set(roles.channels) & used.keys():
            dialect, renamed = _renamed(sensor, group, looks[0], roles.channels)
            stream["columns"] = renamed
        if dialect:
            stream["dialect"] = dialect
        used.update(roles.channels)
        if roles.label is not None:
            labelled.append((sensor, roles))
            if len(labelled) == 1:
                stream["label"] = roles.label
        missing |= TO_FILL in (stream["columns"], stream["rate"], stream["files"]) or clock.unit == TO_FILL
        streams.append(stream)
    first = next(iter(sensors.groups.values()))
    rate = max(rates) if rates else 0.0
    why = f"Hz: the highest of {some(f'{own:g}' for own in rates)}; all are resampled to it"
    entries = [
        Entry("rate", plain(rate), why, GUESSED) if rates else Entry("rate", TO_FILL, "Hz: of all sensors", MISSING)
    ]
    subject, session = sensors.named.subject, sensors.named.session
    assert subject is not None  # `sensors_of` has seen to it
    entries.append(Entry("subject", subject.rule, subject.says(), GUESSED))
    if session is not None:
        entries.append(Entry("session", session.rule, session.says(), GUESSED))
    why = f"a file for each sensor: {sensors.field.says()}"
    entries.append(Entry("streams", streams, why, MISSING if missing else GUESSED))
    place = dict(zip(sensors.files, subject.values, strict=True))
    labels = None
    if labelled:
        told.append(f"label: column '{labelled[0][1].label}' of {labelled[0][0]}: {labelled[0][1].why['label']}")
    else:
        labels = marked(first.files, sorting.marks, folder, [place[file] for file in first.files])
        entries += label_entries(None, labels, first, folder)
    entries += window_entries({entry.key: entry.value for entry in entries}, labels)
    return entries, looked, told


def _pattern(group: Group, found: Listed, folder: Path) -> str | list[str]:
    try:
        return pattern_of(group.files, found, folder) or f"*{group.kind}"
    except UserError:
        return TO_FILL


def _renamed(sensor: str, group: Group, one: Look, channels: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return a dialect that names the channels by their sensor, and these names: streams share no name."""
    names = {name: f"{sensor.lower()}_{name}" for name in channels}
    header = [names.get(name, name) for name in one.dialect.get("header", group.names)]
    skip = {"skip": one.skip} if one.skip else {}
    return one.dialect | {"header": header} | skip, [names[name] for name in channels]
