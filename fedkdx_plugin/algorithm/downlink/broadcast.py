"""Every step of the student, compressed once for all clients: eq. 2 to the letter.

The averaged update is compressed once, the server moves its own student by what it is about to send, and on contact a
client is told all steps it missed. All hold the very same student. Whoever trains in two rounds of five still hears of
all five.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedkdx_plugin.algorithm.downlink.ends import VERSION, ClientEnd, ServerEnd, told
from fedkdx_plugin.algorithm.updates import Sender, State, group, labelled, move, size
from registry.interface import BadMessage, Client, Message
from registry.tensors import copied


@dataclass
class Step:
    """One movement of the student: W ← W - rate · decompress(payload)."""

    version: int
    rate: float
    payload: State = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Return the bytes sent."""
        return size(self.payload)


class BroadcastServer(Sender, ServerEnd):
    """Makes the steps and keeps the last ones, as many as the student has bytes; older clients get the whole student.

    Attributes:
        steps: the last steps, oldest first.
        synced: client -> the step that it is known to be at.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.synced: dict[int, int] = {}

    def message(self, client: int, weights: State, version: int, epsilon: float) -> Message:
        """Return the steps that a client missed, or the student where that is less or they are no longer known."""
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
        """Compress the mean update, move the student by what arrives of it, and keep it for `message`."""
        # one whose reply was lost may be ahead of what is noted here, never behind
        self.synced.update(dict.fromkeys(replied, version))
        gradient = self.gradient(change, rate)
        payload = self.compress([gradient], epsilon)[0].payload
        self.sent(gradient, payload, rate)
        moved = copied(weights)
        move(moved, payload, rate)
        self.steps.append(Step(version + 1, rate, payload))
        while sum(step.size for step in self.steps) > size(weights):
            del self.steps[0]
        return moved, [told(payload, gradient)]

    def save(self) -> Message:
        """Return the steps and who is at which."""
        tensors = {name: t for step in self.steps for name, t in labelled(step.payload, step.version).items()}
        rates = [[step.version, step.rate] for step in self.steps]
        return Message(tensors, {"synced": sorted(self.synced.items()), "rates": rates})

    def restore(self, saved: Message) -> None:
        """Become what `save` described."""
        self.synced = dict(map(tuple, saved.meta["synced"]))
        self.steps = [Step(version, rate, group(saved.tensors, version)) for version, rate in saved.meta["rates"]]


class BroadcastClient(ClientEnd):
    """Takes the steps it missed one after the other, or the whole student; remembers the step it is at."""

    def receive(self, client: Client, message: Message) -> State:
        """Bring the student to the server's, to which it goes back after training, too."""
        if "rates" in message.meta:
            self._catch_up(client, message)
        else:
            client.load(message.tensors)
        client.memory = client.memory | {VERSION: torch.tensor(message.meta[VERSION])}
        return copied(client.shared())

    @staticmethod
    def _catch_up(client: Client, message: Message) -> None:
        own = int(client.memory[VERSION]) if VERSION in client.memory else None
        if own is None or own < message.meta["since"]:
            raise BadMessage(
                f"client {client.id}: student is at step {own}, the server's steps start at {message.meta['since']}"
            )
        for version, rate in message.meta["rates"]:
            if version > own:
                move(client.shared(), group(message.tensors, version), rate)
