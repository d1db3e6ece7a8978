"""Clients that have other networks beside the model that is averaged, and a server that knows this model alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from baselines.fedavg import FedAvg, FedAvgClient
from registry.interface import Message, Task
from registry.messages import check_state
from registry.tensors import of_net

MODEL, GLOBAL, PERSONAL = "model.", "global.", "personal."


class BesideClient(FedAvgClient):
    """Sends its model, and none of the networks beside it."""

    windows_meet = ""

    def reply(self) -> Message:
        """Return the trained model with `samples`."""
        return Message(of_model(self.shared()), {"samples": self.samples})


class GuidedClient(BesideClient):
    """Trains its model beside the global one, a fixed network that is neither kept nor sent.

    It is set again in each round. A subclass may name further copies in `frozen`, which `receive` must fill.
    """

    frozen: ClassVar[tuple[str, ...]] = ("global",)
    windows_meet: ClassVar[str] = ""

    @classmethod
    def build(cls, task: Task) -> dict[str, nn.Module]:
        """Return the model, and a copy for each name in `frozen`."""
        model = task.model()
        return {"model": model, **{name: copy.deepcopy(model) for name in cls.frozen}}

    def receive(self, message: Message) -> None:
        """Start from the global model; with local batch norm both have the client's."""
        self.load(message.tensors)
        self.load(renamed(of_model(self.state()), GLOBAL))


class PersonalClient(BesideClient):
    """Has a personal model beside the shared one, which it keeps, and which predicts once the client has trained."""

    kept: ClassVar[tuple[str, ...]] = ("personal.*",)
    windows_meet: ClassVar[str] = ""

    @classmethod
    def build(cls, task: Task) -> dict[str, nn.Module]:
        """Return the shared model, and the personal one, which starts as a copy."""
        model = task.model()
        return {"model": model, "personal": copy.deepcopy(model)}

    def serves(self) -> str:
        """Return the name of the personal model once the client has trained; until then that of the shared one."""
        return "personal" if self.trained else "model"


class Beside(FedAvg):
    """Averages models as FedAvg does; of the initial state it has the model alone."""

    def __init__(self, task: Task, params: Any, initial: Mapping[str, Tensor]) -> None:
        super().__init__(task, params, of_model(initial))

    def check_reply(self, client: int, reply: Message) -> None:
        """Require the model with `samples`, without the networks beside it."""
        check_state(reply, self.weights)


def of_model(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of the model that is averaged, by full name."""
    return of_net("model", state)


def renamed(model: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the model's state under the names of another network of its kind."""
    return {prefix + name.removeprefix(MODEL): tensor for name, tensor in model.items()}
