"""The two ends of a downlink: what the server and a client do, and what each must remember."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from fedkdx_plugin.algorithm.compression import energy_kept, rank_share
from fedkdx_plugin.algorithm.updates import State, size
from registry.interface import Client, Message

VERSION = "version"  # in messages and in a client's memory: the step that a student is at
FIGURES = ("rank_share", "energy_kept", "bytes_share")


class ServerEnd(ABC):
    """The server's end. What is known of a client is learnt from its replies alone."""

    def prepare(  # noqa: B027 (may be overridden, need not)
        self, clients: Sequence[int], weights: State, version: int, epsilon: float
    ) -> None:
        """Make what `message` will need for all of these clients, at once; by default there is nothing to make."""

    @abstractmethod
    def message(self, client: int, weights: State, version: int, epsilon: float) -> Message:
        """Return what brings `client` to the student `weights`, which is at step `version`."""

    @abstractmethod
    def step(
        self, weights: State, version: int, epsilon: float, change: State, rate: float, replied: Iterable[int]
    ) -> tuple[State, list[dict[str, float | Tensor]]]:
        """Return the student after a round, W - `change` as far as it is told, and `FIGURES` of each payload made.

        Args:
            weights, version, epsilon: what the round's messages were made of.
            change: mean over the clients of W^t - W_k.
            rate: mean of their learning rates.
            replied: whose replies are in the mean: they hold what their message brought them to.
        """

    @abstractmethod
    def save(self) -> Message:
        """Return all that must be remembered over a restart."""

    @abstractmethod
    def restore(self, saved: Message) -> None:
        """Become what `save` described."""


class ClientEnd(ABC):
    """A client's end. What it must remember lies in the client's `memory`."""

    @abstractmethod
    def receive(self, client: Client, message: Message) -> State:
        """Bring a client's student to what the server sent.

        Returns:
            The student to go back to after training, which the next message starts from.

        Raises:
            BadMessage: the message does not start from what this client holds, or does not fit it.
        """


def told(payload: Mapping[str, Tensor], whole: Mapping[str, Tensor]) -> dict[str, float | Tensor]:
    """Return, of a payload made of `whole`, mean R / min(P, Q), share of the energy kept, bytes as a share of dense."""
    shapes = {name: tensor.shape for name, tensor in whole.items()}
    figures = rank_share(payload, shapes), energy_kept(payload, whole), size(payload) / size(whole)
    return dict(zip(FIGURES, figures, strict=True))
