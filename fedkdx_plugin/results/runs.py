"""Run folders of finished and unfinished runs, read for reports and predictions."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import yaml

from dataset_utils.files import is_file, is_folder, state_of, unreadable
from dataset_utils.sealed import SUMS, Sealed, read_bytes
from fedkdx_plugin.engine.record import RoundRecord
from fedkdx_plugin.results.records import read_results
from registry.errors import UserError

CONFIG, ENVIRONMENT, RESULTS, ROUNDS = "config.yaml", "environment.json", "results.h5", "metrics.csv"
STATE = "state.safetensors"
PRIVACY = "privacy.json"  # what each client has spent of its budget, with `--dp example`
FAILED = "failed.txt"  # the reason in the first line, then the traceback if there is one
FORMAT = 3  # of a run folder
UNSEALED = (1, 2)  # formats without checksums, which are read all the same; format 1 is without this number, too
GIVEN_ANEW = ("out", "data_root", "raw", "global_rounds")  # options that a run may have another value of when resumed


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

    def __repr__(self) -> str:
        """Return what it is in a line: its records would fill a page."""
        rounds = len(self.records)
        return f"<Run: {self.name}, seed {self.seed}, {rounds} round{'s' * (rounds > 1)}; {self.folder}>"

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
    """Return the run folders in a folder, or itself, at any depth, links included, and folders that cannot be listed.

    Raises:
        UserError: there is none, or it is no folder.
    """
    if not is_folder(folder):
        raise UserError(f"{folder}: {'is a file' if state_of(folder) else 'no such folder'}; give a folder of runs")
    marks = {ENVIRONMENT, RESULTS, FAILED}
    barred: list[Path] = []
    walk = os.walk(folder, onerror=lambda error: barred.append(Path(error.filename)), followlinks=True)
    found = [Path(place) for place, _, files in walk if not marks.isdisjoint(files)]
    found = [path for path in found + barred if not path.name.startswith(".")]  # folders of unfinished files
    if not found:
        raise UserError(f"{folder}: holds no run (a folder with {CONFIG}, {ENVIRONMENT} and {RESULTS})")
    return sorted(found)


def read_all(folders: Sequence[Path]) -> tuple[list[Run], list[Missing]]:
    """Read each folder once; return the finished runs and the others, damaged ones among these.

    Raises:
        UserError: no run is left, and one is damaged or cannot be read.
    """
    found: list[Run | Missing] = []
    refused: UserError | None = None
    for folder in {folder.resolve(): folder for folder in folders}.values():
        try:
            found.append(read(folder))
        except UserError as error:
            refused = refused or error
            found.append(Missing(_name(folder), str(error), folder))
    runs = [run for run in found if isinstance(run, Run)]
    if refused and not runs:
        raise refused
    return runs, [run for run in found if isinstance(run, Missing)]


def read(folder: Path) -> Run | Missing:
    """Read a run folder, which need not exist (a run not begun). Raises UserError: it is damaged, or no run folder."""
    name = _name(folder)
    if is_file(folder / FAILED):
        text = read_bytes(folder / FAILED, again(folder)).decode(errors="replace")
        return Missing(name, f"failed: {text.partition(chr(10))[0]}", folder)
    if not Sealed(folder, again(folder)).holds(ENVIRONMENT):
        return Missing(name, "not begun", folder)
    environment = read_environment(folder)
    config = read_config(folder)
    planned = config["global_rounds"]
    run = _results(folder, config, environment) if Sealed(folder, again(folder)).holds(RESULTS) else None
    if run is None or len(run.records) < planned:
        done = max(_rounds(folder / ROUNDS), 0 if run is None else len(run.records))
        return Missing(name, f"unfinished: {done} of {planned} rounds", folder)
    return run


def has_traceback(folder: Path) -> bool:
    """Return whether a run failed with an error whose traceback is kept in its folder."""
    return is_file(folder / FAILED) and b"\n" in read_bytes(folder / FAILED, again(folder)).strip()


def nothing_accepted(run: Run) -> str:
    """Return why a run's last reply was not accepted, where none ever was; '' where one was, or none was to come."""
    if any(set(record.selected) - record.rejected.keys() - record.lost.keys() for record in run.records):
        return ""
    return next((why for record in run.records[::-1] for why in (record.rejected or record.lost).values()), "")


def _name(folder: Path) -> str:
    return f"{folder.resolve().parent.name}/{folder.resolve().name}"


