"""Loading of a model: of a client of a run, of the one that all of them share, or of a federation's site."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dataset_utils import shards
from dataset_utils.counts import some
from dataset_utils.files import check_listable, is_file, is_folder, state_of, unreadable
from dataset_utils.scaling import Scaling, Statistics
from fedkdx_plugin.configuration.choice import Choice, choose
from fedkdx_plugin.configuration.config import from_dict
from fedkdx_plugin.engine.data import memory_format
from fedkdx_plugin.engine.evaluation import serves_newcomer
from fedkdx_plugin.engine.randomness import seeded
from fedkdx_plugin.engine.workspace import Workspace, restore
from fedkdx_plugin.experiments.experiment import experiment_folder
from fedkdx_plugin.experiments.runner import where_it_began
from fedkdx_plugin.experiments.setting import make_task
from fedkdx_plugin.prediction.predictor import Predictor, Served
from fedkdx_plugin.results import runs
from fedkdx_plugin.results.run_folder import MANIFEST, MODELS, code_of_models, identity
from fedkdx_plugin.results.runs import CONFIG, ENVIRONMENT, STATE, Missing, Run, content
from fedkdx_plugin.results.site_model import KEPT, MEMORY, MODEL, SHARED, SiteModel, is_site
from registry.aggregation import of_client
from registry.errors import UserError
from registry.interface import BadMessage, Client, Message, Task, copy_state
from registry.parameters import suggest
from registry.text import spelt_alike

CPU = torch.device("cpu")
HELD = (f"*/{ENVIRONMENT}", f"client-*/{MODEL}", f"*/client-*/{MODEL}")  # where a folder of runs or sites has them


def load_model(run: str | os.PathLike[str] | Run, client: int | None = None, subject: str | None = None) -> Predictor:
    """Load the model that a client of a finished run predicts with, as the run evaluated it.

    Args:
        run: a run folder, the folder of a comparison with a single run, or a run that was read. At a site of a
            federation: its folder STATE/RUN/client-NUMBER, or a folder above with no other; the model is then that of
            the site, as it measured it last.
        client: number of the client; None: the shared model, with which a client that never trained predicts. A
            site's folder has its own client's model alone, which need not be named.
        subject: name of the client's subject, in place of its number.

    Raises:
        UserError: no finished run, a run without a saved model or with damaged files, an unknown client or subject, no
            client given and no shared model, or a plug-in that is not installed.
    """
    if not isinstance(run, Run):
        folder = run_folder(Path(run))
        if is_site(folder):
            return _of_site(folder, client, subject)
    found = run if isinstance(run, Run) else _read(folder)
    manifest = _manifest(found)
    if subject is not None:
        client = _client_of(found, manifest, subject, client)
    clients = len(manifest["clients"])
    known = isinstance(client, Integral) and not isinstance(client, bool) and 0 <= client < clients
    if client is not None and not known:
        raise UserError(f"{found.folder}: no client {client!r}; there are clients 0 to {clients - 1}")
    state = _state(found)
    parts = ("server/",) if client is None else ("server/", f"client/{client}/")
    _check_numbers(found.folder / STATE, state.tensors, parts)
    restored = _restored(found, manifest, state)
    if client is None:
        who = restored.newcomer()
        if not serves_newcomer(who, restored.workspace, restored.shared):
            raise UserError(
                f"{found.folder}: {found.algorithm} has no model that all clients share; name one of its clients, "
                f"0 to {clients - 1}"
            )
    else:
        client = int(client)
        who = restored.workspace.clients[client]
    own = any(entry.get("scaling") for entry in manifest["clients"])
    scaling = _scaling(found, manifest, client)
    return Predictor(found, client, state.meta["round"], manifest, restored.served(who), scaling, own, client)


def _of_site(folder: Path, client: int | None, subject: str | None) -> Predictor:
    """Load the model of a site of a federation. Raises UserError; see `load_model`."""
    model = SiteModel.read(folder)
    if subject is not None or client not in (None, model.client):
        raise UserError(f"{folder}: a site's folder, of client {model.client} alone; leave client and subject out")
    run = Run(folder, model.config, model.environment, [], {}, tuple(model.manifest["classes"]), {})
    _check_numbers(folder / MODEL, model.tensors)
    restored = _restored_site(run, model)
    left = f"the model is of round {model.round} of {model.rounds}, the last that this site measured"
    return Predictor(
        run,
        model.client,
        model.round,
        model.manifest,
        restored.served(restored.workspace.clients[model.client]),
        _scaling(run, model.manifest, model.shard),
        shard=model.shard,
        notes=(left,) if model.round < model.rounds else (),
    )


def _client_of(run: Run, manifest: Mapping[str, Any], subject: str, client: int | None) -> int:
    """Return the number of the client that has one subject's windows. Raises UserError: there is none, or several."""
    if client is not None:
        raise UserError(f"client {client} and subject {subject!r}: give one of them")
    subjects = [list(entry.get("subjects") or ()) for entry in manifest["clients"]]
    wanted = spelt_alike(str(subject))
    holders = [number for number, own in enumerate(subjects) if wanted in map(spelt_alike, own)]
    if len(holders) == 1 and len(subjects[holders[0]]) == 1:
        return holders[0]
    if holders:
        raise UserError(f"{run.folder}: no client is subject {subject!r} alone: see client {some(map(str, holders))}")
    known = list(dict.fromkeys(name for own in subjects for name in own))
    hint = f"{suggest(str(subject), known)}; there are {some(known)}" if known else ": its data name no subjects"
    raise UserError(f"{run.folder}: no client of subject {subject!r}{hint}")


