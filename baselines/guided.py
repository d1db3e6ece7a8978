"""Clients that train beside fixed copies of the global model, which their losses compare the own model with."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from baselines.fedavg import FedAvg, FedAvgClient
from registry.interface import Message, Task
from registry.messages import check_state

MODEL, GLOBAL = "model.", "global."


class GuidedClient(FedAvgClient):
    """Trains its model beside the global one, a fixed network that is neither kept nor sent.

    It is set again in each round. A subclass may name further copies in `frozen`, which `receive` must fill.
    """

    frozen: ClassVar[tuple[str, ...]] = ("global",)

    @classmethod
    def build(cls, task: Task) -> dict[str, nn.Module]:
        """Return the model, and a copy for each name in `frozen`."""
        model = task.model()
        return {"model": model, **{name: copy.deepcopy(model) for name in cls.frozen}}

    def receive(self, message: Message) -> None:
        """Start from the global model; with local batch norm both have the client's."""
        self.load(message.tensors)
        self.load({name.replace(MODEL, GLOBAL, 1): tensor for name, tensor in of_model(self.state()).items()})

    def reply(self) -> Message:
        """Return the trained model, without the copies."""
        return Message(of_model(self.shared()), {"samples": self.samples})


class Guided(FedAvg):
    """Averages models as FedAvg does; of the initial state it keeps the model alone, without its copies."""

    Client = GuidedClient

    def __init__(self, task: Task, params: Any, initial: Mapping[str, Tensor]) -> None:
        super().__init__(task, params, of_model(initial))

    def check_reply(self, client: int, reply: Message) -> None:
        """Require the model with `samples`, without its copies."""
        check_state(reply, self.weights)


def of_model(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of the trained model, by full name."""
    return {name: tensor for name, tensor in state.items() if name.startswith(MODEL)}
