"""Loading of a model from a run folder: that of one of its clients, or the one that all of them share."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from dataset_utils import shards
from dataset_utils.counts import some
from dataset_utils.files import check_listable, is_file, is_folder, state_of, unreadable
from dataset_utils.scaling import Scaling, Statistics
from fedkdx_plugin.configuration.choice import choose
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
from registry.aggregation import of_client
from registry.errors import UserError
from registry.interface import BadMessage, Client, Message, Server, copy_state
from registry.parameters import suggest
from registry.text import spelt_alike

CPU = torch.device("cpu")


def load_model(run: str | os.PathLike[str] | Run, client: int | None = None, subject: str | None = None) -> Predictor:
    """Load the model that a client of a finished run predicts with, as the run evaluated it.

    Args:
        run: a run folder, the folder of a comparison with a single run, or a run that was read.
        client: number of the client; None: the shared model, with which a client that never trained predicts.
        subject: name of the client's subject, in place of its number.

    Raises:
        UserError: no finished run, a run without a saved model or with damaged files, an unknown client or subject, no
            client given and no shared model, or a plug-in that is not installed.
    """
    found = run if isinstance(run, Run) else _read(Path(run))
    manifest = _manifest(found)
    if subject is not None:
        client = _client_of(found, manifest, subject, client)
    clients = len(manifest["clients"])
    known = isinstance(client, Integral) and not isinstance(client, bool) and 0 <= client < clients
    if client is not None and not known:
        raise UserError(f"{found.folder}: no client {client!r}; there are clients 0 to {clients - 1}")
    state = _state(found)
    _check_numbers(found, state, client)
    restored = _restored(found, manifest, state)
    if client is None:
        who = restored.newcomer()
        if not serves_newcomer(who, restored.workspace, restored.server.networks()):
            raise UserError(
                f"{found.folder}: {found.algorithm} has no model that all clients share; name one of its clients, "
                f"0 to {clients - 1}"
            )
    else:
        client = int(client)
        who = restored.workspace.clients[client]
    own = any(entry.get("scaling") for entry in manifest["clients"])
    return Predictor(
        found, client, state.meta["round"], manifest, restored.served(who), _scaling(found, manifest, client), own
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
    """Return a folder that is a run folder, or the only one in it. Raises UserError: there is none, or several."""
    if not is_folder(folder):
        raise UserError(f"{folder}: {'is a file' if state_of(folder) else 'no such folder'}; give a run folder")
    if is_file(folder / ENVIRONMENT):
        return folder
    check_listable(folder)
    held = sorted(path.parent for path in folder.glob(f"*/{ENVIRONMENT}") if not path.parent.name.startswith("."))
    if not held:
        raise UserError(f"{folder}: is no run (a folder with {CONFIG}, {ENVIRONMENT} and {STATE}) and holds none")
    if len(held) > 1:
        raise UserError(f"{folder}: holds {len(held)} runs; name one: {some(path.name for path in held)}")
    return held[0]


def _read(folder: Path) -> Run:
    """Read a finished run. Raises UserError."""
    run = runs.read(run_folder(folder))
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
            f"{path}: missing; of a federation between sites no model can be loaded, any other run has this file"
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


def _check_numbers(run: Run, state: Message, client: int | None) -> None:
    """Raise UserError where the server's state, or that of the client asked for, holds values that are not finite.

    That of the others does not matter. Making the run again would give the same.
    """
    parts = ("server/",) if client is None else ("server/", f"client/{client}/")
    for name, tensor in state.tensors.items():
        if name.startswith(parts) and not torch.isfinite(tensor).all():
            others = "" if name.startswith("server/") else ", another client,"
            raise UserError(
                f"{run.folder / STATE}: tensor '{name}' holds NaN or infinite values, as training diverged; take "
                f"another run{others} or train with a lower learning rate (-lr)"
            )


class _Restored(NamedTuple):
    """Server and clients after the last round."""

    algorithm: type[Server]
    workspace: Workspace
    server: Server
    seed: int

    def newcomer(self) -> Client:
        """Return a client that never trained."""
        known = self.workspace.clients[0]
        return self.algorithm.Client(len(self.workspace.clients), known.task, known.params, 0)

    def served(self, client: Client) -> Served:
        """Return the networks that a client predicts with, uncompiled, with its state."""
        workspace, shared = self.workspace, self.server.networks()
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


def _restored(run: Run, manifest: Mapping[str, Any], state: Message) -> _Restored:
    """Return the run's server and clients. Raises UserError: damaged state, or a plug-in is missing."""
    # 'set' holds all hyper-parameters of the run; a preset file may have been removed since
    config = dataclasses.replace(from_dict(run.config, str(run.folder / CONFIG)), preset="paper")
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
    samples = [entry["train"]["samples"] for entry in manifest["clients"]]
    try:
        workspace = Workspace(choice.server, task, choice.params, samples, run.seed, CPU)
        shared = {name: tensor for name, tensor in workspace.initial.items() if name not in workspace.private}
        server = choice.server(task, choice.params, shared)
        restore(workspace, server, Message(state.tensors, state.meta["state"]))
        for client in workspace.clients:
            copy_state(workspace.nets, workspace.state_for_evaluation(client.id, server.networks()))
    except (BadMessage, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(
            f"{run.folder / STATE}: does not fit {run.algorithm} with model {run.config['model']} "
            f"({' '.join(str(error).split())}); made by another version, or damaged"
        ) from error
    return _Restored(choice.server, workspace, server, run.seed)


def _scaling(run: Run, manifest: Mapping[str, Any], client: int | None) -> Scaling | None:
    """Return how the engine or the shards scaled the windows of a client; None: not at all."""
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
    own = None if client is None else entries[client].get("scaling")
    return own and Scaling(np.array(own["offset"], dtype=np.float64), np.array(own["scale"], dtype=np.float64))
