"""Evaluation of every client's test windows with every network that it may predict with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedkdx_plugin.engine import metrics
from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.participation import UNSEEN
from fedkdx_plugin.engine.workspace import Workspace
from registry import contract
from registry.interface import Client, Model, copy_state, float_state, mixture

SERVED = "served"
CHUNK = 256  # windows in a forward pass on a CPU: enough to use a core fully, few enough for its cache
GPU_CHUNK = 4096  # windows in a forward pass on a GPU


class Prediction(NamedTuple):
    """A forward pass to make: the network's state by full name, and the test windows."""

    state: Mapping[str, Tensor]
    windows: slice


Predict = Callable[[str, Sequence[Prediction]], list[Tensor]]


class Evaluator:
    """Metrics on all clients' test windows, round after round.

    The logits of a client's network are kept, and computed again only if one of its tensors was replaced: networks of
    clients that did not train give the same logits as before.

    Args:
        workspace: the networks and every client's state.
        data: the shards on the device.
        predict: makes several forward passes of one network (`Backend.predict`).
    """

    def __init__(self, workspace: Workspace, data: DeviceData, predict: Predict) -> None:
        self.workspace, self.data, self.predict = workspace, data, predict
        nets = predictors(workspace)
        self._names = {net: tuple(float_state({net: workspace.nets[net]})) for net in nets}
        size = len(data.test_y), next(iter(nets.values())).classes
        self._logits = {net: torch.empty(size, device=data.test_y.device) for net in nets}
        self._seen: dict[tuple[str, int | None], list[Tensor]] = {}

    def __call__(self, shared: Mapping[str, Tensor]) -> dict[str, metrics.Metrics]:
        """Return view -> metrics, for each of `views`.

        Args:
            shared: shared state that every client would use now (`Server.networks`).
        """
        for net in self._names:
            if _is_common(net, self.workspace, shared) and not any("/" in name for name in shared):
                self._ask(net, {None: (self.workspace.initial | dict(shared), slice(None))})
            else:
                states = (self.workspace.state_for_evaluation(id, shared) for id in range(self.data.clients))
                self._ask(net, dict(enumerate(zip(states, self.data.test_slices, strict=True))))
        served = torch.empty_like(next(iter(self._logits.values())))
        for client, place in zip(self.workspace.clients, self.data.test_slices, strict=True):
            client.nets = self.workspace.nets
            own = {net: logits[place] for net, logits in self._logits.items()}
            served[place] = mixture(own, contract.serves(client, self._names))
        logits = self._logits | {SERVED: served}
        names = views(self.workspace, shared, self.data)
        seen = [view for view in names if view != UNSEEN]
        found = _figures({view: logits[view] for view in seen}, slice(self.data.seen_windows), self.data)
        if UNSEEN in names:
            found |= _figures({UNSEEN: served}, slice(self.data.seen_windows, None), self.data)
        return {view: found[view] for view in names}

    def _ask(self, net: str, states: Mapping[int | None, tuple[Mapping[str, Tensor], slice]]) -> None:
        """Update the logits of a network, for each client's state or (key None) the common state of all."""
        wanted = []
        for id, (state, windows) in states.items():
            tensors = [state[name] for name in self._names[net]]
            seen = self._seen.get((net, id), [])
            if len(seen) != len(tensors) or any(old is not new for old, new in zip(seen, tensors, strict=True)):
                wanted.append(Prediction({name: state[name] for name in self._names[net]}, windows))
            self._seen[net, id] = tensors  # kept alive, so that no later tensor has the same identity
        for known in [key for key in self._seen if key[0] == net and key[1] not in states]:
            del self._seen[known]  # its logits are overwritten now
        for prediction, logits in zip(wanted, self.predict(net, wanted), strict=True):
            self._logits[net][prediction.windows] = logits


def predictors(workspace: Workspace) -> dict[str, Model]:
    """Return the networks that predict: models that are trained."""
    frozen = workspace.clients[0].frozen
    return {name: net for name, net in workspace.nets.items() if isinstance(net, Model) and name not in frozen}


def views(workspace: Workspace, shared: Mapping[str, Tensor], data: DeviceData) -> list[str]:
    """Return the names of the views: 'served'; each network that predicts, if there are several; 'unseen'.

    'unseen' evaluates unseen clients, if all clients that never trained would predict with the same network. It is left
    out on validation windows, as hyper-parameters must not be chosen by unseen clients.
    """
    nets = predictors(workspace)
    names = [SERVED, *(nets if len(nets) > 1 else ())]
    newcomer = workspace.clients[data.unseen[0]] if data.unseen and data.evaluated_on == "test" else None
    if newcomer is not None and serves_newcomer(newcomer, workspace, shared):
        names.append(UNSEEN)
    return names


def serves_newcomer(client: Client, workspace: Workspace, shared: Mapping[str, Tensor]) -> bool:
    """Return whether a client that never trained predicts with networks that all clients share."""
    client.nets = workspace.nets
    serves = contract.serves(client, predictors(workspace))
    return all(_is_common(name, workspace, shared) for name in ([serves] if isinstance(serves, str) else serves))


def _is_common(net: str, workspace: Workspace, shared: Mapping[str, Tensor]) -> bool:
    """Return whether all clients for which the server has no state of their own would use the same network."""
    names = float_state({net: workspace.nets[net]}).keys()
    return names <= shared.keys() and not names & workspace.private


def _figures(logits: Mapping[str, Tensor], part: slice, data: DeviceData) -> dict[str, metrics.Metrics]:
    """Return the metrics of several views on a part of the test windows."""
    own = [logits[view][part] for view in logits]
    found = metrics.evaluate_views(own, data.test_y[part], data.test_client[part], data.clients)
    return dict(zip(logits, found, strict=True))


@torch.inference_mode()
def predict(workspace: Workspace, x: Tensor, net: str, predictions: Sequence[Prediction]) -> list[Tensor]:
    """Return the logits (n, classes) of each prediction, computed one after the other on windows of `x`."""
    model, results = workspace.nets[net], []
    at_once = CHUNK if x.device.type == "cpu" else GPU_CHUNK
    model.eval()
    for state, windows in predictions:
        copy_state({net: model}, state)
        results.append(torch.cat([model(chunk).logits for chunk in x[windows].split(at_once)]))
    return results
