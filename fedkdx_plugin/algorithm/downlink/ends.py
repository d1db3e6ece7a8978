"""Interfaces of the two ends of a downlink: the server's and the client's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from fedkdx_plugin.algorithm.measures import energy_kept, rank_share
from fedkdx_plugin.algorithm.updates import State, size
from registry.interface import Client, Message

VERSION = "version"  # in messages and in a client's memory: number of steps that a student has made
METRICS = ("rank_share", "energy_kept", "bytes_share")


class ServerEnd(ABC):
    """Server's end. It knows the state of a client only from the client's replies."""

    def prepare(  # noqa: B027 (may be overridden, need not)
        self, clients: Sequence[int], weights: State, version: int, epsilon: float
    ) -> None:
        """Prepare the messages of several clients together; by default do nothing."""

    @abstractmethod
    def message(self, client: int, weights: State, version: int, epsilon: float) -> Message:
        """Return the message that updates the student of `client` to `weights`, after step `version`."""

    @abstractmethod
    def step(
        self, weights: State, version: int, epsilon: float, change: State, rate: float, replied: Iterable[int]
    ) -> tuple[State, list[dict[str, float | Tensor]]]:
        """Return the student after a round, W - `change` up to compression, and the `METRICS` of each payload.

        Args:
            weights, version, epsilon: arguments with which the round's messages were made.
            change: mean over the clients of W^t - W_k.
            rate: mean of their learning rates.
            replied: clients whose replies are in the mean; they hold the student that their message led to.
        """

    @abstractmethod
    def save(self) -> Message:
        """Return all state needed to continue after a restart."""

    @abstractmethod
    def restore(self, saved: Message) -> None:
        """Restore what `save` returned."""


class ClientEnd(ABC):
    """Client's end. Its state is in the client's `memory`."""

    @abstractmethod
    def receive(self, client: Client, message: Message) -> State:
        """Update a client's student as the server's message says.

        Returns:
            The student to restore after training, from which the next message starts.

        Raises:
            BadMessage: the message starts from another student than this client's, or does not fit it.
        """


def compression_metrics(payload: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
    """Return the `METRICS` of a payload made of `whole`: mean R / min(P, Q), shares of the energy and the bytes."""
    shapes = {name: tensor.shape for name, tensor in whole.items()}
    values = rank_share(payload, shapes), energy_kept(payload, whole), size(payload) / size(whole)
    return dict(zip(METRICS, values, strict=True))
