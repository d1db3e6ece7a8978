"""A site: its own shards, its private state on its own disk, and the engine's work for its client."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dataset_utils import shards
from dataset_utils.files import check_listable, is_file, private_files, replacing, unwritable
from dataset_utils.scaling import Statistics
from dataset_utils.sealed import Sealed
from dataset_utils.shards import Shard
from fedkdx_plugin.engine import scaling
from fedkdx_plugin.engine.backends.base import Trained
from fedkdx_plugin.engine.backends.sequential import Sequential
from fedkdx_plugin.engine.data import DeviceData, memory_format
from fedkdx_plugin.engine.protection import private_reply, protection
from fedkdx_plugin.engine.training import ClientError, Settings
from fedkdx_plugin.engine.transport import Transport
from fedkdx_plugin.engine.workspace import Workspace
from fedkdx_plugin.flower.protocol import Announcement, Answer, ClientMetrics, Request
from fedkdx_plugin.privacy.accounting import Sampling
from fedkdx_plugin.privacy.noise import SecretNoise
from registry import __version__
from registry.errors import UserError
from registry.interface import BadMessage, Client, Message, NonFinite, Round, Server, Task
from registry.text import is_plain_name, shown

ENDING = ".safetensors"


@dataclass(frozen=True)
class SiteSetup:
    """What a site decides by itself; nothing of it comes from the server.

    Attributes:
        client: its number in the federation, from 0.
        folder: the folder of shards.
        shard: number of its own shard in that folder.
        state: the folder of its private state.
        device: the device it computes on.
        secure: it sends its update masked or not at all (see `secure`).
    """

    client: int
    folder: Path
    shard: int
    state: Path
    device: torch.device
    secure: bool = False

    def write(self, path: Path) -> None:
        """Write it to a file, for the site's processes."""
        own = {**vars(self), "folder": self.folder.absolute(), "state": self.state.absolute()}
        with replacing(path) as part:
            part.write_text(json.dumps(own, default=str) + "\n", encoding="utf-8")

    @staticmethod
    def read(path: Path) -> SiteSetup:
        """Read what `write` wrote."""
        own = json.loads(path.read_text(encoding="utf-8"))
        paths = {name: Path(own[name]) for name in ("folder", "state")}
        return SiteSetup(**own | paths | {"device": torch.device(own["device"])})


