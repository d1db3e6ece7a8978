"""One site: its own shards, its private state, and the engine's work for one client."""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dataset_utils import shards
from dataset_utils.scaling import Statistics
from dataset_utils.shards import Shard
from fedkdx_plugin.engine import scaling
from fedkdx_plugin.engine.backends.sequential import Sequential
from fedkdx_plugin.engine.data import DeviceData, memory_format
from fedkdx_plugin.engine.training import ClientError, Settings
from fedkdx_plugin.engine.transport import Transport
from fedkdx_plugin.engine.workspace import Workspace
from fedkdx_plugin.flower.protocol import Announcement, Answer, Figures, Request
from fedkdx_plugin.flower.store import Store
from registry import __version__
from registry.errors import UserError
from registry.interface import BadMessage, Message, NonFinite, Server, Task


@dataclass(frozen=True)
class Place:
    """What is the site's own business; nothing of it comes from the server.

    Attributes:
        client: its number in the federation, counted from 0.
        folder: of shards.
        shard: which of them is its own.
        state: folder of its private state.
        device: where it computes.
    """

    client: int
    folder: Path
    shard: int
    state: Path
    device: torch.device


class LocalData:
    """A site's windows as they lie on its disk.

    Raises:
        UserError: they cannot be read.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self.manifest, self.train, self.test = shards.load_client(place.folder, place.shard)

    def announcement(self) -> Announcement:
        """What the server is told of them."""
        channels, one, time = self.manifest["shape"]
        return Announcement(
            client=self.place.client,
            samples=len(self.train.y),
            tests=len(self.test.y),
            shape=(channels, one, time),
            classes=tuple(self.manifest["classes"]),
            data=self.manifest["name"],
            evaluated_on=shards.evaluated_on(self.manifest),
            scale=shards.scale_of(self.manifest),
            statistics=shards.statistics_of(self.manifest, self.place.shard),
            versions={"fedkdx": __version__, "torch": torch.__version__, "python": platform.python_version()},
        )

    def on_device(self, clients: int) -> DeviceData:
        """The federation's data as this site sees it: its own windows, and of all others none."""
        own, device = self.place.client, self.place.device

        def windows(shard: Shard) -> tuple[torch.Tensor, torch.Tensor]:
            x = torch.from_numpy(shard.x).to(device, memory_format=memory_format(device))
            return x, torch.from_numpy(shard.y).to(device)

        (train_x, train_y), (test_x, test_y) = windows(self.train), windows(self.test)
        return DeviceData(
            train_x=[train_x if id == own else train_x[:0] for id in range(clients)],
            train_y=[train_y if id == own else train_y[:0] for id in range(clients)],
            test_x=test_x,
            test_y=test_y,
            test_client=torch.full_like(test_y, own),
            test_slices=[slice(len(test_y)) if id == own else slice(0) for id in range(clients)],
            evaluated_on=shards.evaluated_on(self.manifest),
        )


class Site:
    """Does what one client is asked: the same code as in one process, on this site's windows alone.

    Args:
        place: what is the site's own.
        algorithm, task, params, settings: as of `engine.rounds.Federation`.
        data: the site's windows.
        clients: how many the federation has.
    """

    def __init__(
        self,
        place: Place,
        algorithm: type[Server],
        task: Task,
        params: Any,
        settings: Settings,
        data: LocalData,
        clients: int,
    ) -> None:
        if place.client >= clients:
            raise UserError(f"client {place.client}: the federation has clients 0 to {clients - 1}")
        self.place, self.settings = place, settings
        self.data, self.common = data.on_device(clients), data.announcement().statistics is not None
        samples = [len(y) for y in self.data.train_y]
        task = replace(task, seed=settings.seed)
        self.workspace = Workspace(algorithm, task, params, samples, settings.seed, place.device)
        self._begin(self.data)

    def _begin(self, data: DeviceData) -> None:
        """Work on these windows from now on."""
        self.backend = Sequential(self.workspace, data, self.settings)
        self.evaluate = self.backend.evaluator()

    def _scale(self, pooled: Statistics | None) -> None:
        """Bring the windows to what all sites have in common. Raises UserError where they are not to be, or how?"""
        if (pooled is not None) != self.common:
            raise UserError("the server and this site do not agree on whether windows are still to be scaled")
        if pooled is None:
            return
        if len(pooled.mean) != self.data.test_x.shape[1]:
            raise UserError(f"the server scales {len(pooled.mean)} channels, here are {self.data.test_x.shape[1]}")
        self._begin(scaling.apply(self.data, pooled))

    def handle(self, request: Request) -> Answer:
        """Measure the state after the last round, then train; private state is on disk before the answer exists.

        Raises:
            UserError: the request is for somebody else, or the state it goes on from is not here.
        """
        id = self.place.client
        if request.client != id:
            raise UserError(f"a request for client {request.client} reached client {id}: is a number given twice?")
        self._scale(request.scaling)
        store = Store(self.place.state, request.run, id)
        self._load(store, request.state)
        store.settle(request.state, request.durable)
        answer = Answer(id, request.round.index)
        if request.shared is not None:
            shared = {name: tensor.to(self.place.device) for name, tensor in request.shared.items()}
            measured = self.evaluate(shared)
            answer = replace(answer, figures={view: Figures.of(metrics, id) for view, metrics in measured.items()})
        return self._train(request, answer, store) if request.train else answer

    def _load(self, store: Store, round: int) -> None:
        kept, memory, trained = store.load(round)
        device, client = self.place.device, self.workspace.clients[self.place.client]
        self.workspace.kept[client.id] = {name: tensor.to(device) for name, tensor in kept.items()}
        client.memory, client.trained = {name: tensor.to(device) for name, tensor in memory.items()}, trained

    def _train(self, request: Request, answer: Answer, store: Store) -> Answer:
        id = self.place.client
        transport = Transport(self.place.device, self.workspace.private)
        try:
            message = Message.from_bytes(request.train.to_bytes(), self.place.device)
            result = self.backend.train_one(id, message, request.round)
            if isinstance(result, NonFinite):
                raise result
            transport.send_up(id, result.reply)  # private or non-finite: it does not leave
        except (NonFinite, ClientError, BadMessage, RuntimeError) as error:
            return replace(answer, dropped=str(error))
        client = self.workspace.clients[id]
        store.save(request.round.index, self.workspace.kept[id], client.memory, client.trained)
        return replace(answer, reply=result.reply, loss=float(result.loss))
