"""FedAvgFT: Cheng, Chadha and Duchi, Fine-tuning in Federated Learning: a Simple but Tough-to-Beat Baseline, 2021."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from baselines.fedavg import FedAvg, FedAvgClient
from registry.interface import Message, Task, float_state
from registry.messages import check_state
from registry.tensors import of_net


class FedAvgFTClient(FedAvgClient):
    """Trains the global model as FedAvg does, and keeps the result, with which it predicts.

    Until the client has trained, the global model predicts.
    """

    kept = ("personal.*",)

    @classmethod
    def build(cls, task: Task) -> dict[str, nn.Module]:
        """Return the model, and a copy that no loss trains: `reply` fills it."""
        model = task.model()
        return {"model": model, "personal": copy.deepcopy(model)}

    def serves(self) -> str:
        """Return the name of the client's own model once it has trained; until then that of the global model."""
        return "personal" if self.trained else "model"

    def reply(self) -> Message:
        """Return the trained model, and keep a copy of it."""
        self.load(float_state({"personal": self.nets["model"]}))
        return self.trained_model()

    def trained_model(self) -> Message:
        """Return the trained model without what is private, and `samples`."""
        return Message(of_net("model", self.shared()), {"samples": self.samples})


class FedAvgFT(FedAvg):
    """Averages models as FedAvg does; each client predicts with the model of its own last local training.

    This is FedAvg with fine-tuning (FTFA) at no cost: local training from the global model is the fine-tuning, over as
    many epochs as a round has. The paper fine-tunes the last global model; here a client's model is fine-tuned from the
    global model of its own last round, so that predictions between rounds need no further training.
    """

    paper = "Cheng, Chadha and Duchi 2021, arXiv:2108.07313"
    sends = "model down, model up; own last training"
    Client = FedAvgFTClient

    def __init__(self, task: Task, params: Any, initial: Mapping[str, Tensor]) -> None:
        super().__init__(task, params, of_net("model", initial))

    def check_reply(self, client: int, reply: Message) -> None:
        """Require the model with `samples`."""
        check_state(reply, self.weights)
