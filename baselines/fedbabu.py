"""FedBABU: Oh, Kim and Yun, FedBABU: Toward Enhanced Representation for Federated Image Classification, ICLR 2022."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from baselines.fedavgft import FedAvgFT, FedAvgFTClient
from baselines.fedper import HEAD
from registry.interface import Batch, Message, Round, float_state, matches, outputs
from registry.messages import check_state
from registry.parameters import Params, option


@dataclass(frozen=True)
class FedBABUParams(Params):
    """Hyper-parameters of FedBABU; the authors train at 0.1, divided by ten twice, and fine-tune at the last 0.001."""

    finetune_rate: float = option(0.1, "learning rate of the fine-tuning, as a share of the round's", above=0)


class FedBABUClient(FedAvgFTClient):
    """Trains the body of the model under the initial head, and beside it fine-tunes a copy, body and head, to predict.

    The copy starts from the body received and the initial head in every round in which the client trains, and is
    trained on the same batches for as many epochs, at a rate of its own: body w and copy v take the steps

        w ← w − η ∇F(w),   v ← v − f η ∇F(v)

    with f `finetune_rate`. Until the client has trained, the model itself predicts.
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

    def update(
        self,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        rate: Tensor,
        step: Tensor,
        context: Mapping[str, Tensor],
    ) -> Mapping[str, Tensor]:
        """Return the body after a step at the round's rate, and the copy after one at its share of that rate."""
        return {
            "model": weights["model"] - rate * gradients["model"],
            "personal": weights["personal"] - self.params.finetune_rate * rate * gradients["personal"],
        }

    def reply(self) -> Message:
        """Return the body, with `samples`."""
        return Message(body(self.shared()), {"samples": self.samples})


class FedBABU(FedAvgFT):
    """Averages bodies that all are trained under the same, never trained head; clients fine-tune a copy to predict.

    The head is the initial one, which all derive from the seed, so that only bodies are sent. The paper fine-tunes the
    last global model, body and head, for some epochs before it is evaluated. Here a client fine-tunes the global model
    that it receives, for the epochs of a round, which doubles its work; between its rounds it predicts with the result.
    In the last round this is the paper's procedure, with the global model of the round before. The authors' rate falls
    to a hundredth by the end of training, at which they fine-tune; that of a run here hardly falls, so that fine-tuning
    has a share of it as its rate (`finetune_rate`). Clients take these steps of their own, of SGD, so that
    `--optimizer` is refused.
    """

    paper = "Oh et al. 2022, arXiv:2106.06042"
    sends = "model without head down and up; fine-tuned copy"
    Client = FedBABUClient
    Params = FedBABUParams
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
