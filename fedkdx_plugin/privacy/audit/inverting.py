"""Gradient inversion of a run's updates: at its beginning and now, of one window and of a round of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.randomness import derive, generator
from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.privacy.audit.inversion import Effort, Seen, invert, matched
from fedkdx_plugin.privacy.audit.models import shared_network
from fedkdx_plugin.privacy.audit.rebuilt import Rebuilt
from fedkdx_plugin.privacy.audit.view import Update
from fedkdx_plugin.privacy.options import EXAMPLE
from registry.interface import copy_state
from registry.tensors import of_net

FIRST, NOW = "first round", "now"
WINDOW, ROUND = "one window, one step", "a round of training"
MANY = 8  # windows looked for in the update of a round


@dataclass(frozen=True, eq=False)
class Recovered:
    """Windows found in one client's update.

    Attributes:
        kind: `WINDOW` or `ROUND`.
        when: `FIRST` or `NOW`.
        client: the client; the first of those asked for, where only a mean of several is seen.
        clients: all those whose mean the update is.
        found: (count, channels, 1, time).
        true: the windows that were trained on, (n, channels, 1, time).
    """

    kind: str
    when: str
    client: int
    clients: tuple[int, ...]
    found: Tensor
    true: Tensor

    @property
    def correlations(self) -> np.ndarray:
        """Correlation of each window found with the true one that it stands for, (count,)."""
        return matched(self.found, self.true)[1]


def chosen_clients(rebuilt: Rebuilt, count: int) -> list[int]:
    """Draw the clients whose updates are inverted, ascending."""
    rng = np.random.default_rng(derive(rebuilt.config.seed, "audit", "inverted clients"))
    clients = rng.choice(rebuilt.clients, size=min(count, len(rebuilt.clients)), replace=False)
    return sorted(map(int, clients))


def recover(rebuilt: Rebuilt, clients: Sequence[int], effort: Effort) -> Iterator[Recovered]:
    """Yield what is found in the updates of these clients; nothing where no whole model is sent."""
    alone = rebuilt.settings.privacy.level == EXAMPLE  # the noise is made for clients of many windows
    for kind in (ROUND,) if alone else (WINDOW, ROUND):
        data = _one_window_each(rebuilt) if kind == WINDOW else rebuilt.data
        local = {"batch_size": 1, "local_epochs": 1} if kind == WINDOW else {}
        with rebuilt.watched(data, **local) as watched:
            if (net := shared_network(watched.federation)) is None:
                return
            for when, saved, index in ((FIRST, watched.first, 1), (NOW, rebuilt.saved, rebuilt.done + 1)):
                for update in watched.updates(saved, rebuilt.at(index), clients):
                    client = next(id for id in update.clients if id in clients)
                    rng = generator(rebuilt.config.seed, "audit", "inversion", kind, when, client)
                    true = torch.cat([watched.federation.data.train_x[id] for id in update.clients]).cpu()
                    network = rebuilt.fresh_network(watched.federation, net)
                    copy_state({net: network}, of_net(net, update.start))
                    seen, count = _seen(watched.federation, net, update), min(len(true), MANY)
                    found = invert(network, seen, tuple(true.shape[1:]), count, effort, rng)
                    yield Recovered(kind, when, client, update.clients, found, true)


def _seen(federation: Federation, net: str, update: Update) -> Seen:
    """Return what an update tells of a network, by the network's own names."""
    change, end = (_own(net, tensors) for tensors in (update.change, update.end))
    statistics = {name for name in change if name.endswith((".running_mean", ".running_var"))}
    local = federation.settings
    windows = [len(federation.data.train_y[id]) for id in update.clients]
    return Seen(
        gradients={name: -tensor for name, tensor in change.items() if name not in statistics},
        statistics={name: end[name] for name in statistics},
        steps=-(-sum(windows) // (len(windows) * local.batch_size)) * local.local_epochs,
    )


def _own(net: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(f"{net}."): tensor for name, tensor in of_net(net, tensors).items()}


def _one_window_each(rebuilt: Rebuilt) -> DeviceData:
    """Return data in which each client has a single window, drawn from its own."""
    x, y = list(rebuilt.data.train_x), list(rebuilt.data.train_y)
    for client in (id for id, own in enumerate(y) if len(own)):
        rng = np.random.default_rng(derive(rebuilt.config.seed, "audit", "inverted window", client))
        place = int(rng.integers(len(y[client])))
        x[client], y[client] = x[client][place : place + 1], y[client][place : place + 1]
    return replace(rebuilt.data, train_x=x, train_y=y, scaled={})


def by_chance(recovered: Sequence[Recovered]) -> tuple[np.ndarray, np.ndarray]:
    """Return the correlations of the windows found in one client's update with another client's windows, and whose.

    That is what looks alike without any leak, as windows of people who do the same thing do. Of both clients, as many
    windows are compared as the one with fewer has.

    Args:
        recovered: of one kind and time, all clients.

    Returns:
        (n,) correlations, and the client in whose update each window was found, (n,).
    """
    values, clients = [], []
    for one in recovered:
        for other in recovered:
            if one.client != other.client:
                own = matched(one.found, other.true[: len(one.true)])[1]
                values.append(own)
                clients.append(np.full(len(own), one.client))
    if not values:
        return np.empty(0), np.empty(0, dtype=np.int64)
    return np.concatenate(values), np.concatenate(clients)
