"""Downlink of differences between a client's student and the server's. An addition of this project, not the paper's.

The server's student takes the uncompressed mean update, and the server stores the student that each client holds, so
what one message leaves out is part of the next (error feedback by construction; Philippenko & Dieuleveut 2021,
arXiv:2102.12528, treat the central model in this way). All start with the student that follows from the federation's
seed, so it is not sent: the first message has the sums of its tensors instead, as a check. Compared to the broadcast,
this takes fewer bytes, but memory for one model for each client on the server, and one decomposition for each message.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedkdx_plugin.algorithm.compression import compress_together
from fedkdx_plugin.algorithm.downlink.ends import VERSION, ClientEnd, ServerEnd, compression_metrics
from fedkdx_plugin.algorithm.updates import State, difference, group, labelled, move
from registry.interface import BadMessage, Client, Message
from registry.tensors import copied

PENDING = "pending"
SAME_SUM = 1e-5  # relative to the sum of absolute values; initial weights may differ in the last bits between machines


class DifferencesServer(ServerEnd):
    """Makes each client's difference; stores the student that each client is known to hold.

    Args:
        initial: the student with which all clients start.
        quantise: whether factors are sent as 8-bit integers.
    """

    def __init__(self, initial: Mapping[str, Tensor], quantise: bool) -> None:
        self.initial, self.quantise = dict(initial), quantise
        self._held: dict[int, tuple[int, State]] = {}
        # client -> (step, ε) and the payload, so that none is made twice; after a round without replies ε is another
        self._made: dict[int, tuple[tuple[int, float], State]] = {}

    def held(self, client: int) -> tuple[int, State]:
        """Return the last step that a client is known to have received, and the student that it then holds."""
        return self._held.get(client, (0, self.initial))

    def message(self, client: int, weights: State, version: int, epsilon: float) -> Message:
        """Return the difference, the step it starts from, and for a client without replies the sums of its student."""
        meta: dict[str, Any] = {"since": self.held(client)[0]}
        if client not in self._held:
            meta["sums"] = sums(self.initial)
        return Message(self._payload(client, weights, version, epsilon), meta)

    def prepare(self, clients: Sequence[int], weights: State, version: int, epsilon: float) -> None:
        """Compress the differences of several clients in one call."""
        of = version, epsilon
        missing = [client for client in clients if client not in self._made or self._made[client][0] != of]
        behind = [self._behind(client, weights) for client in missing]
        for client, made in zip(missing, compress_together(behind, epsilon, self.quantise), strict=True):
            self._made[client] = of, made.payload

    def _payload(self, client: int, weights: State, version: int, epsilon: float) -> State:
        """Return the payload for a client."""
        self.prepare([client], weights, version, epsilon)
        return self._made[client][1]

    def _behind(self, client: int, weights: State) -> State:
        """Return the student that a client holds minus the server's."""
        return difference(self.held(client)[1], weights)

    def step(
        self, weights: State, version: int, epsilon: float, change: State, rate: float, replied: Iterable[int]
    ) -> tuple[State, list[dict[str, float | Tensor]]]:
        """Apply the whole mean update, and store the students that the clients that replied now hold."""
        metrics = []
        for client in replied:
            payload = self._payload(client, weights, version, epsilon)
            metrics.append(compression_metrics(payload, self._behind(client, weights)))
            student = copied(self.held(client)[1])
            move(student, payload, 1.0)
            self._held[client] = version, student
        self._made.clear()
        return difference(weights, change), metrics

    def save(self) -> Message:
        """Return the student that each client holds."""
        tensors: State = {}
        for client, (_, student) in self._held.items():
            tensors |= labelled(student, client)
        return Message(tensors, {"held": [[client, step] for client, (step, _) in sorted(self._held.items())]})

    def restore(self, saved: Message) -> None:
        """Restore what `save` returned."""
        self._held = {client: (step, group(saved.tensors, client)) for client, step in saved.meta["held"]}
        self._made.clear()


class DifferencesClient(ClientEnd):
    """Applies the difference to its student; stores the step of that student, and the last difference as pending.

    A client does not know whether its reply arrived. It keeps the student from which the last message started, and that
    message; the next message says from which of the two students it starts.
    """

    def receive(self, client: Client, message: Message) -> State:
        """Apply the difference to the student, and return the student before it, to be restored after training."""
        version, since = message.meta[VERSION], message.meta["since"]
        self._settle(client, since, message.meta.get("sums"))
        memory = {name: tensor for name, tensor in client.memory.items() if not name.startswith(PENDING)}
        base = copied(client.shared())
        move(client.shared(), message.tensors, 1.0)
        pending = {PENDING: torch.tensor(version)} | labelled(message.tensors, PENDING)
        client.memory = memory | {VERSION: torch.tensor(since)} | pending
        return base

    def _settle(self, client: Client, since: int, initial: Mapping[str, float] | None) -> None:
        """Set the student from which the message starts: apply the pending difference if the server counted it.

        A client from which the server has no reply still has its initial student, which is checked against `initial`.
        """
        held = {name: int(client.memory[name]) for name in (VERSION, PENDING) if name in client.memory}
        if initial is not None and VERSION not in held:
            self._check_initial(client, initial)
        elif held.get(PENDING) == since:
            move(client.shared(), group(client.memory, PENDING), 1.0)
        elif held.get(VERSION) != since:
            has = " and ".join(map(str, held.values())) or "none"
            raise BadMessage(
                f"client {client.id}: students held are of steps {has}, but the server's difference starts at {since}"
            )

    @staticmethod
    def _check_initial(client: Client, sums: Mapping[str, float]) -> None:
        """Raise BadMessage if the sums of the initial student differ from the server's."""
        for name, tensor in client.shared().items():
            off = abs(float(tensor.double().sum()) - sums.get(name, math.nan))
            if not off <= SAME_SUM * (1 + float(tensor.double().abs().sum())):
                raise BadMessage(
                    f"client {client.id}: initial '{name}' differs from the server's; use the same seed and model"
                )


def sums(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Return name -> sum of all values, by which students of different seeds can be distinguished."""
    return {name: float(tensor.double().sum()) for name, tensor in tensors.items()}
