"""Downlink of the paper (eq. 2): every step of the student, compressed once for all clients.

The averaged update is compressed once, the server applies the compressed update to its own student, and a selected
client receives all steps that it missed. All hold the same student. A client that trains in two rounds of five still
receives all five steps.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedkdx_plugin.algorithm.downlink.ends import VERSION, ClientEnd, ServerEnd, compression_metrics
from fedkdx_plugin.algorithm.updates import Sender, State, group, labelled, move, size
from registry.interface import BadMessage, Client, Message
from registry.tensors import copied


@dataclass
class Step:
    """One step of the student: W ← W - rate · decompress(payload)."""

    version: int
    rate: float
    payload: State = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Number of bytes of the payload."""
        return size(self.payload)


class BroadcastServer(Sender, ServerEnd):
    """Makes the steps and keeps the last ones, up to the student's own bytes; staler clients get the whole student.

    Attributes:
        steps: the last steps, oldest first.
        synced: client -> the last step that it is known to have received.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.synced: dict[int, int] = {}

    def message(self, client: int, weights: State, version: int, epsilon: float) -> Message:
        """Return the steps that a client missed, or the student if that has fewer bytes or a step is no longer kept."""
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
        """Compress the mean update, apply the compressed one to the student, and keep it for `message`."""
        # a client whose reply was lost may be ahead of what is stored here, never behind
        self.synced.update(dict.fromkeys(replied, version))
        gradient = self.gradient(change, rate)
        payload = self.compress([gradient], epsilon)[0].payload
        self.sent(gradient, payload, rate)
        moved = copied(weights)
        move(moved, payload, rate)
        self.steps.append(Step(version + 1, rate, payload))
        while sum(step.size for step in self.steps) > size(weights):
            del self.steps[0]
        return moved, [compression_metrics(payload, gradient)]

    def save(self) -> Message:
        """Return the steps, and the last step of each client."""
        tensors = {name: t for step in self.steps for name, t in labelled(step.payload, step.version).items()}
        rates = [[step.version, step.rate] for step in self.steps]
        return Message(tensors, {"synced": sorted(self.synced.items()), "rates": rates})

    def restore(self, saved: Message) -> None:
        """Restore what `save` returned."""
        self.synced = dict(map(tuple, saved.meta["synced"]))
        self.steps = [Step(version, rate, group(saved.tensors, version)) for version, rate in saved.meta["rates"]]


class BroadcastClient(ClientEnd):
    """Applies the steps it missed in order, or takes the whole student; stores the number of the last step."""

    def receive(self, client: Client, message: Message) -> State:
        """Update the student to the server's, and return a copy, to be restored after training."""
        if "rates" in message.meta:
            self._catch_up(client, message)
        else:
            client.load(message.tensors)
        client.memory = client.memory | {VERSION: torch.tensor(message.meta[VERSION])}
        return copied(client.shared())

    @staticmethod
    def _catch_up(client: Client, message: Message) -> None:
        """Apply the steps of a message that the client has not applied yet."""
        own = int(client.memory[VERSION]) if VERSION in client.memory else None
        if own is None or own < message.meta["since"]:
            raise BadMessage(
                f"client {client.id}: student is at step {own}, but the server's steps start at {message.meta['since']}"
            )
        for version, rate in message.meta["rates"]:
            if version > own:
                move(client.shared(), group(message.tensors, version), rate)
