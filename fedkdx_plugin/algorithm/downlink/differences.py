"""What each client's student lacks, compressed for it alone. An addition of this project, not the paper's.

The server's student is moved by the uncompressed average, and the server remembers what each client holds; so what one
message leaves out is part of the next (error feedback by construction; Philippenko & Dieuleveut 2021, arXiv:2102.12528,
keep the central model so). All begin with the student that the federation's seed gives, so that not even that must be
sent: the first message names its sums instead. Fewer bytes, for one model of memory a client on the server and one
decomposition a message.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fedkdx_plugin.algorithm.compression import compress_together
from fedkdx_plugin.algorithm.downlink.ends import VERSION, ClientEnd, ServerEnd, told
from fedkdx_plugin.algorithm.updates import State, difference, group, labelled, move
from registry.interface import BadMessage, Client, Message
from registry.tensors import copied

PENDING = "pending"
SAME_SUM = 1e-5  # of the sum of absolute values: initial weights may differ in their last bits between machines


class DifferencesServer(ServerEnd):
    """Makes each client's difference; remembers what each client is known to hold.

    Args:
        initial: the student that all clients begin with.
        quantise: send what is left of a matrix as 8-bit integers.
    """

    def __init__(self, initial: Mapping[str, Tensor], quantise: bool) -> None:
        self.initial, self.quantise = dict(initial), quantise
        self._held: dict[int, tuple[int, State]] = {}
        self._made: dict[int, tuple[int, State]] = {}  # client -> step and payload: not to be made twice

    def held(self, client: int) -> tuple[int, State]:
        """Return the step that a client is known to have been brought to, and what that made of its student."""
        return self._held.get(client, (0, self.initial))

    def message(self, client: int, weights: State, version: int, epsilon: float) -> Message:
        """Return the difference, the step it starts from, and to a client not heard of yet the sums of its student."""
        meta = {"since": self.held(client)[0]}
        if client not in self._held:
            meta["sums"] = sums(self.initial)
        return Message(self._payload(client, weights, version, epsilon), meta)

    def prepare(self, clients: Sequence[int], weights: State, version: int, epsilon: float) -> None:
        """Compress the differences of all these clients in one call."""
        missing = [client for client in clients if self._made.get(client, (-1, {}))[0] != version]
        behind = [self._behind(client, weights) for client in missing]
        for client, made in zip(missing, compress_together(behind, epsilon, self.quantise), strict=True):
            self._made[client] = version, made.payload

    def _payload(self, client: int, weights: State, version: int, epsilon: float) -> State:
        self.prepare([client], weights, version, epsilon)
        return self._made[client][1]

    def _behind(self, client: int, weights: State) -> State:
        return difference(self.held(client)[1], weights)

    def step(
        self, weights: State, version: int, epsilon: float, change: State, rate: float, replied: Iterable[int]
    ) -> tuple[State, list[dict[str, float | Tensor]]]:
        """Move the student by the whole mean; note of all who replied what their difference made of theirs."""
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
        """Return what each client holds."""
        tensors = {}
        for client, (_, student) in self._held.items():
            tensors |= labelled(student, client)
        return Message(tensors, {"held": [[client, step] for client, (step, _) in sorted(self._held.items())]})

    def restore(self, saved: Message) -> None:
        """Become what `save` described."""
        self._held = {client: (step, group(saved.tensors, client)) for client, step in saved.meta["held"]}
        self._made.clear()


class DifferencesClient(ClientEnd):
    """Adds the difference to the student it holds; remembers that student's step, and the last difference as pending.

    A client cannot know whether its reply arrived. It keeps the student that the last message started from, and the
    message; the next one says from which of the two the server goes on.
    """

    def receive(self, client: Client, message: Message) -> State:
        """Bring the student to what the difference makes of it; after training it goes back to where that started."""
        version, since = message.meta[VERSION], message.meta["since"]
        self._settle(client, since, message.meta.get("sums"))
        memory = {name: tensor for name, tensor in client.memory.items() if not name.startswith(PENDING)}
        base = copied(client.shared())
        move(client.shared(), message.tensors, 1.0)
        pending = {PENDING: torch.tensor(version)} | labelled(message.tensors, PENDING)
        client.memory = memory | {VERSION: torch.tensor(since)} | pending
        return base

    def _settle(self, client: Client, since: int, initial: Mapping[str, float] | None) -> None:
        """Become the student that the server knows of: with the last difference where that counted, else without.

        One that the server has had no reply of is still at its first student, whose sums it is told.
        """
        held = {name: int(client.memory[name]) for name in (VERSION, PENDING) if name in client.memory}
        if initial is not None and VERSION not in held:
            self._check_initial(client, initial)
        elif held.get(PENDING) == since:
            move(client.shared(), group(client.memory, PENDING), 1.0)
        elif held.get(VERSION) != since:
            has = " and ".join(map(str, held.values())) or "none"
            raise BadMessage(
                f"client {client.id}: students held are of steps {has}, the server's difference of {since}"
            )

    @staticmethod
    def _check_initial(client: Client, sums: Mapping[str, float]) -> None:
        for name, tensor in client.shared().items():
            off = abs(float(tensor.double().sum()) - sums.get(name, math.nan))
            if not off <= SAME_SUM * (1 + float(tensor.double().abs().sum())):
                raise BadMessage(f"client {client.id}: '{name}' does not begin as the server's: another seed or model?")


def sums(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Return name -> sum of all values: enough to tell one seed's student from another's."""
    return {name: float(tensor.double().sum()) for name, tensor in tensors.items()}