class LocalData:
    """A site's windows, read from its disk.

    Raises:
        UserError: they cannot be read.
    """

    def __init__(self, setup: SiteSetup) -> None:
        self.setup = setup
        self.manifest, self.train, self.test = shards.load_client(setup.folder, setup.shard)

    def announcement(self) -> Announcement:
        """Return what the site tells the server about them."""
        channels, one, time = self.manifest["shape"]
        return Announcement(
            client=self.setup.client,
            samples=len(self.train.y),
            tests=len(self.test.y),
            shape=(channels, one, time),
            classes=self.class_names,
            data=self.manifest["name"],
            evaluated_on=shards.evaluated_on(self.manifest),
            scale=shards.scale_of(self.manifest),
            statistics=shards.statistics_of(self.manifest, self.setup.shard),
            versions={"fedkdx": __version__, "torch": torch.__version__, "python": platform.python_version()},
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in order."""
        return tuple(self.manifest["classes"])

    def facts(self) -> dict[str, Any]:
        """Return the facts about the data that a model records with its environment, as `ShardSet.facts` does."""
        digest = hashlib.sha256(shards.manifest_text(self.manifest).encode()).hexdigest()
        return shards.facts(self.manifest, self.setup.folder, digest)

    def on_device(self, clients: int) -> DeviceData:
        """Return the federation's data as this site sees them: its own windows, and none of the other clients.

        Args:
            clients: number of clients of the federation.
        """
        own, device = self.setup.client, self.setup.device

        def windows(shard: Shard) -> tuple[Tensor, Tensor]:
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


class States(Protocol):
    """One client's private state of one run, after each round in which it trained (see `StateFolder`)."""

    def load(self, round: int) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
        """Return the tensors a client kept, its memory, and how often it had trained, after a round (0: nothing)."""

    def save(self, round: int, kept: dict[str, Tensor], memory: dict[str, Tensor], trained: int) -> None:
        """Keep the state after a round."""

    def settle(self, accepted: int, durable: int) -> None:
        """Delete the states that no request can name any more."""


class StateFolder:
    """Keeps one client's private state of one run on disk: a file for each round in which the client trained.

    The state of a round is written before the reply leaves the site, but it counts only once the server says that the
    reply arrived. So a reply that was lost or late leaves no trace, and a server that went back to its checkpoint
    finds the state that belongs to it.

    Args:
        folder: the site's folder for private state; readable by its owner alone.
        run: name of the run.
        client: the client's number.

    Raises:
        UserError: the run's name, which comes from the server, cannot name a folder on any system; or the folder cannot
            be made.
    """

    def __init__(self, folder: Path, run: str, client: int) -> None:
        if not is_plain_name(run):
            raise UserError(f"a run cannot be called {shown(repr(run))}: each site makes a folder of its name")
        self.folder = folder / run / f"client-{client}"
        self.advice = "put a copy of the site's --state folder back, or begin a new federation"
        try:
            with private_files():
                self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(self.folder, error) from error

    def rounds(self) -> list[int]:
        """Return the rounds whose state is there, ascending."""
        check_listable(self.folder)
        return sorted(int(path.stem) for path in self.folder.glob(f"*{ENDING}") if path.stem.isdecimal())

    def load(self, round: int) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
        """Return the tensors a client kept, its memory, and how often it had trained, after a round (0: nothing).

        Raises:
            UserError: the state of that round is missing or damaged, or of another run, client or round.
        """
        if not round:
            return {}, {}, 0
        path = self.folder / _name(round)
        if not is_file(path):
            there = ", ".join(map(str, self.rounds())) or "none"
            raise UserError(
                f"{path}: missing; the server goes on from round {round}, this site has state of rounds: {there}; "
                f"{self.advice}"
            )
        try:
            saved = Message.from_bytes(self._sealed(round).read(_name(round)))
            parts = {
                part: {n.removeprefix(part): t for n, t in saved.tensors.items() if n.startswith(part)}
                for part in ("kept/", "memory/")
            }
            if saved.meta["of"] != self._of(round):
                raise UserError(f"{path}: is of {saved.meta['of']}, not {self._of(round)}; {self.advice}")
            return parts["kept/"], parts["memory/"], int(saved.meta["trained"])
        except (BadMessage, KeyError) as error:
            raise UserError(f"{path}: damaged ({error}); {self.advice}") from error

    def save(self, round: int, kept: dict[str, Tensor], memory: dict[str, Tensor], trained: int) -> None:
        """Write the state after a round. Raises UserError."""
        tensors = {f"kept/{name}": tensor for name, tensor in kept.items()}
        tensors |= {f"memory/{name}": tensor for name, tensor in memory.items()}
        meta = {"trained": trained, "of": self._of(round)}
        with private_files():
            self._sealed(round).write({_name(round): Message(tensors, meta).to_bytes()})

    def settle(self, accepted: int, durable: int) -> None:
        """Delete the states that no request can name any more.

        These are the states after the last round whose reply arrived, and, of those that the server's checkpoint
        covers, all but the newest.

        Args:
            accepted: round of the last reply that reached the server.
            durable: last round on the server's disk.
        """
        rounds = self.rounds()
        base = max((round for round in rounds if round <= min(accepted, durable)), default=0)
        left = [_name(round) for round in rounds if round > accepted or round < base]
        if left:
            Sealed(self.folder, self.advice).remove(*left)

    def _sealed(self, round: int) -> Sealed:
        return Sealed(self.folder, self.advice, [_name(round)])

    def _of(self, round: int) -> str:
        return f"{self.folder.parent.name}, {self.folder.name}, round {round}"


def _name(round: int) -> str:
    return f"{round}{ENDING}"


class Site:
    """Does the work of one client with the code that works in one process, on this site's windows alone.

    Args:
        setup: what the site decides by itself.
        algorithm, task, params, settings: as of `engine.rounds.Federation`.
        data: the site's windows.
        clients: number of clients of the federation.
        keep: keeps what predicting with the state that was measured needs, from the request, what the client kept of
            its networks, and the client (see `keeping.Keeper`); None: nobody predicts with it later.

    Raises:
        UserError: the federation has no client of this number.
    """

    def __init__(
        self,
        setup: SiteSetup,
        algorithm: type[Server],
        task: Task,
        params: Any,
        settings: Settings,
        data: LocalData,
        clients: int,
        keep: Callable[[Request, dict[str, Tensor], Client], None] | None = None,
    ) -> None:
        if setup.client >= clients:
            raise UserError(
                f"client {setup.client}: the federation has 0 to {clients - 1}; give one of these as --client"
            )
        self.setup, self.settings, self.algorithm, self.keep = setup, settings, algorithm, keep
        self.data, self.common = data.on_device(clients), data.announcement().statistics is not None
        samples = [len(y) for y in self.data.train_y]
        task = replace(task, seed=settings.seed, params=params)
        self.workspace = Workspace(algorithm, task, params, samples, settings.seed, setup.device)
        self._begin(self.data)

    def _begin(self, data: DeviceData) -> None:
        """Train and measure on these windows from now on."""
        self.backend = Sequential(self.workspace, data, self.settings)
        self.evaluate = self.backend.evaluator()

    def _scale(self, pooled: Statistics | None) -> None:
        """Scale the windows by what all sites have in common.

        Args:
            pooled: statistics that the server sent; None where the windows are scaled already.

        Raises:
            UserError: the server and this site differ on whether, or in how many channels, windows are to be scaled.
        """
        if (pooled is not None) != self.common:
            raise UserError(
                "the server and this site do not agree on whether windows are still to be scaled; make this site's "
                "shards with the --scale of the other sites"
            )
        if pooled is None:
            return
        if len(pooled.mean) != self.data.test_x.shape[1]:
            raise UserError(
                f"the server scales {len(pooled.mean)} channels, this site's windows have {self.data.test_x.shape[1]}; "
                "make the shards with the channels of the other sites"
            )
        self._begin(scaling.apply(self.data, pooled))

    def handle(self, request: Request) -> Answer:
        """Measure the state after the last round, then train, as far as either is asked for.

        What was measured, and the private state of the round, are kept before the answer is returned.

        Raises:
            UserError: the request is for another client, or the private state it goes on from is missing.
        """
        id = self.setup.client
        if request.client != id:
            raise UserError(f"a request for client {request.client} reached client {id}: do two sites join as one?")
        self._scale(request.scaling)
        folder = self._states(request.run)
        self._load(folder, request.state)
        folder.settle(request.state, request.durable)
        answer = Answer(id, request.round.index)
        if request.shared is not None:
            shared = {name: tensor.to(self.setup.device) for name, tensor in request.shared.items()}
            measured = self.evaluate(shared)
            answer = replace(answer, metrics={view: ClientMetrics.of(own, id) for view, own in measured.items()})
            if self.keep:
                self.keep(request, self.workspace.kept[id], self.workspace.clients[id])
        return self._train(request.train, request.round, answer, folder) if request.train else answer

    def _states(self, run: str) -> States:
        """Return where this client's private state of a run is kept."""
        return StateFolder(self.setup.state, run, self.setup.client)

    def _load(self, folder: States, round: int) -> None:
        kept, memory, trained = folder.load(round)
        device, client = self.setup.device, self.workspace.clients[self.setup.client]
        self.workspace.kept[client.id] = {name: tensor.to(device) for name, tensor in kept.items()}
        client.memory, client.trained = {name: tensor.to(device) for name, tensor in memory.items()}, trained

    def _train(self, sent: Message, round: Round, answer: Answer, folder: States) -> Answer:
        id = self.setup.client
        transport = Transport(self.setup.device, self.workspace.private)
        try:
            message = Message.from_bytes(sent.to_bytes(), self.setup.device)
            result = self._noised(self.backend.train_one(id, message, round), message, round)
            if isinstance(result, NonFinite):
                raise result
            transport.send_up(id, result.reply)  # raises where a tensor is private or not finite
        except (NonFinite, ClientError, BadMessage, RuntimeError) as error:
            return replace(answer, dropped=str(error))
        client = self.workspace.clients[id]
        folder.save(round.index, self.workspace.kept[id], client.memory, client.trained)
        return replace(answer, reply=result.reply, loss=float(result.loss))

    def _noised(self, result: Trained | NonFinite, sent: Message, round: Round) -> Trained | NonFinite:
        """Return a result with this site's share of the noise, where the sites add it and all of them take part."""
        everybody = Sampling(len(self.workspace.clients), len(self.workspace.clients))
        kept = protection(self.settings.privacy, self.algorithm, everybody, round.total, SecretNoise())
        if not kept or not kept.distributed:
            return result
        kept.begin(round.index)
        id = self.setup.client
        reply = None if isinstance(result, NonFinite) else result.reply
        private = private_reply(kept, id, sent, reply)
        return Trained(private, torch.zeros(()) if isinstance(result, NonFinite) else result.loss)
