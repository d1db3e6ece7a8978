"""Every client's test set, through every network it could predict with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedkdx_plugin.engine import metrics
from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.participation import UNSEEN
from fedkdx_plugin.engine.workspace import Workspace
from registry.interface import Model, float_state, mixture

SERVED = "served"
CHUNK = 512  # windows in a forward pass: large enough to fill a core, small enough for its cache


def evaluate(workspace: Workspace, shared: Mapping[str, Tensor], data: DeviceData) -> dict[str, metrics.Metrics]:
    """Metrics on all clients' test windows.

    Args:
        shared: what the server would give every client now (`Server.networks`).

    Returns:
        View -> figures, for each of `views`.
    """
    nets = _predictors(workspace)
    empty = torch.empty(len(data.test_y), next(iter(nets.values())).classes, device=data.test_y.device)
    logits, served = {name: empty.clone() for name in nets}, empty
    common = [name for name in nets if _is_common(name, workspace, shared)]
    workspace.enter_for_evaluation(0, shared)
    for name in common:
        logits[name] = _forward(nets[name], data.test_x)
    for id, place in enumerate(data.test_slices):
        client = workspace.enter_for_evaluation(id, shared)
        for name in nets.keys() - common:
            logits[name][place] = _forward(nets[name], data.test_x[place])
        served[place] = mixture({name: own[place] for name, own in logits.items()}, client.serves())
    logits[SERVED] = served
    return {view: _figures(view, logits, data) for view in views(workspace, shared, data)}


def views(workspace: Workspace, shared: Mapping[str, Tensor], data: DeviceData) -> list[str]:
    """'served'; where there are several networks that predict, each by its name; 'unseen' where there is such a view.

    'unseen' is what the unseen clients would predict with, where that is the same for all who never trained. They
    stand for the test set, so that choosing hyper-parameters on validation windows must not see them.
    """
    nets = _predictors(workspace)
    names = [SERVED, *(nets if len(nets) > 1 else ())]
    if data.unseen and data.evaluated_on == "test" and _newcomer_is_served(data.unseen[0], workspace, shared):
        names.append(UNSEEN)
    return names


def _newcomer_is_served(id: int, workspace: Workspace, shared: Mapping[str, Tensor]) -> bool:
    """Whether a client that never trained predicts with networks that all have in common."""
    client = workspace.clients[id]
    client.nets = workspace.nets
    serves = client.serves()
    return all(_is_common(name, workspace, shared) for name in ([serves] if isinstance(serves, str) else serves))


def _figures(view: str, logits: Mapping[str, Tensor], data: DeviceData) -> metrics.Metrics:
    """A view's figures: 'unseen' on the unseen clients' windows, all others on everybody else's."""
    apart = view == UNSEEN
    part = slice(data.seen_windows, None) if apart else slice(data.seen_windows)
    own = logits[SERVED if apart else view][part]
    return metrics.evaluate(own, data.test_y[part], data.test_client[part], data.clients)


def _predictors(workspace: Workspace) -> dict[str, Model]:
    frozen = workspace.clients[0].frozen
    return {name: net for name, net in workspace.nets.items() if isinstance(net, Model) and name not in frozen}


def _is_common(net: str, workspace: Workspace, shared: Mapping[str, Tensor]) -> bool:
    """Whether all clients would use the very same network."""
    names = float_state({net: workspace.nets[net]}).keys()
    return names <= shared.keys() and not names & workspace.private


@torch.inference_mode()
def _forward(net: Model, x: Tensor) -> Tensor:
    net.eval()
    return torch.cat([net(chunk).logits for chunk in x.split(CHUNK)])
