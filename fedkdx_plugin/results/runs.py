"""Run folders of finished and unfinished runs, read for reports and predictions."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
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
FAILED = "failed.txt"  # the reason in the first line, then the traceback if there is one
FORMAT = 2  # of a run folder; format 1 is the same without this number, so it is read, too


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: its run folder.
        config: its resolved configuration.
        environment: command, versions, device, data.
        records: all rounds, without their confusion matrices.
        confusion: view -> (clients, true, predicted) of the last round.
        classes: names of the classes.
        groups: name -> ids of the clients set apart.
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
        """Name of the algorithm."""
        return str(self.environment.get("algorithm", {}).get("name") or self.config["algorithm"][0])

    @property
    def name(self) -> str:
        """Name of the algorithm, followed by the label of its variant if there is one."""
        return f"{self.algorithm} {self.config.get('label') or ''}".strip()

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return int(self.config["seed"])

    @property
    def data(self) -> Mapping[str, Any]:
        """`name`, `folder` and `manifest_sha256` of the data, and `evaluated_on`: the windows that metrics are of."""
        data: dict[str, Any] = self.environment["data"]
        return data

    @property
    def evaluated_on(self) -> str:
        """Windows that metrics are of: 'test' or 'validation'."""
        return str(self.data["evaluated_on"])

    @property
    def evaluated(self) -> list[RoundRecord]:
        """Evaluated rounds, in order; the last round is always one of them."""
        return [record for record in self.records if record.metrics]


@dataclass(frozen=True)
class Missing:
    """A run without results, which is left out of tables and plots.

    Attributes:
        name: names of its run folder and of the folder above.
        reason: 'failed: ...', 'unfinished: ...' or 'not begun'.
        folder: its run folder, which need not exist.
    """

    name: str
    reason: str
    folder: Path


def find(folder: Path) -> list[Path]:
    """Return the run folders in a folder, or itself, at any depth, links included. Raises UserError: there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; check the path")
    marks = {ENVIRONMENT, FAILED}
    found = [Path(place) for place, _, files in os.walk(folder, followlinks=True) if not marks.isdisjoint(files)]
    found = [path for path in found if not path.name.startswith(".")]  # folders of files that are being written
    if not found:
        raise UserError(f"{folder}: holds no run (a folder with {CONFIG}, {ENVIRONMENT} and {RESULTS})")
    return sorted(found)


def read_all(folders: Sequence[Path]) -> tuple[list[Run], list[Missing]]:
    """Read each folder once; return the finished runs and the others. Raises UserError, see `read`."""
    once = {folder.resolve(): folder for folder in folders}
    found = [read(folder) for folder in once.values()]
    return [run for run in found if isinstance(run, Run)], [run for run in found if isinstance(run, Missing)]


def read(folder: Path) -> Run | Missing:
    """Read a run folder, which need not exist (a run not begun). Raises UserError: it is damaged, or no run folder."""
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
            f"{path}: a metric is missing ({_text(error)}); another version wrote it: {_again(path)}"
        ) from error
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path}: damaged ({_text(error)}); {_again(path)}") from error
    return Run(folder, config, environment, records, confusion, classes, groups)


def rounds_done(folder: Path) -> int:
    """Return the number of rounds with results in a run folder; 0 if it is missing or damaged."""
    try:
        with h5py.File(folder / RESULTS) as file:
            return len(file["train_loss"])
    except (OSError, KeyError):
        return 0


def _config(path: Path) -> dict[str, Any]:
    values = _yaml(path, "the configuration of a run")
    wanted = {"algorithm": list, "seed": int, "global_rounds": int, "model": str}
    config = _checked(path, values, wanted)
    if len(config["algorithm"]) != 1:
        raise UserError(f"{path}: names {len(config['algorithm'])} algorithms, a run has one; {_again(path)}")
    return config


def _yaml(path: Path, what: str) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not {what} ({_text(error)}); {_again(path)}") from error


def _environment(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: is not the environment of a run ({_text(error)}); {_again(path)}") from error
    environment = _checked(path, values, {"data": dict, "command": list, "versions": dict})
    if (found := environment.get("format", 1)) not in range(1, FORMAT + 1):
        raise UserError(f"{path}: a run folder of format {found}, and this version reads 1 to {FORMAT}; update fedkdx")
    _checked(path, environment["data"], {"name": str, "folder": str, "manifest_sha256": str, "evaluated_on": str})
    return environment


def _checked(path: Path, values: object, wanted: Mapping[str, type]) -> dict[str, Any]:
    """Return the mapping read from a file. Raises UserError: a wanted key is missing, or its value of another type."""
    found = values if isinstance(values, dict) else {}
    for key, kind in wanted.items():
        if not isinstance(found.get(key), kind):
            raise UserError(f"{path}: '{key}' is missing or damaged; {_again(path)}")
    return found


def _again(path: Path) -> str:
    return f"remove {path.parent} and run it again"


def _rounds(path: Path) -> int:
    """Return the number of rows below the heading of a CSV file; 0 if it is missing."""
    if not path.is_file():
        return 0
    return max(0, len(path.read_text(encoding="utf-8", errors="replace").splitlines()) - 1)


def _text(error: Exception) -> str:
    return " ".join(str(error).split())
