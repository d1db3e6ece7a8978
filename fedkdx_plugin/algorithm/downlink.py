"""Two ways to bring the server's student to clients that were away for some rounds.

`Broadcast` is eq. 2 to the letter: the averaged update is compressed once for all, the server moves its own student by
what it is about to send, and on contact a client is told all steps it missed. All hold the very same student. Whoever
trains in two rounds of five still hears of all five.

`Differences` compresses, for each client alone, what the server's student is ahead of the one that this client holds.
The server's own student is moved by the uncompressed average, and the server remembers what each client holds; so what
one message leaves out is part of the next (error feedback by construction; Philippenko & Dieuleveut 2021,
arXiv:2102.12528, keep the central model so). All begin with the student that the federation's seed gives, so that not
even that must be sent: the first message names its sums instead. Fewer bytes, for one model of memory a client on the
server and one decomposition a message.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedkdx_plugin.algorithm.compression import compress, compress_together, energy_kept, rank_share
from fedkdx_plugin.algorithm.updates import difference, group, labelled, move, owed, residual_of, size
from registry.interface import Message
from registry.tensors import copied

FIGURES = ("rank_share", "energy_kept", "bytes_share")

State = dict[str, Tensor]


class Downlink(ABC):
    """How the student gets to the clients. What is known of a client is learnt from its replies alone."""

    def prepare(  # noqa: B027 (may be overridden, need not)
        self, clients: Sequence[int], weights: State, version: int, epsilon: float
    ) -> None:
        """Make what `message` will need for all of these clients, at once; by default there is nothing to make."""

    @abstractmethod
    def message(self, client: int, weights: State, version: int, epsilon: float) -> Message:
        """What brings `client` to the student `weights`, which is at step `version`."""

    @abstractmethod
    def step(
        self, weights: State, version: int, epsilon: float, change: State, rate: float, replied: Iterable[int]
    ) -> tuple[State, list[dict[str, float | Tensor]]]:
        """The student after a round, W - `change` as far as it is told, and `FIGURES` of each payload made.

        Args:
            weights, version, epsilon: what the round's messages were made of.
            change: mean over the clients of W^t - W_k.
            rate: mean of their learning rates.
            replied: whose replies are in the mean: they hold what their message brought them to.
        """

    @abstractmethod
    def save(self) -> Message:
        """All that must be remembered over a restart."""

    @abstractmethod
    def restore(self, saved: Message) -> None:
        """Become what `save` described."""


@dataclass
class Step:
    """One movement of the student: W ← W - rate · decompress(payload)."""

    version: int
    rate: float
    payload: State = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes sent."""
        return size(self.payload)


class Broadcast(Downlink):
    """Every step, compressed once for all clients; the last ones are kept, as many as the student has bytes."""

    def __init__(self, params: Any, initial: Mapping[str, Tensor]) -> None:
        self.params = params
        self.steps: list[Step] = []
        self.synced: dict[int, int] = {}  # client -> the step it is known to be at
        self.residual: State = {}

    def message(self, client: int, weights: State, version: int, epsilon: float) -> Message:
        since = self.synced.get(client, -1)
        missed = [step for step in self.steps if step.version > since]
        if since < version - len(self.steps) or sum(step.size for step in missed) > size(weights):
            return Message(weights)
        tensors = {name: t for step in missed for name, t in labelled(step.payload, step.version).items()}
        rates = [[step.version, step.rate] for step in missed]
        return Message(tensors, {"since": since, "rates": rates})

    def step(
        self, weights: State, version: int, epsilon: float, change: State, rate: float, replied: Iterable[int]
    ) -> tuple[State, list[dict[str, float | Tensor]]]:
        # one whose reply was lost may be ahead of what is noted here, never behind
        self.synced.update(dict.fromkeys(replied, version))
        whole = owed(change, rate, self.residual)
        payload = compress(whole, epsilon, self.params.quantise).payload
        if self.params.error_feedback:
            self.residual = residual_of(whole, payload, rate)
        moved = copied(weights)
        move(moved, payload, rate)
        self.steps.append(Step(version + 1, rate, payload))
        while sum(step.size for step in self.steps) > size(weights):
            del self.steps[0]
        return moved, [told(payload, whole)]

    def save(self) -> Message:
        tensors = labelled(self.residual, "residual")
        for step in self.steps:
            tensors |= labelled(step.payload, step.version)
        return Message(
            tensors, {"synced": sorted(self.synced.items()), "rates": [[s.version, s.rate] for s in self.steps]}
        )

    def restore(self, saved: Message) -> None:
        self.residual = group(saved.tensors, "residual")
        self.synced = dict(map(tuple, saved.meta["synced"]))
        self.steps = [Step(version, rate, group(saved.tensors, version)) for version, rate in saved.meta["rates"]]


class Differences(Downlink):
    """What each client's student lacks, compressed for it alone."""

    def __init__(self, params: Any, initial: Mapping[str, Tensor]) -> None:
        self.params, self.initial = params, dict(initial)
        self._held: dict[int, tuple[int, State]] = {}
        self._made: dict[int, tuple[int, State]] = {}  # client -> step and payload: not to be made twice

    def held(self, client: int) -> tuple[int, State]:
        """The step that a client is known to have been brought to, and what that made of its student."""
        return self._held.get(client, (0, self.initial))

    def message(self, client: int, weights: State, version: int, epsilon: float) -> Message:
        meta = {"since": self.held(client)[0]}
        if client not in self._held:
            meta["sums"] = sums(self.initial)
        return Message(self._payload(client, weights, version, epsilon), meta)

    def prepare(self, clients: Sequence[int], weights: State, version: int, epsilon: float) -> None:
        missing = [client for client in clients if self._made.get(client, (-1, {}))[0] != version]
        behind = [self._behind(client, weights) for client in missing]
        for client, made in zip(missing, compress_together(behind, epsilon, self.params.quantise), strict=True):
            self._made[client] = version, made.payload

    def _payload(self, client: int, weights: State, version: int, epsilon: float) -> State:
        self.prepare([client], weights, version, epsilon)
        return self._made[client][1]

    def _behind(self, client: int, weights: State) -> State:
        return difference(self.held(client)[1], weights)

    def step(
        self, weights: State, version: int, epsilon: float, change: State, rate: float, replied: Iterable[int]
    ) -> tuple[State, list[dict[str, float | Tensor]]]:
        figures = []
        for client in replied:
            payload = self._payload(client, weights, version, epsilon)
            figures.append(told(payload, self._behind(client, weights)))
            student = copied(self.held(client)[1])
            move(student, payload, 1.0)
            self._held[client] = version, student
        self._made.clear()
        return difference(weights, change), figures

    def save(self) -> Message:
        tensors = {}
        for client, (_, student) in self._held.items():
            tensors |= labelled(student, client)
        return Message(tensors, {"held": [[client, step] for client, (step, _) in sorted(self._held.items())]})

    def restore(self, saved: Message) -> None:
        self._held = {client: (step, group(saved.tensors, client)) for client, step in saved.meta["held"]}
        self._made.clear()


def told(payload: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
    """Of a payload made of `whole`: mean R / min(P, Q), share of the energy kept, bytes as a share of dense."""
    shapes = {name: tensor.shape for name, tensor in whole.items()}
    figures = rank_share(payload, shapes), energy_kept(payload, whole), size(payload) / size(whole)
    return dict(zip(FIGURES, figures, strict=True))


def sums(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Name -> sum of all values: enough to tell one seed's student from another's."""
    return {name: float(tensor.double().sum()) for name, tensor in tensors.items()}
