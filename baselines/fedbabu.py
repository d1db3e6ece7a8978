"""FedBABU: Oh, Kim and Yun, FedBABU: Toward Enhanced Representation for Federated Image Classification, ICLR 2022."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from baselines.fedavgft import FedAvgFT, FedAvgFTClient
from baselines.fedper import HEAD
from registry.interface import Batch, Message, Round, float_state, matches, outputs
from registry.messages import check_state


class FedBABUClient(FedAvgFTClient):
    """Trains the body of the model under the initial head, and beside it fine-tunes a copy, body and head, to predict.

    The copy starts from the body received and the initial head in every round in which the client trains, and is
    trained on the same batches for as many epochs. Until the client has trained, the model itself predicts.
    """

    windows_meet = ""

    def trains(self, epoch: int, epochs: int) -> Sequence[str]:
        """Return all but the model's head."""
        return ("*", f"!{HEAD}")

    def receive(self, message: Message) -> None:
        """Install the body received in the model, and the whole model in the copy."""
        super().receive(message)
        self.load(float_state({"personal": self.nets["model"]}))

    def losses(
        self, nets: Mapping[str, Callable[[Tensor], Any]], batch: Batch, context: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the cross-entropy of both."""
        model, personal = outputs(nets, batch.x, "model", "personal")
        return {
            "model": batch.cross_entropy(model.logits),
            "personal": batch.cross_entropy(personal.logits),
        }

    def reply(self) -> Message:
        """Return the body, with `samples`."""
        return Message(body(self.shared()), {"samples": self.samples})


class FedBABU(FedAvgFT):
    """Averages bodies that all are trained under the same, never trained head; clients fine-tune a copy to predict.

    The head is the initial one, which all derive from the seed, so that only bodies are sent. The paper fine-tunes the
    last global model, body and head, for some epochs before it is evaluated. Here a client fine-tunes the global model
    that it receives, for the epochs of a round, which doubles its work; between its rounds it predicts with the result.
    In the last round this is the paper's procedure, with the global model of the round before.
    """

    paper = "Oh et al. 2022, arXiv:2106.06042"
    sends = "model without head down and up; fine-tuned copy"
    Client = FedBABUClient
    beyond_average = ""
    sums = True

    def message(self, client: int, round: Round) -> Message:
        """Return the body."""
        return Message(body(self.weights))

    def check_reply(self, client: int, reply: Message) -> None:
        """Require a body with `samples`."""
        check_state(reply, body(self.weights))

    def aggregate(self, replies: Mapping[int, Message], round: Round) -> None:
        """Replace the body by the mean."""
        before = self.weights
        self.weights = body(before)
        super().aggregate(replies, round)
        self.weights = before | self.weights


def body(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of the model without its head, by full name."""
    return {name: tensor for name, tensor in state.items() if matches(name, ("model.*", f"!{HEAD}"))}