def run_folder(folder: Path) -> Path:
    """Return a folder that is a run folder or a site's, or the only one in it. Raises UserError: none, or several."""
    if not is_folder(folder):
        raise UserError(f"{folder}: {'is a file' if state_of(folder) else 'no such folder'}; give a run folder")
    if is_file(folder / ENVIRONMENT) or is_site(folder):
        return folder
    check_listable(folder)
    found = (path.parent.relative_to(folder) for pattern in HELD for path in folder.glob(pattern))
    held = sorted(path for path in found if not any(part.startswith(".") for part in path.parts))
    if not held:
        raise UserError(
            f"{folder}: is no run (a folder with {CONFIG}, {ENVIRONMENT} and {STATE}), nor that of a site which has "
            f"measured (with {MODEL}), and holds none"
        )
    if len(held) > 1:
        raise UserError(f"{folder}: holds {len(held)} runs; name one: {some(map(str, held))}")
    return folder / held[0]


def _read(folder: Path) -> Run:
    """Read a finished run. Raises UserError."""
    run = runs.read(folder)
    if isinstance(run, Missing):
        raise UserError(f"{folder}: no finished run ({run.reason})")
    return run


def _manifest(run: Run) -> Mapping[str, Any]:
    """Return the manifest of the run's data. Raises UserError: it is not the one that the run recorded."""
    path = run.folder / MANIFEST
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError as error:
        raise UserError(
            f"{path}: missing; the models of a federation between sites are at the sites: there, give the folder of "
            "--state; any other run has this file"
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error
    if digest != run.data["manifest_sha256"]:
        raise UserError(f"{path}: damaged, or of other data than the run's; remove {run.folder} and run it again")
    manifest = shards.read_manifest(run.folder)
    if tuple(manifest["classes"]) != run.classes:
        raise UserError(f"{path}: has other classes than the run's results; remove {run.folder} and run it again")
    return manifest


def _state(run: Run) -> Message:
    """Return the state saved after the last round. Raises UserError."""
    path = run.folder / STATE
    again = runs.again(run.folder)
    if not is_file(path):
        raise UserError(
            f"{path}: missing, as runs of a grid keep no state; make the run again with fedkdx run --config "
            f"{run.folder / CONFIG}"
        )
    try:
        state = Message.from_bytes(content(run.folder, STATE))
        expected, found, round = identity(run.config, run.environment), state.meta["identity"], state.meta["round"]
        meta, _ = state.meta["state"]["server"], state.meta["state"]["trained"]
    except (BadMessage, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({' '.join(str(error).split())}); {again}") from error
    if found != expected or not isinstance(meta, dict):
        raise UserError(f"{path}: has another configuration, data or version than {run.folder / CONFIG}; {again}")
    if round != len(run.records):
        raise UserError(
            f"{path}: is of round {round}, but the results of {len(run.records)}; run fedkdx resume {run.folder.parent}"
        )
    return state


def _check_numbers(path: Path, tensors: Mapping[str, Tensor], parts: tuple[str, ...] = ("",)) -> None:
    """Raise UserError where the server's state, or that of the client asked for, holds values that are not finite.

    That of the others does not matter. Making the run again would give the same.

    Args:
        path: the file that the tensors are from.
        parts: how the names of those that matter begin; by default, all do.
    """
    for name, tensor in tensors.items():
        if name.startswith(parts) and not torch.isfinite(tensor).all():
            others = ", another client," if name.startswith("client/") else ""
            raise UserError(
                f"{path}: tensor '{name}' holds NaN or infinite values, as training diverged; take another run{others} "
                "or train with a lower learning rate (-lr)"
            )


class _Restored(NamedTuple):
    """Clients after the last round, and what the server gives them."""

    workspace: Workspace
    shared: Mapping[str, Tensor]
    seed: int

    def newcomer(self) -> Client:
        """Return a client that never trained."""
        known = self.workspace.clients[0]
        return type(known)(len(self.workspace.clients), known.task, known.params, 0)

    def check(self, clients: Iterable[Client]) -> None:
        """Raise ValueError, KeyError or RuntimeError where what clients predict with does not fit the networks."""
        for client in clients:
            copy_state(self.workspace.nets, self.workspace.state_for_evaluation(client.id, self.shared))

    def served(self, client: Client) -> Served:
        """Return the networks that a client predicts with, uncompiled, with its state."""
        workspace, shared = self.workspace, self.shared
        kept = client.id < len(workspace.clients)
        state = (
            workspace.state_for_evaluation(client.id, shared) if kept else workspace.initial | of_client(shared, None)
        )
        with seeded(self.seed, "initial weights"):  # anew, as those of the workspace may be compiled
            nets = type(client).build(client.task)
        copy_state(nets, state)
        client.nets = workspace.nets
        serves = client.serves()
        names = [serves] if isinstance(serves, str) else list(serves)
        network = Served({name: nets[name] for name in names}, serves)
        network.to(memory_format=memory_format(CPU))  # type: ignore[call-overload]
        return network.requires_grad_(False).eval()


def _chosen(run: Run, manifest: Mapping[str, Any], name: str) -> tuple[Choice, Task]:
    """Return a run's algorithm and task. Raises UserError: a plug-in is missing, or its model's code has changed.

    Args:
        name: the file in the run's folder that its configuration is from.
    """
    # 'set' holds all hyper-parameters of the run; a preset file may have been removed since
    config = dataclasses.replace(from_dict(run.config, str(run.folder / name)), preset="paper")
    channels, one, time = manifest["shape"]
    with where_it_began(experiment_folder(run.folder)):
        (choice,) = choose(config)
        task = make_task(config, (channels, one, time), len(manifest["classes"]))
        task = dataclasses.replace(task, seed=run.seed, params=choice.params)
    if run.environment.get(MODELS) != code_of_models(task).get(MODELS):
        raise UserError(
            f"{run.folder}: the code of its model {run.config['model']} has changed since, so that it might predict "
            "otherwise; put the code back as it was, or make the run again"
        )
    return choice, task


def _restored(run: Run, manifest: Mapping[str, Any], state: Message) -> _Restored:
    """Return a run's clients, and what its server gives them. Raises UserError: damaged, or a plug-in is missing."""
    choice, task = _chosen(run, manifest, CONFIG)
    samples = [entry["train"]["samples"] for entry in manifest["clients"]]
    with _fitting(run, STATE):
        workspace = Workspace(choice.server, task, choice.params, samples, run.seed, CPU)
        shared = {name: tensor for name, tensor in workspace.initial.items() if name not in workspace.private}
        server = choice.server(task, choice.params, shared)
        restore(workspace, server, Message(state.tensors, state.meta["state"]))
        restored = _Restored(workspace, server.networks(), run.seed)
        restored.check(workspace.clients)
    return restored


def _restored_site(run: Run, model: SiteModel) -> _Restored:
    """Return a site's client, and what the server gave it. Raises UserError as `_restored` does."""
    choice, task = _chosen(run, model.manifest, MODEL)
    with _fitting(run, MODEL):
        samples = [0] * model.clients  # of the others, as at the site
        samples[model.client] = model.manifest["clients"][model.shard]["train"]["samples"]
        workspace = Workspace(choice.server, task, choice.params, samples, run.seed, CPU)
        client = workspace.clients[model.client]
        workspace.kept[client.id] = model.part(KEPT)
        client.memory, client.trained = model.part(MEMORY), model.trained
        restored = _Restored(workspace, model.part(SHARED), run.seed)
        restored.check([client])
    return restored


@contextmanager
def _fitting(run: Run, name: str) -> Iterator[None]:
    """Turn what state that does not fit the algorithm raises into a UserError that names the file of a run."""
    try:
        yield
    except (BadMessage, KeyError, IndexError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{run.folder / name}: does not fit {run.algorithm} with model {run.config['model']} "
            f"({' '.join(str(error).split())}); made by another version, or damaged"
        ) from error


def _scaling(run: Run, manifest: Mapping[str, Any], shard: int | None) -> Scaling | None:
    """Return how the engine or the shards scaled the windows of a shard's client; None: not at all."""
    entries = manifest["clients"]
    if "statistics" in entries[0]:
        try:
            common = Statistics.from_dict(run.environment["scaling"], manifest["shape"][0])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{run.folder / ENVIRONMENT}: 'scaling', the clients' pooled statistics, is missing or damaged; remove "
                f"{run.folder} and run it again"
            ) from error
        return common.scaling()
    own = None if shard is None else entries[shard].get("scaling")
    return own and Scaling(np.array(own["offset"], dtype=np.float64), np.array(own["scale"], dtype=np.float64))
