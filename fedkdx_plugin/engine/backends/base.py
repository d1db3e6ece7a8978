"""What a backend is: a way to do the selected clients' work and the forward passes of an evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.evaluation import Evaluator, Prediction
from fedkdx_plugin.engine.metrics import Metrics
from fedkdx_plugin.engine.training import Settings
from fedkdx_plugin.engine.workspace import Workspace
from registry.interface import Message, NonFinite, Round


@dataclass(frozen=True)
class Trained:
    """A client's work of one round: its reply, and its mean training loss (a scalar on the device)."""

    reply: Message
    loss: Tensor


class Backend(ABC):
    """Does clients' work. All backends give the same results to float tolerance, and each repeats its own bits.

    Args:
        workspace: the networks, and every client's state, which `train` brings up to date.
        data: the shards on the device.
        settings: how clients train.
    """

    name: ClassVar[str]

    def __init__(self, workspace: Workspace, data: DeviceData, settings: Settings) -> None:
        self.workspace, self.data, self.settings = workspace, data, settings

    @abstractmethod
    def train(self, messages: Mapping[int, Message], round: Round) -> dict[int, Trained | NonFinite]:
        """Each client's work, or why it was dropped; a dropped client stays as it was before the round."""

    @abstractmethod
    def predict(self, net: str, predictions: Sequence[Prediction]) -> list[Tensor]:
        """Logits (n, classes) of one network in several states, each on some of the test windows."""

    def evaluator(self) -> Callable[[Mapping[str, Tensor]], dict[str, Metrics]]:
        """Return what measures a state that the server would give every client: by default here, on the data it has.

        Where windows lie elsewhere, it may return {} and bring the metrics later (see `flower.coordinator`).
        """
        return Evaluator(self.workspace, self.data, self.predict)

    def close(self) -> None:  # noqa: B027 - most backends have nothing to give back
        """Give back what the backend holds beside memory; nothing by default."""
