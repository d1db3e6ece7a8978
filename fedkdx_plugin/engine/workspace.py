"""One set of networks, which the working client uses in turn, and the client state kept between rounds."""

from __future__ import annotations

from collections.abc import Mapping, MutableSequence
from typing import Any

import torch
from torch import Tensor

from fedkdx_plugin.engine.data import memory_format
from fedkdx_plugin.engine.randomness import seeded
from fedkdx_plugin.native.fuse import fuse
from registry import contract
from registry.aggregation import of_client
from registry.interface import Client, Message, Networks, Server, Task, copy_state, float_state, matches


class Workspace:
    """The networks of an algorithm, and every client's kept state.

    Attributes:
        nets: the networks by name, on the device.
        initial: initial state by full name, the same for all clients.
        private: full names of the state that never leaves a client.
        clients: the clients in the order of their ids.
        keeps: full names of the state that clients keep between rounds.
        kept: the state that each client keeps, by full name; empty until it has trained.
    """

    def __init__(
        self, algorithm: type[Server], task: Task, params: Any, samples: list[int], seed: int, device: torch.device
    ) -> None:
        with seeded(seed, "initial weights"):
            nets = contract.built(algorithm.Client, task)
        layout = memory_format(device)
        # PyTorch's types do not know a memory format beside a device
        self.nets = Networks({name: net.to(device, memory_format=layout) for name, net in nets.items()})  # type: ignore[call-overload]
        if device.type == "cpu":
            fuse(self.nets)
        for name in algorithm.Client.frozen:
            self.nets[name].requires_grad_(False)
        self.initial = {name: tensor.clone() for name, tensor in float_state(self.nets).items()}
        # no state of a client, but batch norm without momentum weighs a batch by the number of those before it
        own = (buffer for net in self.nets.values() for buffer in net.buffers() if not buffer.is_floating_point())
        self._counters = [(buffer, buffer.clone()) for buffer in own]
        self.private = contract.private(algorithm.Client, task, self.nets)
        self.keeps = [name for name in self.initial if name in self.private or matches(name, algorithm.Client.kept)]
        self.clients = [algorithm.Client(id, task, params, count) for id, count in enumerate(samples)]
        self.kept: MutableSequence[dict[str, Tensor]] = [{} for _ in samples]

    def enter(self, id: int) -> Client:
        """Give a client its networks, with the initial state replaced by what the client kept."""
        client = self.clients[id]
        copy_state(self.nets, self.initial | self.kept[id])
        for counter, first in self._counters:
            counter.copy_(first)
        client.nets = self.nets
        fresh(client)
        return client

    def keep(self, client: Client) -> None:
        """Store the state that the client declares to keep."""
        state = float_state(self.nets)
        self.kept[client.id] = {name: state[name].clone() for name in self.keeps}

    def state_for_evaluation(self, id: int, shared: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the state that a client predicts with: its private state, else the server's, else what it kept.

        Args:
            shared: result of `Server.networks`.
        """
        shared = of_client(shared, id)
        own = {name: tensor for name, tensor in self.kept[id].items() if name in self.private or name not in shared}
        return self.initial | shared | own


def fresh(client: Client) -> None:
    """Set a client's networks to their training mode and clear gradients of their previous user."""
    for name, net in client.nets.items():
        net.train(name not in client.frozen)
        net.zero_grad()


def restore(workspace: Workspace, server: Server, saved: Message) -> None:
    """Bring clients and server to what `Federation.save` described.

    Raises:
        KeyError or ValueError: `saved` is of another algorithm or another number of clients.
    """
    clients = workspace.clients
    parts: dict[str, dict[str, torch.Tensor]] = {"server": {}}
    for client in clients:
        parts |= {f"client/{client.id}/kept": {}, f"client/{client.id}/memory": {}}
    for name, tensor in saved.tensors.items():
        depth = 1 if name.startswith("server/") else 3
        *place, own = name.split("/", depth)
        parts["/".join(place)][own] = tensor
    for client, trained in zip(clients, saved.meta["trained"], strict=True):
        workspace.kept[client.id] = parts[f"client/{client.id}/kept"]
        client.memory, client.trained = parts[f"client/{client.id}/memory"], trained
    server.restore(Message(parts["server"], saved.meta["server"]))
