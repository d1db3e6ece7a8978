"""Transport of messages within one process: each is copied, checked, and counted by its serialised size."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedkdx_plugin.engine.faults import Damage
from registry.interface import Message, NonFinite
from registry.messages import first_nonfinite


class Transport:
    """Transport that counts the bytes of messages.

    Args:
        device: device of received tensors.
        private: full names that must never be in a message.

    Attributes:
        up, down: bytes of the present round, from clients to server and from server to clients.
    """

    def __init__(self, device: torch.device, private: frozenset[str]) -> None:
        self.device, self.private = device, private
        self.up = self.down = 0
        self._last: tuple[Message, Message, int] | None = None

    def start_round(self) -> None:
        """Set the counters to 0."""
        self.up = self.down = 0
        self._last = None

    def send_down(self, message: Message) -> Message:
        """Send a message to a client; one that many clients receive is copied once and counted every time."""
        if self._last is None or not _same(self._last[0], message):
            self._last = message, message.copy(self.device), message.size()
        self.down += self._last[2]
        return self._last[1]

    def send_up(self, client: int, message: Message, damage: Damage | None = None) -> Message:
        """Send a reply to the server.

        Args:
            client: id of the sender.
            message: the reply.
            damage: damage to its bytes on the way; they are counted as they were sent.

        Raises:
            BadMessage: the bytes that arrive are no message.
            NonFinite: a tensor holds NaN or infinity; the text names client and tensor.
            RuntimeError: the reply holds private state.
        """
        self.check_private(client, message)
        self.up += message.size()
        arrived = Message.from_bytes(damage(message.to_bytes()), self.device) if damage else message.copy(self.device)
        check_finite(client, arrived.tensors)
        return arrived

    def check_private(self, client: int, message: Message) -> None:
        """Raise RuntimeError if a client's message holds private state."""
        leak = self.private & message.tensors.keys()
        if leak:
            raise RuntimeError(f"client {client}: private state in a message: {', '.join(sorted(leak))}")


def _same(one: Message, other: Message) -> bool:
    """Return whether two messages hold the same tensor objects and equal metadata."""
    return (
        one.meta == other.meta
        and one.tensors.keys() == other.tensors.keys()
        and all(tensor is other.tensors[name] for name, tensor in one.tensors.items())
    )


def check_finite(client: int, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise NonFinite, naming client and tensor, if a tensor holds NaN or infinity. Synchronises once."""
    if (name := first_nonfinite(tensors)) is not None:
        raise NonFinite(f"client {client}: {name} holds NaN or infinity")
