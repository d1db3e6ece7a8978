"""Records of rounds on disk: one CSV row for each round, and one HDF5 file with all of them, which is read back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import h5py
import numpy as np

from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.evaluation import SERVED
from fedkdx_plugin.engine.metrics import Metrics
from fedkdx_plugin.engine.participation import measured
from fedkdx_plugin.engine.record import RoundRecord

SHARES = ("accuracy", "auc", "f1", "recall", "auc_macro", "loss")
SCALARS = (*SHARES, "ece", "accuracy_std", "accuracy_worst", "worst_client", "nonfinite")
PER_CLIENT = tuple(f"client_{name}" for name in SHARES)
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
NO_GAPS = np.empty((0, 0))


def without_confusion(record: RoundRecord) -> RoundRecord:
    """Return a record without confusion matrices and gaps, which would fill the memory if those of all were kept."""
    bare = {
        view: replace(metrics, confusion=NO_CONFUSION, client_gaps=NO_GAPS) for view, metrics in record.metrics.items()
    }
    return replace(record, metrics=bare)


def group_columns(groups: Mapping[str, Sequence[int]]) -> list[str]:
    """Return the columns of groups set apart that are served like all other clients: `<group>_accuracy`."""
    return [f"{name}_accuracy" for name in measured(groups)]


def server_column(name: str) -> str:
    """Return the column in `metrics.csv` of a value that the server reports (`Server.figures`)."""
    return f"server_{name}"


def csv_row(record: RoundRecord, groups: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Return a round as one row; metrics of any view but the served one are named `<view>_<metric>`, NaN is ''.

    Args:
        groups: group -> ids of the clients set apart (`Federation.groups`).
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
        row |= _group_metrics(record.metrics[SERVED], groups)
    return {name: field(value) for name, value in row.items()}


def field(value: Any) -> Any:
    """Return what a CSV file has in the place of a value: a missing number, NaN, is an empty field."""
    return "" if isinstance(value, float) and math.isnan(value) else value


def _group_metrics(metrics: Metrics, groups: Mapping[str, Sequence[int]]) -> dict[str, float]:
    return {column: metrics.accuracy_of(groups[column.removesuffix("_accuracy")]) for column in group_columns(groups)}


def write_results(
    file: h5py.File,
    records: list[RoundRecord],
    confusion: Mapping[str, np.ndarray],
    data: DeviceData,
    groups: Mapping[str, Sequence[int]],
) -> None:
    """Write all rounds into an open HDF5 file.

    Datasets of the evaluated rounds (listed in `evaluated_rounds`):
        `rs_test_acc`, `rs_test_auc`, `rs_train_loss`: (evaluations,), named as in PFLlib; on validation windows the
            names are `rs_validation_acc` and so on, and the attribute `evaluated_on` is 'validation'.
        `views/<view>/<metric>`: (evaluations,).
        `views/<view>/client_<metric>`: (evaluations, clients).
        `views/<view>/confusion`: (clients, true, predicted), of the last evaluation.
        `views/served/<group>_accuracy`: (evaluations,), of the clients set apart whose ids `groups/<group>` lists.

    Datasets of every round:
        `bytes_up`, `bytes_down`, `train_loss`, `seconds/<part>`: (rounds,).
        `selected`: (rounds, clients), bool.
        `rejected`, `lost`: (rounds,), JSON of client -> reason.
        `server/<name>`: (rounds,), values that the server reports (`Server.figures`); NaN where there is none.
    """
    _write_evaluations(file, [record for record in records if record.metrics], confusion, data.evaluated_on, groups)
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


def _write_evaluations(
    file: h5py.File,
    evaluated: list[RoundRecord],
    confusion: Mapping[str, np.ndarray],
    evaluated_on: str,
    groups: Mapping[str, Sequence[int]],
) -> None:
    file["evaluated_rounds"] = np.array([record.round for record in evaluated], dtype=np.int64)
    file.attrs["evaluated_on"] = evaluated_on
    file[f"rs_{evaluated_on}_acc"] = np.array([record.metrics[SERVED].accuracy for record in evaluated])
    file[f"rs_{evaluated_on}_auc"] = np.array([record.metrics[SERVED].auc for record in evaluated])
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
    accuracies = [_group_metrics(record.metrics[SERVED], groups) for record in evaluated]
    for name in group_columns(groups) if evaluated else ():
        file[f"views/{SERVED}/{name}"] = np.array([row[name] for row in accuracies])
    for name, ids in groups.items():
        file[f"groups/{name}"] = np.array(ids, dtype=np.int64)


def read_results(file: h5py.File) -> tuple[list[RoundRecord], dict[str, np.ndarray]]:
    """Read the rounds that `write_results` wrote, and view -> confusion matrices of the last evaluation.

    Raises:
        KeyError, ValueError, OSError: the file is damaged, or not one that `write_results` wrote.
    """
    evaluated = {int(round): row for row, round in enumerate(file["evaluated_rounds"][:])}
    order = map(str, file.attrs.get("views", file.get("views", {})))  # HDF5 groups keep no order
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
    """Return the metrics of one view in the evaluation with index `row`."""
    missing = {"ece": np.full(row + 1, np.nan)}  # from files of versions that did not measure it
    now = {name: (missing | dict(data))[name][row] for name in (*SCALARS, *PER_CLIENT)}
    return Metrics(
        accuracy=float(now["accuracy"]),
        f1=float(now["f1"]),
        recall=float(now["recall"]),
        auc=float(now["auc"]),
        auc_macro=float(now["auc_macro"]),
        loss=float(now["loss"]),
        ece=float(now["ece"]),
        accuracy_std=float(now["accuracy_std"]),
        accuracy_worst=float(now["accuracy_worst"]),
        worst_client=int(now["worst_client"]),
        nonfinite=int(now["nonfinite"]),
        client_samples=data["client_samples"],
        client_accuracy=now["client_accuracy"],
        client_f1=now["client_f1"],
        client_recall=now["client_recall"],
        client_auc=now["client_auc"],
        client_auc_macro=now["client_auc_macro"],
        client_loss=now["client_loss"],
        client_gaps=NO_GAPS,
        confusion=NO_CONFUSION,
    )
