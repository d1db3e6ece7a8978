"""Models whose training windows are attacked, and how sure they are of a window's label."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.evaluation import Prediction, predict, predictors
from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.engine.workspace import Workspace
from fedkdx_plugin.privacy.audit.view import Update
from fedkdx_plugin.privacy.audit.windows import Windows
from registry import contract
from registry.aggregation import of_client
from registry.interface import float_state, mixture

SHARED, UPDATE, OWN = "shared model", "single update", "own model"
TARGETS = {
    SHARED: "the model that every client has, as it is after the last round",
    UPDATE: "the model that a client sends in one more round, as the server sees it",
    OWN: "the model that a client keeps to itself and predicts with",
}


def shared_network(federation: Federation) -> str | None:
    """Return the name of the first network that predicts and that the server holds whole; None if there is none."""
    workspace, held = federation.workspace, contract.networks(federation.server)
    names = of_client(held, 0).keys()
    for net in predictors(workspace):
        own = float_state({net: workspace.nets[net]}).keys()
        if own <= names and not own & workspace.private:
            return net
    return None


def of_run(federation: Federation, data: DeviceData, windows: Windows) -> dict[str, np.ndarray]:
    """Return target -> confidences (n,) of the models after the last round made: `SHARED`, `OWN`.

    A target that the algorithm does not have is missing: no common model, or no other model than that.
    """
    workspace, held = federation.workspace, dict(contract.networks(federation.server))
    net, found = shared_network(federation), dict[str, list[np.ndarray]]()
    for client in np.unique(windows.client).tolist():
        state = workspace.state_for_evaluation(client, held)
        x, y = windows.x(data, client), windows.y(data, client)
        if net is not None:
            found.setdefault(SHARED, []).append(confidences(_logits(workspace, net, state, x), y))
        worker = workspace.clients[client]
        worker.nets = workspace.nets
        serves = contract.serves(worker, predictors(workspace))
        names = [serves] if isinstance(serves, str) else list(serves)
        if names != [net]:
            logits = mixture({name: _logits(workspace, name, state, x) for name in names}, serves)
            found.setdefault(OWN, []).append(confidences(logits, y))
    whole = len(np.unique(windows.client))
    return {target: np.concatenate(parts) for target, parts in found.items() if len(parts) == whole}


def of_updates(
    federation: Federation, updates: Sequence[Update], data: DeviceData, windows: Windows
) -> np.ndarray | None:
    """Return the confidences (n,) of the model that each client's update leads to, on its own windows.

    Where only a mean of several clients is seen, of the model that it leads to. None where updates are of no whole
    model, or one is missing.
    """
    net = shared_network(federation)
    ends = {client: update.end for update in updates for client in update.clients}
    clients = np.unique(windows.client).tolist()
    if net is None or not ends.keys() >= set(clients):
        return None
    parts = []
    for client in clients:
        state = federation.workspace.initial | ends[client]
        logits = _logits(federation.workspace, net, state, windows.x(data, client))
        parts.append(confidences(logits, windows.y(data, client)))
    return np.concatenate(parts)


def confidences(logits: Tensor, y: Tensor) -> np.ndarray:
    """Return log(p / (1 - p)) of the probability p of each window's label, (n,), float64 (Carlini et al. 2022, eq. 4).

    A cross-entropy is a falling function of it, so that a threshold on one is a threshold on the other.

    Args:
        logits: (n, classes).
        y: (n,).
    """
    logits = logits.double()
    own = logits.gather(1, y[:, None])
    others = logits.masked_fill(torch.zeros_like(logits, dtype=torch.bool).scatter(1, y[:, None], True), -torch.inf)
    result: np.ndarray = (own.squeeze(1) - others.logsumexp(1)).cpu().numpy()
    return result


def _logits(workspace: Workspace, net: str, state: Mapping[str, Tensor], x: Tensor) -> Tensor:
    own = {name: tensor for name, tensor in state.items() if name.startswith(f"{net}.")}
    (logits,) = predict(workspace, x, net, [Prediction(own, slice(None))])
    return logits
