"""Interface of backends, which do the selected clients' work and the forward passes of an evaluation."""

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
    """Result of a client's work in one round: its reply, and its mean training loss (a scalar on the device)."""

    reply: Message
    loss: Tensor


class Backend(ABC):
    """Backend. All backends give equal results to float tolerance, and each reproduces its own bits.

    Args:
        workspace: the networks, and the client state, which `train` updates.
        data: the shards on the device.
        settings: options of local training.
    """

    name: ClassVar[str]

    def __init__(self, workspace: Workspace, data: DeviceData, settings: Settings) -> None:
        self.workspace, self.data, self.settings = workspace, data, settings

    @abstractmethod
    def train(self, messages: Mapping[int, Message], round: Round) -> dict[int, Trained | NonFinite]:
        """Return each client's result, or why it was dropped; a dropped client keeps its state of before the round."""

    @abstractmethod
    def predict(self, net: str, predictions: Sequence[Prediction]) -> list[Tensor]:
        """Return the logits (n, classes) of one network in several states, each on some of the test windows."""

    def evaluator(self) -> Callable[[Mapping[str, Tensor]], dict[str, Metrics]]:
        """Return a function that evaluates shared state of the server; by default in this process, on `data`.

        Where windows lie elsewhere, it may return {} and bring the metrics later (see `flower.coordinator`).
        """
        return Evaluator(self.workspace, self.data, self.predict)

    def close(self) -> None:  # noqa: B027 - most backends have nothing to release
        """Release what the backend holds besides memory; by default nothing."""
