"""Gradient inversion of a run's updates: at its beginning and now, of one window and of a round of training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.randomness import derive, generator
from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.privacy.audit.inversion import Effort, Seen, invert, matched
from fedkdx_plugin.privacy.audit.models import shared_network
from fedkdx_plugin.privacy.audit.rebuilt import Rebuilt
from fedkdx_plugin.privacy.audit.view import Update, see, sender
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
        client: the client.
        found: (count, channels, 1, time).
        true: the windows that the client trained on, (n, channels, 1, time).
    """

    kind: str
    when: str
    client: int
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
    for kind in (WINDOW, ROUND):
        data = _one_window_each(rebuilt, clients) if kind == WINDOW else rebuilt.data
        local = {"batch_size": 1, "local_epochs": 1} if kind == WINDOW else {}
        for when, saved, index in ((FIRST, None, 1), (NOW, rebuilt.saved, rebuilt.done + 1)):
            with rebuilt.everyone(saved, data, clients, **local) as federation:
                if (net := shared_network(federation)) is None:
                    return
                for update in see(federation, rebuilt.at(index)):
                    rng = generator(rebuilt.config.seed, "audit", "inversion", kind, when, sender(update))
                    true = data.train_x[sender(update)]
                    seen, count = _seen(federation, net, update), min(len(true), MANY)
                    network = rebuilt.fresh_network(federation, net)
                    copy_state({net: network}, of_net(net, update.start))
                    found = invert(network, seen, tuple(true.shape[1:]), count, effort, rng)
                    yield Recovered(kind, when, sender(update), found, true.cpu())


def _seen(federation: Federation, net: str, update: Update) -> Seen:
    """Return what an update tells of a network, by the network's own names."""
    statistics = {n for n in update.change if n.endswith((".running_mean", ".running_var"))}
    gradients = {n: -change for n, change in of_net(net, update.change).items() if n not in statistics}
    after = {n: t for n, t in of_net(net, update.end).items() if n in statistics}
    local = federation.settings
    batches = -(-len(federation.data.train_y[sender(update)]) // local.batch_size)

    def own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name.removeprefix(f"{net}."): tensor for name, tensor in tensors.items()}

    return Seen(own(gradients), own(after), batches * local.local_epochs)


def _one_window_each(rebuilt: Rebuilt, clients: Sequence[int]) -> DeviceData:
    """Return data in which each of the clients has a single window, drawn from its own."""
    x, y = list(rebuilt.data.train_x), list(rebuilt.data.train_y)
    for client in clients:
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
