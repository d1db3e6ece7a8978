"""Run folders as a run leaves them, made of random figures in milliseconds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import torch
import yaml

from dataset_utils.shards import FORMAT, LAYOUT
from fedkdx_plugin.engine import metrics
from fedkdx_plugin.engine.record import RoundRecord
from fedkdx_plugin.reports.sections import Section, arrange
from fedkdx_plugin.reports.tables import Cell, Table
from fedkdx_plugin.results.records import write_results
from fedkdx_plugin.results.runs import read_all

CLASSES = ("sit & stand", "walk_1", "run <fast>")
CONFIG = {
    "data": "made",
    "partition": "subject",
    "alpha": 0.1,
    "split": "blocked",
    "train_fraction": 1.0,
    "model": "cnn",
    "student_model": None,
    "global_rounds": 3,
    "join_ratio": 0.4,
    "unseen": 0.0,
    "late": None,
    "rare": None,
    "label": "",
}


def make_metrics(rng: torch.Generator, skill: float, clients: int = 8, windows: int = 20) -> metrics.Metrics:
    """Figures of predictions that are right the more often the larger `skill` is."""
    y = torch.randint(len(CLASSES), (clients * windows,), generator=rng)
    logits = torch.randn(len(y), len(CLASSES), generator=rng)
    logits[torch.arange(len(y)), y] += skill
    return metrics.evaluate(logits, y, torch.arange(clients).repeat_interleave(windows), clients)


def make_run(
    folder: Path,
    algorithm: str = "FedAvg",
    seed: int = 0,
    skill: float = 1.0,
    done: int | None = None,
    views: tuple[str, ...] = ("served",),
    server: bool = False,
    damaged: bool = False,
    rejected: dict[int, str] | None = None,
    data: dict[str, Any] | None = None,
    hyper: dict[str, Any] | None = None,
    groups: dict[str, list[int]] | None = None,
    **config: Any,
) -> Path:
    """Write a run folder.

    Args:
        skill: see `make_metrics`; figures get better from round to round.
        done: rounds that have results; all by default.
        damaged: whether a reply was rejected in the first round.
        rejected: the clients, of 0 and 1, whose replies were rejected in every round -> why.
        data: entries of the environment's data that differ from the usual.
        groups: clients set apart.
    """
    values = CONFIG | {
        "algorithm": [algorithm],
        "seed": seed,
        "set": {f"{algorithm}.{k}": v for k, v in (hyper or {}).items()},
    }
    values |= config
    rng = torch.Generator().manual_seed(seed + sum(map(ord, algorithm)))
    records = []
    for round in range(1, (values["global_rounds"] if done is None else done) + 1):
        figures = {view: make_metrics(rng, skill * round) for view in views}
        own = {"epsilon": 0.9, "rank_share": 0.2, "energy_kept": 0.95, "bytes_share": 0.1} if server else {}
        seconds = {"train": 1.0 + round, "aggregate": 0.5, "evaluate": 0.25}
        records.append(
            RoundRecord(
                round=round,
                selected=[0, 1],
                rejected=rejected or ({1: "not finite"} if damaged and round == 1 else {}),
                train_loss=1.0 / round,
                bytes_up=10**6,
                bytes_down=2 * 10**6,
                seconds=seconds,
                metrics=figures,
                server=own,
            )
        )
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    about = {"name": "made", "folder": "/nowhere", "manifest_sha256": "0" * 64, "evaluated_on": "test"} | (data or {})
    environment = {
        "command": ["fedkdx", "-algo", algorithm],
        "versions": {"torch": "2"},
        "device": "cpu",
        "data": about,
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    with h5py.File(folder / "results.h5", "w") as file:
        shards = SimpleNamespace(evaluated_on=about["evaluated_on"], clients=8)
        write_results(file, records, {v: records[-1].metrics[v].confusion for v in views}, shards, groups or {})
        file.attrs["class_names"] = list(CLASSES)
    return folder


def last_accuracy(folder: Path, view: str = "served") -> float:
    """Per cent, straight from the file."""
    with h5py.File(folder / "results.h5") as file:
        return 100 * float(file[f"views/{view}/accuracy"][-1])


def client_accuracy(folder: Path) -> np.ndarray:
    """(clients,), straight from the file."""
    with h5py.File(folder / "results.h5") as file:
        return file["views/served/client_accuracy"][-1]


def set_accuracy(folder: Path, accuracy: float, clients: Sequence[float] | None = None) -> Path:
    """Set the accuracy of the last round, in [0, 1], and that of each client (by default the same); return the folder.

    There are eight clients.
    """
    with h5py.File(folder / "results.h5", "a") as file:
        file["views/served/accuracy"][-1] = accuracy
        file["views/served/client_accuracy"][-1] = [accuracy] * 8 if clients is None else clients
    return folder


def set_subjects(folder: Path, subjects: Sequence[str], seed: int) -> Path:
    """Give a run a manifest of this seed in which client i is the i-th subject; return the folder."""
    part = {"samples": 1, "histogram": [1], "sha256": ""}
    manifest = {
        "format": FORMAT,
        "layout": LAYOUT,
        "name": "made",
        "classes": ["one"],
        "channels": ["x"],
        "shape": [1, 1, 8],
        "seed": seed,
        "clients": [{"train": part, "test": part, "subjects": {name: {}}} for name in subjects],
    }
    text = json.dumps(manifest)
    (folder / "manifest.json").write_text(text)
    environment = json.loads((folder / "environment.json").read_text())
    environment["data"]["manifest_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / "environment.json").write_text(json.dumps(environment))
    return folder


def sections_of(*folders: Path, references: Sequence[str] = ()) -> list[Section]:
    """Return the report's sections of these runs, all of which must be finished."""
    found, missing = read_all(folders)
    assert not missing
    return arrange(found, references)


def column(table: Table, title: str, group: str = "") -> dict[str, Cell]:
    """Return a column's cells by the name of their rows."""
    place = list(table.columns).index((group, title))
    return {row[0].text: row[place] for row in table.rows}
