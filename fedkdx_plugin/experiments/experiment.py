"""An experiment: a grid of runs in a YAML file, run side by side, continued where it was interrupted, and reported."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkdx_plugin.configuration.choice import resolve, run_settings
from fedkdx_plugin.configuration.config import from_dict, read_yaml
from fedkdx_plugin.experiments.comparison import check
from registry.errors import UserError
from registry.parameters import suggest

PARTS = ("title", "about", "base", "grid")
# found in a clone, and where setup.cfg puts them when installed
FOLDERS = (Path(__file__).parents[2] / "experiments", Path(sys.prefix) / "share" / "fedkdx" / "experiments")
IN_THE_RUN = (
    "algorithm",
    "label",
    "set",
    "preset",
    "student_model",
)  # tell runs of a section apart; all else makes sections
NO_RESULT = ("out", "raw", "download", "data_root", "backend", "device", "device_id")  # do not change what comes out


@dataclass(frozen=True)
class Job:
    """One run to be made: one algorithm under one seed.

    Attributes:
        name: for people.
        place: its run folder.
        settings: its configuration, resolved (see `choice.run_settings`).
    """

    name: str
    place: Path
    settings: Mapping[str, Any]

    @property
    def rounds(self) -> int:
        return self.settings["global_rounds"]

    @property
    def kind(self) -> str:
        """Runs of one kind take about as long: one algorithm in one setting, under any seed."""
        return self.name.partition(" seed ")[0]


@dataclass(frozen=True)
class Experiment:
    """What to run and what it is for.

    Attributes:
        name: the file's name, without its ending.
        title, about: a line and a paragraph for the report.
        jobs: all runs; those of one seed before those of the next.
    """

    name: str
    title: str
    about: str
    jobs: list[Job]


def find(name: str) -> Path:
    """The YAML file of an experiment, by its name or path. Raises UserError."""
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    known = {path.stem: path for folder in reversed(FOLDERS) for path in sorted(folder.glob("*.yaml"))}
    if name not in known:
        raise UserError(
            f"--experiment {name}: no such experiment{suggest(name, known)}; choose {', '.join(sorted(known))}, "
            "or name a YAML file"
        )
    return known[name]


def plan(name: str, given: Mapping[str, Any], only: Sequence[str] = ()) -> Experiment:
    """The runs of an experiment, all checked.

    Args:
        name: see `find`.
        given: options that replace the file's, also a whole axis of its grid.
        only: conditions `KEY=VALUE,VALUE`, all of which a run must meet to take part.

    Raises:
        UserError: unknown experiment, wrong YAML, wrong configuration, or nothing left to run.
    """
    path = find(name)
    content = read_yaml(path)
    for key in content:
        if key not in PARTS:
            raise UserError(f"{path}: unknown key '{key}'{suggest(str(key), PARTS)}; it may hold {', '.join(PARTS)}")
    base, grid = (_mapping(path, content, part) for part in ("base", "grid"))
    conditions = [_condition(text) for text in only]
    jobs: dict[Path, Job] = {}
    for values in _combinations(path, base, grid, given):
        for job in _jobs(path, values, _varied(grid, given)):
            if all(_meets(job, key, allowed) for key, allowed in conditions):
                jobs.setdefault(job.place, job)
    if not jobs:
        raise UserError(f"{path}: no run is left by --only {' '.join(only)}" if only else f"{path}: its grid is empty")
    ordered = sorted(jobs.values(), key=lambda job: job.settings["seed"])
    return Experiment(path.stem, str(content.get("title", path.stem)), str(content.get("about", "")).strip(), ordered)


def _mapping(path: Path, content: Mapping[str, Any], part: str) -> dict[str, Any]:
    value = content.get(part) or {}
    if not isinstance(value, Mapping):
        raise UserError(f"{path}: {part}: must hold 'name: value' lines")
    return dict(value)


def _combinations(
    path: Path, base: Mapping[str, Any], grid: Mapping[str, Any], given: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Flat configurations: the base, an entry of every axis, and what is given, the later one winning.

    An axis is a key with a list of values, or any name with a list of mappings that set several keys at once.
    """
    axes = []
    for key, entries in grid.items():
        if not isinstance(entries, list) or not entries:
            raise UserError(f"{path}: grid: {key}: must be a list of values, or of mappings")
        axes.append([dict(entry) if isinstance(entry, Mapping) else _assigned(key, entry) for entry in entries])
    for entries in itertools.product(*axes):
        values: dict[str, Any] = {}
        for part in (base, *entries, given):
            sets = {**(values.get("set") or {}), **(part.get("set") or {})}
            values = values | dict(part) | {"set": sets}
        yield values


def _assigned(key: str, value: Any) -> dict[str, Any]:
    """An axis' scalar: of a key, or, as `set.NAME`, of a hyper-parameter, which then also labels the run."""
    if key.startswith("set."):
        name = key.removeprefix("set.")
        return {"set": {name: value}, "label": f"{name.rpartition('.')[2]}={value}"}
    return {key: value}


def _varied(grid: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Keys that make sections: those that the grid varies, but for those that tell runs of a section apart."""
    keys = [
        key
        for axis, entries in grid.items()
        for entry in entries
        for key in (entry if isinstance(entry, Mapping) else [axis])
    ]
    apart = (*IN_THE_RUN, "data")
    return [key for key in dict.fromkeys(keys) if key not in apart and not key.startswith("set.") and key not in given]


def _jobs(path: Path, values: Mapping[str, Any], varied: Sequence[str]) -> Iterator[Job]:
    """A job for each algorithm and seed of one configuration."""
    config = from_dict(values, str(path))
    choices = check(config)
    resolved = resolve(config, choices)
    section = ",".join(
        [Path(config.shards.data).stem, *(f"{k}={resolved[k]}" for k in varied if values.get(k) is not None)]
    )
    for seed in range(config.seed, config.seed + config.times):
        for choice in choices:
            settings = run_settings(resolved, choice, seed)
            label = f"{choice.name} {config.label}".strip()
            counted = {key: value for key, value in settings.items() if key not in NO_RESULT}
            code = hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()[:8]
            folder = _file_name(f"{label}-seed{seed}-{code}")
            place = Path(config.out) / path.stem / _file_name(section) / folder
            yield Job(f"{section}: {label}" + (f" seed {seed}" if config.times > 1 else ""), place, settings)


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.,=+@-]+", "-", text).strip("-")


def _condition(text: str) -> tuple[str, list[str]]:
    key, equals, values = text.partition("=")
    if not equals or not values:
        raise UserError(f"--only {text}: write KEY=VALUE or KEY=VALUE,VALUE, such as data=SLEEP")
    return key.strip(), [value.strip().lower() for value in values.split(",")]


def _meets(job: Job, key: str, allowed: Sequence[str]) -> bool:
    if key not in job.settings:
        raise UserError(f"--only {key}: runs have no '{key}'{suggest(key, job.settings)}")
    value = job.settings[key]
    return any(str(item).lower() in allowed for item in (value if isinstance(value, list) else [value]))
