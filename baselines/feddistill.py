"""FedDistill: Jeong et al., Federated Distillation and Augmentation under Non-IID Private Data, 2018.

This is the paper's federated distillation (Algorithm 1), without its augmentation, for which clients upload windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from baselines.local import LocalClient
from registry.interface import BadMessage, Batch, Message, Round, Server
from registry.messages import check_tensors
from registry.parameters import Params, hyper

OUTPUTS = "outputs"
ROUNDING = 1e-3  # by which probabilities may add up to more than 1
CHUNK = 512  # windows in a forward pass, which bounds the memory for a client with very many


@dataclass(frozen=True)
class FedDistillParams(Params):
    """Hyper-parameters of FedDistill; the paper names γ but gives no value."""

    gamma: float = hyper(1.0, "weight γ of the distillation term", low=0)


class FedDistillClient(LocalClient):
    """Keeps its model and distils from what the others' models say, on average, of each class.

    Deviation from Algorithm 1: the averages are those of the model at the end of the round, on all training windows in
    evaluation mode, rather than collected while it changes; the paper's conclusion wants later outputs to count more.
    """

    def receive(self, message: Message) -> None:
        self.teacher = message.tensors[OUTPUTS]

    def context(self) -> Mapping[str, Tensor]:
        return {OUTPUTS: self.teacher}

    def losses(self, nets: Mapping, batch: Batch, context: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """ϕ(F, y) + γ ϕ(F, F̂_y), both cross-entropies (line 5); a class that nobody else has is a row of zeros."""
        logits = nets["model"](batch.x).logits
        loss = F.cross_entropy(logits, batch.y, reduction="none")
        distance = -(context[OUTPUTS][batch.y] * F.log_softmax(logits, dim=1)).sum(1)
        return {"model": batch.mean(loss + self.params.gamma * distance)}

    @torch.no_grad()
    def reply(self) -> Message:
        """F̄: for each class the mean of what the model gives its windows, after softmax (lines 6 to 8)."""
        model = self.nets["model"].eval()
        outputs = torch.cat([model(chunk).logits.softmax(1) for chunk in self.data.x.split(CHUNK)])
        one_hot = F.one_hot(self.data.y, self.task.classes).to(outputs.dtype)
        return Message({OUTPUTS: one_hot.T @ outputs / one_hot.sum(0).clamp(min=1).unsqueeze(1)})


class FedDistill(Server):
    """Exchanges only what the clients' models say of each class on average: a few numbers instead of weights.

    With partial participation a client counts with what it sent last. Kept are classes² numbers a client.
    """

    paper = "Jeong et al. 2018, arXiv:1811.11479"
    sends = "classes x classes outputs down and up; own model"
    Client = FedDistillClient
    Params = FedDistillParams

    def __init__(self, task, params, initial: Mapping[str, Tensor]) -> None:
        super().__init__(task, params, initial)
        self.outputs: dict[int, Tensor] = {}  # client -> (classes, classes), zeros in the rows of classes it lacks

    def message(self, client: int, round: Round) -> Message:
        """F̂ for this client: the mean over the others that have the class (lines 13 to 15)."""
        others = [self.outputs[id] for id in sorted(self.outputs) if id != client]
        if not others:
            return Message({OUTPUTS: torch.zeros(self.task.classes, self.task.classes)})
        outputs = torch.stack(others)
        having = (outputs.sum(2) > 0).sum(0)
        return Message({OUTPUTS: outputs.sum(0) / having.clamp(min=1).unsqueeze(1)})

    def check_reply(self, client: int, reply: Message) -> None:
        """Probabilities for each class, or zeros for one that the client lacks."""
        check_tensors(reply.tensors, {OUTPUTS: torch.empty(self.task.classes, self.task.classes)})
        outputs = reply.tensors[OUTPUTS]
        if not ((outputs >= 0) & (outputs.sum(1) < 1 + ROUNDING)).all():
            raise BadMessage(f"'{OUTPUTS}' has rows that are no probabilities")

    def aggregate(self, replies: Mapping[int, Message], round: Round) -> None:
        self.outputs = self.outputs | {id: reply.tensors[OUTPUTS] for id, reply in replies.items()}

    def save(self) -> Message:
        return Message({str(client): outputs for client, outputs in self.outputs.items()})

    def restore(self, saved: Message) -> None:
        self.outputs = {int(client): outputs for client, outputs in saved.tensors.items()}
