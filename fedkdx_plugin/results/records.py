"""Rounds on disk: a row of CSV each, and all of them in one HDF5 file that reads back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import h5py
import numpy as np

from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.evaluation import SERVED
from fedkdx_plugin.engine.metrics import Metrics
from fedkdx_plugin.engine.participation import UNSEEN
from fedkdx_plugin.engine.rounds import RoundRecord

SHARES = ("accuracy", "auc", "f1", "recall", "auc_macro", "loss")
SCALARS = (*SHARES, "accuracy_std", "accuracy_worst", "worst_client", "nonfinite")
PER_CLIENT = tuple(f"client_{name}" for name in SHARES)
WHOLE = ("worst_client", "nonfinite")
PARTS = ("train", "aggregate", "evaluate")
ROUND_COLUMNS = (
    "round",
    "train_loss",
    "clients",
    "rejected",
    "lost",
    "bytes_up",
    "bytes_down",
    *(f"seconds_{p}" for p in PARTS),
)
NO_CONFUSION = np.empty((0, 0, 0), dtype=np.int64)


def without_confusion(record: RoundRecord) -> RoundRecord:
    """A record to keep: (clients, classes, classes) a round would fill the memory."""
    bare = {view: replace(metrics, confusion=NO_CONFUSION) for view, metrics in record.metrics.items()}
    return replace(record, metrics=bare)


def group_columns(groups: Mapping[str, Sequence[int]]) -> list[str]:
    """Names of the figures of clients that are set apart but served like all others: `<group>_accuracy`."""
    return [f"{name}_accuracy" for name in groups if name != UNSEEN]


def server_column(name: str) -> str:
    """What a server's own figure (`Server.figures`) is called in `metrics.csv`."""
    return f"server_{name}"


