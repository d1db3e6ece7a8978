"""Run folders, read back: what a report knows is what lies in them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import yaml

from fedkdx_plugin.engine.rounds import RoundRecord
from fedkdx_plugin.results.records import read_results
from registry.errors import UserError

CONFIG, ENVIRONMENT, RESULTS, ROUNDS = "config.yaml", "environment.json", "results.h5", "metrics.csv"
FAILED = "failed.txt"  # why a run failed, in its first line; below it the traceback, where there is one
FORMAT = 2  # of a run folder. 1, which had no number, lacks the number alone, so that it is read as well


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: where it lies.
        config: its configuration, resolved.
        environment: command, versions, device, data.
        records: all rounds, without their confusion matrices.
        confusion: view -> (clients, true, predicted) of the last round.
        classes: their names.
        groups: clients set apart: name -> ids.
    """

    folder: Path
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    records: list[RoundRecord]
    confusion: Mapping[str, np.ndarray]
    classes: tuple[str, ...]
    groups: Mapping[str, list[int]]

    @property
    def algorithm(self) -> str:
        """The algorithm's name."""
        return self.environment.get("algorithm", {}).get("name") or self.config["algorithm"][0]

    @property
    def name(self) -> str:
        """The algorithm, and the label that tells its variants apart."""
        return f"{self.algorithm} {self.config.get('label') or ''}".strip()

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def data(self) -> Mapping[str, Any]:
        """The data's `name`, `folder`, `manifest_sha256`, and on which windows figures are: `evaluated_on`."""
        return self.environment["data"]

    @property
    def evaluated_on(self) -> str:
        """The windows that metrics are of: 'test' or 'validation'."""
        return str(self.data["evaluated_on"])

    @property
    def evaluated(self) -> list[RoundRecord]:
        """The rounds that were evaluated, in order; the last round is always one."""
        return [record for record in self.records if record.metrics]


@dataclass(frozen=True)
class Missing:
    """A run that counts in no figure.

    Attributes:
        name: its folder and the one above.
        reason: failed, unfinished or not begun.
        folder: where it lies, or would.
    """

    name: str
    reason: str
    folder: Path


def find(folder: Path) -> list[Path]:
    """The run folders that `folder` is or holds, at any depth, links included. Raises UserError where there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    marks = {ENVIRONMENT, FAILED}
    found = [Path(place) for place, _, files in os.walk(folder, followlinks=True) if not marks.isdisjoint(files)]
    found = [path for path in found if not path.name.startswith(".")]  # files that are just being written
    if not found:
        raise UserError(f"{folder}: holds no run (a folder with {CONFIG}, {ENVIRONMENT} and {RESULTS})")
    return sorted(found)


def read_all(folders: Sequence[Path]) -> tuple[list[Run], list[Missing]]:
    """Each folder once, those with results and those without. Raises UserError, see `read`."""
    once = {folder.resolve(): folder for folder in folders}
    everything = [read(folder) for folder in once.values()]
    return [run for run in everything if isinstance(run, Run)], [run for run in everything if isinstance(run, Missing)]


def read(folder: Path) -> Run | Missing:
    """A run folder, which need not be there (a run not begun). Raises UserError for a damaged or foreign one."""
    name = f"{folder.resolve().parent.name}/{folder.resolve().name}"
    if (folder / FAILED).is_file():
        reason = (folder / FAILED).read_text(encoding="utf-8", errors="replace").partition("\n")[0]
        return Missing(name, f"failed: {reason}", folder)
    if not (folder / ENVIRONMENT).is_file():
        return Missing(name, "not begun", folder)
    config, environment = _config(folder / CONFIG), _environment(folder / ENVIRONMENT)
    planned = config["global_rounds"]
    run = _results(folder, config, environment) if (folder / RESULTS).is_file() else None
    if run is None or len(run.records) < planned:
        done = max(_rounds(folder / ROUNDS), 0 if run is None else len(run.records))
        return Missing(name, f"unfinished: {done} of {planned} rounds", folder)
    return run


def _results(folder: Path, config: Mapping[str, Any], environment: Mapping[str, Any]) -> Run:
    path = folder / RESULTS
    try:
        with h5py.File(path) as file:
            records, confusion = read_results(file)
            classes = tuple(map(str, file.attrs["class_names"]))
            groups = {name: [int(id) for id in ids] for name, ids in file.get("groups", {}).items()}
    except KeyError as error:
        raise UserError(
            f"{path}: a figure is missing ({_text(error)}); made by another version, so run it again"
        ) from error
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: damaged ({_text(error)}); remove {folder} and run it again") from error
    return Run(folder, config, environment, records, confusion, classes, groups)


def rounds_done(folder: Path) -> int:
    """Return how many rounds a run folder holds results of; 0 where there is none, or a damaged one."""
    try:
        with h5py.File(folder / RESULTS) as file:
            return len(file["train_loss"])
    except (OSError, KeyError):
        return 0


def _config(path: Path) -> dict[str, Any]:
    values = _yaml(path, "the configuration of a run")
    wanted = {"algorithm": list, "seed": int, "global_rounds": int, "model": str}
    _check(path, values, wanted)
    if len(values["algorithm"]) != 1:
        raise UserError(f"{path}: of {len(values['algorithm'])} algorithms; a run has one")
    return values


def _yaml(path: Path, what: str) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not {what} ({_text(error)})") from error


def _environment(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not the environment of a run ({_text(error)})") from error
    _check(path, values, {"data": dict, "command": list, "versions": dict})
    if (found := values.get("format", 1)) not in range(1, FORMAT + 1):
        raise UserError(f"{path}: a run folder of format {found}, of a newer version; this one reads up to {FORMAT}")
    _check(path, values["data"], {"name": str, "folder": str, "manifest_sha256": str, "evaluated_on": str})
    return values


def _check(path: Path, values: Any, wanted: Mapping[str, type]) -> None:
    for key, kind in wanted.items():
        if not isinstance(values, dict) or not isinstance(values.get(key), kind):
            raise UserError(f"{path}: '{key}' is missing or damaged; remove {path.parent} and run it again")


def _rounds(path: Path) -> int:
    """Rows below the heading of a CSV file; 0 where there is none."""
    return max(0, sum(1 for _ in _lines(path)) - 1)


def _lines(path: Path) -> Iterator[str]:
    if path.is_file():
        yield from path.read_text(encoding="utf-8", errors="replace").splitlines()


def _text(error: Exception) -> str:
    return " ".join(str(error).split())
