"""A run's folder: what made it, what happened in it, and where it ended."""

from __future__ import annotations

import csv
import hashlib
import json
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import torch
import yaml

from dataset_utils.files import replacing, unwritable, write_yaml
from dataset_utils.shards import ShardSet
from fedkdx_plugin.engine.evaluation import SERVED
from fedkdx_plugin.engine.rounds import Federation, Observer, RoundRecord
from fedkdx_plugin.native.library import operations
from fedkdx_plugin.results.records import (
    ROUND_COLUMNS,
    SCALARS,
    csv_row,
    group_columns,
    read_results,
    server_column,
    without_confusion,
    write_results,
)
from fedkdx_plugin.results.runs import CONFIG, ENVIRONMENT, FORMAT, RESULTS, ROUNDS
from registry import __version__
from registry.catalog import Entry
from registry.errors import UserError
from registry.interface import BadMessage, Message

STATE = "state.safetensors"
CHECKPOINT_SECONDS = 60.0


def new_folder(parent: Path, name: str) -> Path:
    """Make `parent/name-<time>`, or the next free name like it. Raises UserError where that cannot be written."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1, 1000):
        folder = parent / (f"{name}-{stamp}" if attempt == 1 else f"{name}-{stamp}-{attempt}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise unwritable(folder, error) from error
    raise FileExistsError(folder)


class Data(Protocol):
    """States what a run's data are; `ShardSet` does, and so does what stands for data at sites."""

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes, in order."""

    def facts(self) -> dict[str, Any]:
        """Name, folder and code of the data, for the environment of a run."""


class RunFolder(Observer):
    """Writes one run's folder while the run goes on; a context manager and an observer.

    `config.yaml` (reads back with `--config`), `environment.json`, `manifest.json` and `description.yaml` (what the
    data are and were made from), `metrics.csv` (a row a round, as it ends), `log.txt`, and, once a
    minute and at the end, also after Ctrl-C, `results.h5` and `state.safetensors` (all that server and clients hold),
    from which the run can go on.

    Args:
        path: the folder; made if it is not there, continued if it is.
        entry: the algorithm.
        settings: the resolved configuration of this run.
        command: the command line.
        shards: the data.
        device: where it runs.
        federation: what runs; brought to where the folder's last checkpoint was.

    Attributes:
        records: the rounds so far, without their confusion matrices.
        planned: how many rounds it was to have, first and, where it was continued to more, since then.

    Raises:
        UserError: the folder cannot be written, or holds another run or a damaged checkpoint.
    """

    def __init__(
        self,
        path: Path,
        entry: Entry,
        settings: Mapping[str, Any],
        command: list[str],
        shards: Data,
        device: torch.device,
        federation: Federation,
    ) -> None:
        self.path, self.entry, self.settings, self.shards, self.federation = path, entry, settings, shards, federation
        self.environment = environment(entry, command, shards, device) | {"backend": federation.backend.name}
        self.records: list[RoundRecord] = []
        self.planned: list[int] = [settings["global_rounds"]]
        self._confusion: dict[str, np.ndarray] = {}
        self._state: Message | None = None
        self._saved = time.monotonic()
        figures = [n if view == SERVED else f"{view}_{n}" for view in federation.views for n in SCALARS]
        own = map(server_column, federation.server.figures())
        self._columns = [*ROUND_COLUMNS, *figures, *group_columns(federation.groups), *own]
        if (path / STATE).exists():
            self._go_on()
        if len(self.planned) > 1:
            self.environment["planned_rounds"] = self.planned
        if federation.agreed:
            self.environment["scaling"] = federation.agreed.pooled.to_dict()

    def __enter__(self) -> RunFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_yaml(self.path / CONFIG, self.settings)
            with replacing(self.path / ENVIRONMENT) as part:
                part.write_text(json.dumps(self.environment, indent=2, sort_keys=True) + "\n")
            self._describe_data()
            self._metrics = (self.path / ROUNDS).open("w", newline="", encoding="utf-8")
            self._log = (self.path / "log.txt").open("a", encoding="utf-8")
            self._csv = csv.DictWriter(self._metrics, self._columns, restval="")
            self._csv.writeheader()
            self._csv.writerows(csv_row(record, self.federation.groups) for record in self.records)
        except OSError as error:
            raise unwritable(self.path, error) from error
        self._say(" ".join(self.environment["command"]))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._say("finished" if kind is None else f"ended early: {kind.__name__} {error}".strip())
        self._metrics.close()
        self._log.close()
        self.save()

    def _describe_data(self) -> None:
        """Copy the shards' manifest, and the description in it; of data at sites there is neither here."""
        if not isinstance(self.shards, ShardSet):
            return
        with replacing(self.path / "manifest.json") as part:
            part.write_bytes((self.shards.folder / "manifest.json").read_bytes())
        write_yaml(self.path / "description.yaml", self.shards.manifest.get("description") or {})

    def on_round_end(self, record: RoundRecord) -> None:
        """Append the round to `metrics.csv` and `log.txt`; once a minute, save everything."""
        try:
            self._csv.writerow(csv_row(record, self.federation.groups))
            self._metrics.flush()
            served = record.metrics.get(SERVED)
            accuracy = f" accuracy {served.accuracy:.4f}" if served else ""
            self._say(f"round {record.round}: clients {record.selected} loss {record.train_loss:.4f}{accuracy}")
            if record.lost:
                who = ", ".join(f"{id} ({why})" for id, why in record.lost.items())
                self._say(f"round {record.round}: no reply from client {who}")
            for reason in record.rejected.values():
                self._say(f"round {record.round}: dropped an update: {reason}")
        except OSError as error:
            raise unwritable(self.path, error) from error
        if record.metrics:
            self._confusion = {view: metrics.confusion for view, metrics in record.metrics.items()}
        self.records.append(without_confusion(record))
        self._state = self.federation.save()  # references, no copies: state is replaced, never changed in place
        if time.monotonic() - self._saved > CHECKPOINT_SECONDS:
            self.save()

    def save(self) -> None:
        """Write `results.h5` and then `state.safetensors`, as of the last whole round."""
        if self._state is None:
            return
        with replacing(self.path / RESULTS) as part, h5py.File(part, "w") as file:
            write_results(file, self.records, self._confusion, self.federation.data, self.federation.groups)
            file.attrs["config"] = yaml.safe_dump(dict(self.settings), sort_keys=False)
            file.attrs["environment"] = json.dumps(self.environment, sort_keys=True)
            file.attrs["class_names"] = list(self.shards.class_names)
        meta = {
            "round": len(self.records),
            "identity": identity(self.settings, self.environment),
            "planned": self.planned,
        }
        meta["state"] = dict(self._state.meta)
        with replacing(self.path / STATE) as part:
            part.write_bytes(Message(self._state.tensors, meta).to_bytes())
        self._state, self._saved = None, time.monotonic()

    def _go_on(self) -> None:
        """Bring records and federation to the folder's checkpoint."""
        path = self.path / STATE
        again = f"remove {self.path} to run it from the start"
        try:
            state = Message.from_bytes(path.read_bytes(), self.federation.data.test_x.device)
            if state.meta["identity"] != identity(self.settings, self.environment):
                raise UserError(f"{path}: a checkpoint of another configuration, data or version; {again}")
            with h5py.File(self.path / RESULTS) as file:
                records, self._confusion = read_results(file)
            self.federation.restore(Message(state.tensors, state.meta["state"]))
            planned = list(map(int, state.meta["planned"]))
        except (BadMessage, KeyError, ValueError, OSError) as error:
            raise UserError(f"{path}: damaged ({error}); {again}") from error
        self.records = records[: state.meta["round"]]  # the results may have been written without the state
        rounds = self.settings["global_rounds"]
        if len(self.records) > rounds:
            raise UserError(f"{self.path}: has {len(self.records)} rounds already; -gr {rounds} would be fewer")
        self.planned = planned if planned[-1:] == [rounds] else [*planned, rounds]

    def _say(self, text: str) -> None:
        print(time.strftime("%Y-%m-%d %H:%M:%S"), text, file=self._log, flush=True)


def identity(settings: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    """Return a hash of what must be the same for a run to be the same: configuration, data, versions.

    Args:
        settings: the resolved configuration, as in `config.yaml`.
        environment: as in `environment.json`.
    """
    data, versions = environment["data"]["manifest_sha256"], environment["versions"]
    free = ("out", "data_root", "raw", "global_rounds")
    settings = {key: value for key, value in settings.items() if key not in free}
    text = json.dumps([settings, data, versions["fedkdx"], versions["torch"]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def environment(entry: Entry, command: list[str], shards: Data, device: torch.device) -> dict[str, Any]:
    """What a run's numbers depend on besides its configuration."""
    return {
        "format": FORMAT,
        "command": command,
        "algorithm": {"name": entry.name, "target": entry.target, "origin": entry.origin},
        "versions": {
            "fedkdx": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "cuda": torch.version.cuda,
        },
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "fused": device.type == "cpu" and operations() is not None,
        "data": shards.facts(),
    }
