"""Grids: which configurations a YAML file of an experiment stands for."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from registry.errors import UserError
from registry.parameters import suggest
from registry.text import shown

PARTS = ("title", "about", "base", "grid", "search")
# in a clone, and where setup.cfg installs them
FOLDERS = (Path(__file__).parents[2] / "experiments", Path(sys.prefix) / "share" / "fedkdx" / "experiments")
# keys that differ between runs of one section; any other key that varies makes sections
IN_THE_RUN = ("algorithm", "label", "set", "preset", "student_model", "local_learning_rate", "times")

OF_PEOPLE = ("data", "subjects", "exclude_subjects")  # names of subjects mean something in their data set alone


def find(name: str) -> Path:
    """Return the YAML file of an experiment, by its name or path. Raises UserError: the name is unknown."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    known = {path.stem: path for folder in reversed(FOLDERS) for path in sorted(folder.glob("*.yaml"))}
    if name not in known:
        names = ", ".join(sorted(known))
        raise UserError(f"{shown(name)}: no such experiment{suggest(name, known)}; choose {names}, or give a YAML file")
    return known[name]


def mapping(where: str, content: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Return the mapping under a key of a file, {} where there is none. Raises UserError: it is no mapping."""
    value = content.get(part)
    value = {} if value is None else value
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {part}: must hold 'name: value' lines")
    return dict(value)


def combinations(
    where: str, base: Mapping[str, Any], grid: Mapping[str, Any], given: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield flat configurations: the base, an entry of every axis, and `given`; a later one overrides an earlier one.

    An axis is a key with a list of values, or any name with a list of mappings that set several keys at once.
    """
    axes = []
    for key, entries in grid.items():
        if not isinstance(entries, list) or not entries:
            raise UserError(f"{where}: grid: {key}: must be a list of values, or of mappings")
        _check_whole(where, key, entries, given)
        axes.append([dict(entry) if isinstance(entry, Mapping) else _assigned(key, entry) for entry in entries])
    for entries in itertools.product(*axes):
        values: dict[str, Any] = {}
        for part in (base, *entries, given):
            sets = {**(values.get("set") or {}), **(part.get("set") or {})}
            values = values | dict(part) | {"set": sets}
        yield values


def _check_whole(where: str, axis: str, entries: Sequence[Any], given: Mapping[str, Any]) -> None:
    """Raise UserError where `given` would replace a data set without its subjects, or these without it."""
    for entry in entries:
        own = [key for key in OF_PEOPLE if isinstance(entry, Mapping) and key in entry]
        for key in own if len(own) > 1 else ():
            if key in given and str(entry[key]) != str(given[key]):
                raise UserError(
                    f"{where}: grid: {axis}: sets {' and '.join(own)} together, so {key} alone cannot be replaced; "
                    f"pick entries with --only data=NAME, or edit a copy of the file"
                )


def _assigned(key: str, value: Any) -> dict[str, Any]:
    """Return what a scalar of an axis sets: a key, or, for `set.NAME`, a hyper-parameter and the run's label."""
    if key.startswith("set."):
        name = key.removeprefix("set.")
        return {"set": {name: value}, "label": f"{name.rpartition('.')[2]}={value}"}
    return {key: value}


def varied(grid: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Return the keys that make sections: those that the grid varies, without those that vary within a section."""
    keys = [
        key
        for axis, entries in grid.items()
        for entry in entries
        for key in (entry if isinstance(entry, Mapping) else [axis])
    ]
    apart = (*IN_THE_RUN, "data")
    return [key for key in dict.fromkeys(keys) if key not in apart and not key.startswith("set.") and key not in given]


def condition(text: str) -> tuple[str, list[str]]:
    """Return key and values of a condition of `--only`. Raises UserError."""
    key, equals, values = text.partition("=")
    if not equals or not values:
        raise UserError(f"--only {text}: is no condition; write KEY=VALUE or KEY=VALUE,VALUE, such as data=SLEEP")
    return key.strip(), [value.strip().lower() for value in values.split(",")]


def meets(settings: Mapping[str, Any], key: str, allowed: Sequence[str]) -> bool:
    """Return whether a run's settings meet a condition. Raises UserError: a key that runs do not have."""
    if key not in settings:
        raise UserError(f"--only {key}: runs have no option '{key}'{suggest(key, settings)}")
    value = settings[key]
    return any(str(item).lower() in allowed for item in (value if isinstance(value, list) else [value]))