def csv_row(record: RoundRecord, groups: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """A round as one row; the figures of another view than the served one are called `<view>_<figure>`.

    Args:
        groups: clients set apart (`Federation.groups`).
    """
    row: dict[str, Any] = {
        "round": record.round,
        "train_loss": record.train_loss,
        "clients": len(record.selected),
        "rejected": len(record.rejected),
        "lost": len(record.lost),
        "bytes_up": record.bytes_up,
        "bytes_down": record.bytes_down,
    }
    row |= {f"seconds_{name}": round(value, 6) for name, value in record.seconds.items()}
    row |= {server_column(name): value for name, value in record.server.items()}
    for view, metrics in record.metrics.items():
        prefix = "" if view == SERVED else f"{view}_"
        row |= {prefix + name: getattr(metrics, name) for name in SCALARS}
    if SERVED in record.metrics:
        row |= _group_figures(record.metrics[SERVED], groups)
    return row


def _group_figures(metrics: Metrics, groups: Mapping[str, Sequence[int]]) -> dict[str, float]:
    return {column: metrics.accuracy_of(groups[column.removesuffix("_accuracy")]) for column in group_columns(groups)}


def write_results(
    file: h5py.File,
    records: list[RoundRecord],
    confusion: Mapping[str, np.ndarray],
    data: DeviceData,
    groups: Mapping[str, Sequence[int]],
) -> None:
    """All rounds into an open HDF5 file.

    `rs_test_acc`, `rs_test_auc` and `rs_train_loss` are PFLlib's, one value an evaluated round (listed in
    `evaluated_rounds`); on validation windows they are called `rs_validation_acc` and so on, and the attribute
    `evaluated_on` says so, too. `groups/<group>` lists the ids of clients set apart, `views/served/<group>_accuracy`
    is theirs. `views/<view>/<figure>` (evaluations,) and `views/<view>/client_<figure>` (evaluations,
    clients) hold the figures of each view, `views/<view>/confusion` (clients, true, predicted) those of the last
    evaluation. `selected` (rounds, clients), `rejected` and `lost` (rounds,; JSON, client -> reason),
    `bytes_up`, `bytes_down`, `train_loss` and `seconds/<part>` (rounds,) tell of every round, and `server/<figure>`
    (rounds,; NaN where there is none) holds what the server says of itself (`Server.figures`).
    """
    evaluated = [record for record in records if record.metrics]
    file["evaluated_rounds"] = np.array([record.round for record in evaluated], dtype=np.int64)
    file.attrs["evaluated_on"] = data.evaluated_on
    file[f"rs_{data.evaluated_on}_acc"] = np.array([record.metrics[SERVED].accuracy for record in evaluated])
    file[f"rs_{data.evaluated_on}_auc"] = np.array([record.metrics[SERVED].auc for record in evaluated])
    file["rs_train_loss"] = np.array([record.train_loss for record in evaluated])
    file.attrs["views"] = list(evaluated[0].metrics) if evaluated else []
    for view in evaluated[0].metrics if evaluated else ():
        group = file.create_group(f"views/{view}")
        rows = [record.metrics[view] for record in evaluated]
        for name in SCALARS:
            group[name] = np.array([getattr(row, name) for row in rows])
        for name in PER_CLIENT:
            group[name] = np.stack([getattr(row, name) for row in rows])
        group["client_samples"] = rows[-1].client_samples
        group["confusion"] = confusion[view]
    rows = [_group_figures(record.metrics[SERVED], groups) for record in evaluated]
    for name in group_columns(groups) if evaluated else ():
        file[f"views/{SERVED}/{name}"] = np.array([row[name] for row in rows])
    for name, ids in groups.items():
        file[f"groups/{name}"] = np.array(ids, dtype=np.int64)
    for name in ("bytes_up", "bytes_down", "train_loss"):
        file[name] = np.array([getattr(record, name) for record in records])
    for part in records[0].seconds:
        file[f"seconds/{part}"] = np.array([record.seconds[part] for record in records])
    for name in ("rejected", "lost"):
        file[name] = [json.dumps(getattr(record, name)) for record in records]
    for name in sorted({name for record in records for name in record.server}):
        file[f"server/{name}"] = np.array([record.server.get(name, np.nan) for record in records])
    selected = np.zeros((len(records), data.clients), dtype=bool)
    for row, record in zip(selected, records, strict=True):
        row[record.selected] = True
    file["selected"] = selected


def read_results(file: h5py.File) -> tuple[list[RoundRecord], dict[str, np.ndarray]]:
    """The rounds that `write_results` wrote, and the confusion matrices of the last evaluation.

    Raises:
        KeyError, ValueError or OSError: the file is damaged or not of this kind.
    """
    evaluated = {int(round): row for row, round in enumerate(file["evaluated_rounds"][:])}
    order = map(str, file.attrs.get("views", file.get("views", {})))  # the file itself keeps no order
    views = {view: {name: data[:] for name, data in file[f"views/{view}"].items()} for view in order}
    seconds = {part: data[:] for part, data in file["seconds"].items()}
    server = {name: data[:] for name, data in file.get("server", {}).items()}
    plain = {name: file[name][:] for name in ("bytes_up", "bytes_down", "train_loss", "rejected", "lost", "selected")}
    records = []
    for index in range(len(plain["train_loss"])):
        row = evaluated.get(index + 1)
        records.append(
            RoundRecord(
                round=index + 1,
                selected=np.flatnonzero(plain["selected"][index]).tolist(),
                rejected=_by_client(plain["rejected"][index]),
                lost=_by_client(plain["lost"][index]),
                train_loss=float(plain["train_loss"][index]),
                bytes_up=int(plain["bytes_up"][index]),
                bytes_down=int(plain["bytes_down"][index]),
                seconds={part: float(values[index]) for part, values in seconds.items()},
                metrics={} if row is None else {view: _metrics(data, row) for view, data in views.items()},
                server={name: float(data[index]) for name, data in server.items() if not np.isnan(data[index])},
            )
        )
    return records, {view: data["confusion"] for view, data in views.items()}


def _by_client(text: bytes) -> dict[int, str]:
    return {int(id): reason for id, reason in json.loads(text).items()}


def _metrics(data: Mapping[str, np.ndarray], row: int) -> Metrics:
    scalars = {name: int(data[name][row]) if name in WHOLE else float(data[name][row]) for name in SCALARS}
    clients = {name: data[name][row] for name in PER_CLIENT}
    return Metrics(**scalars, **clients, client_samples=data["client_samples"], confusion=NO_CONFUSION)
