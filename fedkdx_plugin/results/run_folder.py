"""Run folder of a run in progress: its configuration, environment, metrics, log and checkpoint."""

from __future__ import annotations

import csv
import hashlib
import inspect
import io
import json
import platform
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import h5py
import numpy as np
import torch
import yaml

from dataset_utils.files import unwritable, yaml_text
from dataset_utils.sealed import Sealed, read_bytes
from dataset_utils.shards import ShardSet
from fedkdx_plugin.engine.evaluation import SERVED
from fedkdx_plugin.engine.record import Observer, RoundRecord
from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.native.library import operations
from fedkdx_plugin.privacy.client import SPENT
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
from fedkdx_plugin.results.runs import (
    CONFIG,
    ENVIRONMENT,
    FORMAT,
    GIVEN_ANEW,
    PRIVACY,
    RESULTS,
    ROUNDS,
    STATE,
    differs,
    read_environment,
)
from registry import __version__, catalog
from registry.blame import naming
from registry.catalog import Entry
from registry.errors import UserError
from registry.interface import BadMessage, Message, Server, Task

MANIFEST, DESCRIPTION, LOG = "manifest.json", "description.yaml", "log.txt"
ON_BITS = ("threads", "fused", "backend", "device")  # of the environment; may decide a result's last bits
MODELS = "code_of_models"  # of the environment, where models are not built in
CHECKPOINT_SECONDS = 60.0


def new_folder(parent: Path, name: str, private: bool = False) -> Path:
    """Make `parent/name-<time>`, with a number if it exists, and return it. Raises UserError: it cannot be written.

    Args:
        private: only its owner may look into it.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for attempt in range(1, 1000):
        folder = parent / (f"{name}-{stamp}" if attempt == 1 else f"{name}-{stamp}-{attempt}")
        try:
            folder.mkdir(parents=True, mode=0o700 if private else 0o777)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise unwritable(folder, error) from error
    raise FileExistsError(folder)


class Data(Protocol):
    """Description of a run's data: a `ShardSet`, or what stands for data at sites."""

    @property
    def class_names(self) -> Sequence[str]:
        """Names of the classes, in order."""

    def facts(self) -> dict[str, Any]:
        """Return name, folder and hash of the data, for the environment of a run."""