def _results(folder: Path, config: Mapping[str, Any], environment: Mapping[str, Any]) -> Run:
    path = folder / RESULTS
    file = io.BytesIO(content(folder, RESULTS))
    try:
        with h5py.File(file) as opened:
            records, confusion = read_results(opened)
            classes = tuple(map(str, opened.attrs["class_names"]))
            groups = {name: [int(id) for id in ids] for name, ids in opened.get("groups", {}).items()}
            text = str(opened.attrs.get("config", ""))
        # the same text need not be read again, which takes as long as all the rest
        same = not text or text.encode() == content(folder, CONFIG)
        own = config if same else yaml.safe_load(text)
    except KeyError as error:
        raise UserError(
            f"{path}: a metric is missing ({_text(error)}); another version wrote it: {again(folder)}"
        ) from error
    except Exception as error:  # a library's own errors on a damaged file, of any type
        raise UserError(f"{path}: damaged ({_text(error)}); {again(folder)}") from error
    if difference := differs(own, config):
        raise UserError(f"{path}: of another run than {CONFIG} ({difference}); put it back, or {again(folder)}")
    return Run(folder, config, environment, records, confusion, classes, groups)


def differs(own: Mapping[str, Any], other: Mapping[str, Any], free: Sequence[str] = GIVEN_ANEW) -> str:
    """Return the first option of which two runs have different values, with both values; '' if there is none."""
    shared = (key for key in own if key in other and key not in free)
    return next((f"{key}: {own[key]} and {other[key]}" for key in shared if own[key] != other[key]), "")


def rounds_done(folder: Path) -> int:
    """Return the number of rounds with results in a run folder; 0 if it has not begun. Raises UserError: damaged."""
    return len(records_so_far(folder))


def records_so_far(folder: Path) -> list[RoundRecord]:
    """Return the rounds with results in a run folder, without confusion matrices. Raises UserError: damaged.

    Where a full disk or a power cut came between results and state, the last round does not count: it is made again.
    """
    sealed = Sealed(folder, again(folder))
    if not sealed.holds(ENVIRONMENT) or not sealed.holds(RESULTS):
        return []
    records = _results(folder, read_config(folder), read_environment(folder)).records
    return records if sealed.settled() else records[:-1]


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration in a run folder. Raises UserError: it is damaged, or none of a run."""
    path = folder / CONFIG
    text = content(folder, CONFIG)
    try:
        values = yaml.safe_load(text.decode())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UserError(f"{path}: is not the configuration of a run ({_text(error)}); {again(folder)}") from error
    wanted = {"algorithm": list, "seed": int, "global_rounds": int, "model": str}
    config = _checked(path, values, wanted)
    if len(config["algorithm"]) != 1:
        raise UserError(f"{path}: names {len(config['algorithm'])} algorithms, a run has one; {again(folder)}")
    return config


def read_environment(folder: Path) -> dict[str, Any]:
    """Return the environment of a run. Raises UserError: it is damaged, or of a format that is not read."""
    path = folder / ENVIRONMENT
    try:
        values = json.loads(content(folder, ENVIRONMENT))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not the environment of a run ({_text(error)}); {again(folder)}") from error
    environment = _checked(path, values, {"data": dict, "command": list, "versions": dict})
    found = environment.get("format", 1)
    if found not in range(1, FORMAT + 1):
        raise UserError(f"{path}: a run folder of format {found}, and this version reads 1 to {FORMAT}; update fedkdx")
    if found not in UNSEALED and not Sealed(folder, again(folder)).sealed():
        raise UserError(f"{folder / SUMS}: missing; put it back, or {again(folder)}")
    _checked(path, environment["data"], {"name": str, "folder": str, "manifest_sha256": str, "evaluated_on": str})
    return environment


def content(folder: Path, name: str) -> bytes:
    """Return a file of a run folder, checked if there are checksums. Raises UserError: it is damaged, or missing."""
    sealed = Sealed(folder, again(folder))
    return sealed.read(name) if sealed.sealed() else read_bytes(folder / name, again(folder))


def _checked(path: Path, values: object, wanted: Mapping[str, type]) -> dict[str, Any]:
    """Return the mapping read from a file. Raises UserError: a wanted key is missing, or its value of another type."""
    found = values if isinstance(values, dict) else {}
    for key, kind in wanted.items():
        if not isinstance(found.get(key), kind):
            raise UserError(f"{path}: '{key}' is missing or damaged; {again(path.parent)}")
    return found


def again(folder: Path) -> str:
    """Return what to do about a damaged run folder."""
    return f"remove {folder} and run it again"


def _rounds(path: Path) -> int:
    """Return the number of rows below the heading of a CSV file; 0 if it is missing."""
    if not is_file(path):
        return 0
    try:
        return max(0, len(path.read_text(encoding="utf-8", errors="replace").splitlines()) - 1)
    except OSError as error:
        raise unreadable(path, error) from error


def _text(error: Exception) -> str:
    return " ".join(str(error).split())