class RunFolder(Observer):
    """Writer of a run folder during the run; a context manager and an observer.

    Files:
        `config.yaml`: the resolved configuration, which `--config` reads.
        `environment.json`: see `environment`.
        `manifest.json`, `description.yaml`: of the shards, and of the data that they were made from.
        `metrics.csv`: a row for each round, written at its end.
        `log.txt`: a line for each event.
        `results.h5`, `state.safetensors`: metrics, and the state of server and clients, from which the run can be
            resumed; written once a minute and at the end, also after Ctrl-C.
        `privacy.json`: with `--dp`, the noise and what has been spent of the budget; written with these.
        `SHA256SUMS`: checksums of all but metrics.csv and log.txt (see `Sealed`).

    A new folder can be read by its owner alone, as the state in it holds what each client keeps to itself.

    Args:
        path: the run folder; it is made, or resumed if it exists.
        entry: the algorithm.
        settings: the resolved configuration of this run.
        command: the command line.
        shards: the data.
        device: device of the run.
        federation: the federation that runs; restored from the folder's last checkpoint if there is one.

    Attributes:
        records: the rounds so far, without their confusion matrices.
        planned: the planned number of rounds, followed by that of each resume that changed it.

    Raises:
        UserError: the folder cannot be written, or it holds another run or a damaged checkpoint.
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
        self.sealed = Sealed(path, f"remove {path} to run it from the start", [STATE])
        self.environment = environment(entry, command, shards, device) | {
            "backend": federation.backend.name,
            "code": code_of(type(federation.server)),
            "plugins": plugins(settings),
            **code_of_models(federation.server.task),
        }
        self.records: list[RoundRecord] = []
        self.planned: list[int] = [settings["global_rounds"]]
        self._confusion: dict[str, np.ndarray] = {}
        self._last: tuple[int, Message, dict[str, np.ndarray]] | None = None  # rounds, their state, last matrices
        self._saved = time.monotonic()
        metrics = [n if view == SERVED else f"{view}_{n}" for view in federation.views for n in SCALARS]
        own = map(server_column, federation.figures())
        self._columns = [*ROUND_COLUMNS, *metrics, *group_columns(federation.groups), *own]
        self._resumed: list[str] = []  # what is said of going on
        if self.sealed.holds(ENVIRONMENT) and self.sealed.holds(STATE):
            self._go_on()
        if len(self.planned) > 1:
            self.environment["planned_rounds"] = self.planned
        if federation.agreed:
            self.environment["scaling"] = federation.agreed.pooled.to_dict()

    def __enter__(self) -> RunFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self.sealed.write(self._about())
            self._metrics = (self.path / ROUNDS).open("w", newline="", encoding="utf-8")
            self._log = (self.path / LOG).open("a", encoding="utf-8")
            self._csv = csv.DictWriter(self._metrics, self._columns, restval="")
            self._csv.writeheader()
            self._csv.writerows(csv_row(record, self.federation.groups) for record in self.records)
            for line in (" ".join(self.environment["command"]), *self._resumed):
                self._say(line)
        except OSError as error:
            raise unwritable(self.path, error) from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            with self._metrics, self._log:
                self._say("finished" if kind is None else f"ended early: {kind.__name__} {error}".strip())
        except OSError as failed:
            raise unwritable(self.path, failed) from failed
        finally:
            self.save()

    def _about(self) -> dict[str, bytes]:
        """Return the files about the run; data at sites have neither manifest nor description on this machine."""
        files = {
            CONFIG: yaml_text(self.settings).encode(),
            ENVIRONMENT: (json.dumps(self.environment, indent=2, sort_keys=True) + "\n").encode(),
        }
        if isinstance(self.shards, ShardSet):
            files[MANIFEST] = read_bytes(self.shards.folder / MANIFEST, "make the shards again")
            files[DESCRIPTION] = yaml_text(self.shards.manifest.get("description") or {}).encode()
        return files

    def on_round_end(self, record: RoundRecord) -> None:
        """Append the round to `metrics.csv` and `log.txt`, and save everything once a minute."""
        try:
            self._csv.writerow(csv_row(record, self.federation.groups))
            self._metrics.flush()
            served = record.metrics.get(SERVED)
            accuracy = f" accuracy {served.accuracy:.4f}" if served else ""
            spent = f" ε {record.server[SPENT]:.4f}" if SPENT in record.server else ""
            self._say(f"round {record.round}: clients {record.selected} loss {record.train_loss:.4f}{accuracy}{spent}")
            if record.lost:
                who = ", ".join(f"{id} ({why})" for id, why in record.lost.items())
                self._say(f"round {record.round}: no reply from client {who}")
            for reason in record.rejected.values():
                self._say(f"round {record.round}: dropped an update: {reason}")
            if served and served.not_finite:
                self._say(f"round {record.round}: {served.not_finite}")
            for note in record.notes:
                self._say(f"round {record.round}: {note}")
        except OSError as error:
            raise unwritable(self.path, error) from error
        state = self.federation.save()  # references instead of copies: state is replaced, never changed in place
        if record.metrics:
            self._confusion = {view: metrics.confusion for view, metrics in record.metrics.items()}
        self.records.append(without_confusion(record))
        # in one step: Ctrl-C between two would save the records of this round with the state of the one before
        self._last = len(self.records), state, self._confusion
        if time.monotonic() - self._saved > CHECKPOINT_SECONDS:
            self.save()

    def save(self) -> None:
        """Write `results.h5` and `state.safetensors` as of the last complete round."""
        if self._last is None:
            return
        rounds, own, confusion = self._last
        results = io.BytesIO()  # whole before the disk is touched: libhdf5 fails badly on a full one
        with h5py.File(results, "w") as file:
            write_results(file, self.records[:rounds], confusion, self.federation.data, self.federation.groups)
            file.attrs["config"] = yaml_text(self.settings)
            file.attrs["environment"] = json.dumps(self.environment, sort_keys=True)
            file.attrs["class_names"] = list(self.shards.class_names)
        meta = {
            "round": rounds,
            "identity": identity(self.settings, self.environment),
            "planned": self.planned,
            "state": dict(own.meta),
        }
        state = Message(own.tensors, meta).to_bytes()
        files = {RESULTS: results.getvalue(), STATE: state}
        if private := self.federation.budget or self.federation.protection:
            files[PRIVACY] = (json.dumps(private.table(), indent=2) + "\n").encode()
        self.sealed.write(files)
        self._last, self._saved = None, time.monotonic()

    def _go_on(self) -> None:
        """Restore records and federation from the checkpoint. Raises UserError: it is damaged, or of another run."""
        path, again = self.path / STATE, self.sealed.advice
        before = read_environment(self.path)
        if before.get("format", 1) != FORMAT:
            raise UserError(
                f"{self.path}: a run folder of format {before.get('format', 1)}, and this version goes on with format "
                f"{FORMAT}; go on with fedkdx {before['versions'].get('fedkdx')}, which made it, or {again}"
            )
        try:
            state = Message.from_bytes(self.sealed.read(STATE), self.federation.data.test_x.device)
            if state.meta["identity"] != identity(self.settings, self.environment):
                raise UserError(f"{path}: a checkpoint of {changed_since(before, self.environment)}; {again}")
            records = self._records()
            if len(records) < state.meta["round"]:
                raise UserError(
                    f"{self.path / RESULTS}: of round {len(records)}, and {STATE} of round {state.meta['round']}; put "
                    f"the right file back, or {again}"
                )
            with naming():
                self.federation.restore(Message(state.tensors, state.meta["state"]))
            planned = list(map(int, state.meta["planned"]))
        except (BadMessage, KeyError, ValueError, TypeError) as error:
            raise UserError(f"{path}: damaged ({error}); {again}") from error
        self.records = records[: state.meta["round"]]  # a power cut may have come between the two files
        rounds = self.settings["global_rounds"]
        if len(self.records) > rounds:
            raise UserError(f"{self.path}: has {len(self.records)} rounds already; -gr {rounds} would be fewer")
        self.planned = planned if planned[-1:] == [rounds] else [*planned, rounds]
        self._compare(before)

    def _records(self) -> list[RoundRecord]:
        """Read the rounds so far and the last confusion matrices. Raises UserError: of another run, or damaged."""
        path, again = self.path / RESULTS, self.sealed.advice
        content = self.sealed.read(RESULTS)
        try:
            with h5py.File(io.BytesIO(content)) as file:
                records, self._confusion = read_results(file)
                own = yaml.safe_load(str(file.attrs["config"]))
        except Exception as error:  # a library's own errors on a damaged file, of any type
            raise UserError(f"{path}: damaged ({' '.join(str(error).split())}); {again}") from error
        if difference := differs(own, yaml.safe_load(yaml_text(self.settings))):
            raise UserError(f"{path}: of another run than {STATE} ({difference}); put the right file back, or {again}")
        return records

    def _compare(self, before: Mapping[str, Any]) -> None:
        """Say what differs from the machine and settings of the rounds before, and may change the last bits."""
        now = self.environment
        changed = [f"{key} {now[key]} instead of {before.get(key)}" for key in ON_BITS if before.get(key) != now[key]]
        if changed:
            text = f"resumed after round {len(self.records)} with {', '.join(changed)}"
            self._resumed.append(f"{text}: the last bits may differ from those of an unbroken run")
            print(f"{self.path.name}: {self._resumed[-1]}", file=sys.stderr)
        if said := [*before.get("resumed", []), *self._resumed]:
            self.environment["resumed"] = said

    def _say(self, text: str) -> None:
        print(time.strftime("%Y-%m-%d %H:%M:%S"), text, file=self._log, flush=True)


def identity(settings: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what two runs must share to be the same run: configuration, data, versions, code.

    Args:
        settings: the resolved configuration, as in `config.yaml`.
        environment: as in `environment.json`.
    """
    data, versions = environment["data"]["manifest_sha256"], environment["versions"]
    settings = {key: value for key, value in settings.items() if key not in GIVEN_ANEW}
    parts = [settings, data, versions["fedkdx"], versions["torch"]]
    parts += [
        environment[key] for key in ("code", "plugins", MODELS) if key in environment
    ]  # earlier formats lack them
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def changed_since(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return in words which parts of a run's `identity` two environments differ in; its configuration, if in none."""
    changed = {
        "other data": before["data"]["manifest_sha256"] != now["data"]["manifest_sha256"],
        "another version of fedkdx": before["versions"]["fedkdx"] != now["versions"]["fedkdx"],
        "another version of torch": before["versions"]["torch"] != now["versions"]["torch"],
        "other code of the algorithm": before.get("code") != now.get("code"),
        "other code of the model": before.get(MODELS) != now.get(MODELS),
        "another plug-in": before.get("plugins") != now.get("plugins"),
    }
    return " and ".join(what for what, differs in changed.items() if differs) or "another configuration"


def plugins(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the packages, with their versions, that algorithm and models of a run are from: name -> package."""
    named = [("algorithms", settings["algorithm"][0]), ("models", settings["model"])]
    named += [("models", settings["student_model"])] if settings.get("student_model") else []
    found = [catalog.find(kind, name) for kind, name in named]
    return {entry.name: entry.origin for entry in found if entry.package}


def code_of(server: type[Server]) -> str:
    """Return the SHA-256 of the source files that an algorithm's classes, and those they derive from, are written in.

    A class without a file, as of a notebook, counts by its own text, where that is known.
    """
    return _code((*server.__mro__, *server.Client.__mro__))


def code_of_models(task: Task) -> dict[str, str]:
    """Return the SHA-256 of the source files of models that are not built in, under a name; {} where all are."""
    models = [model for model in (task.model_class, task.student_class) if isinstance(model, type)]
    own = [part for model in models for part in model.__mro__ if catalog.origin_of(part)]
    return {MODELS: _code(own)} if own else {}


def _code(classes: Iterable[type]) -> str:
    digest, seen = hashlib.sha256(), set()
    for part in classes:
        if part.__module__ in ("builtins", "abc"):
            continue
        try:
            file = inspect.getsourcefile(part)
            text = Path(file).read_text(encoding="utf-8") if file and Path(file).is_file() else inspect.getsource(part)
        except (OSError, TypeError):
            text = ""
        if text not in seen:
            seen.add(text)
            digest.update(text.encode())
    return digest.hexdigest()


def environment(entry: Entry, command: list[str], shards: Data, device: torch.device) -> dict[str, Any]:
    """Return what the results depend on besides the configuration: command, algorithm, versions, device, data."""
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
