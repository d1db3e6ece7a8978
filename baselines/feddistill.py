"""FedDistill: Jeong et al., Federated Distillation and Augmentation under Non-IID Private Data, 2018.

This is the paper's federated distillation (Algorithm 1), without its augmentation, for which clients upload windows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from baselines.local import OwnModelClient
from registry.interface import BadMessage, Batch, Message, Round, Server, Task
from registry.messages import check_tensors
from registry.parameters import Params, option
from registry.prototypes import class_means

OUTPUTS = "outputs"
ROUNDING = 1e-3  # tolerance for the sum of probabilities above 1
CHUNK = 512  # windows in a forward pass, to bound memory for a client with many windows


@dataclass(frozen=True)
class FedDistillParams(Params):
    """Hyper-parameters of FedDistill; the paper gives no value for γ."""

    gamma: float = option(1.0, "weight γ of the distillation term", low=0)


class FedDistillClient(OwnModelClient):
    """Keeps its model and learns from the mean output of the other clients' models for each class.

    Deviation from Algorithm 1: mean outputs are those of the model at the end of the round, on all training windows in
    evaluation mode, instead of being collected during training; the paper's conclusion suggests that later outputs
    should count more.
    """

    windows_meet = "sends the mean outputs of each class, without noise"

    def receive(self, message: Message) -> None:
        """Keep the other clients' mean outputs, (classes, classes)."""
        self.teacher = message.tensors[OUTPUTS]

    def context(self) -> Mapping[str, Tensor]:
        """Return the other clients' mean outputs."""
        return {OUTPUTS: self.teacher}

    def losses(
        self, nets: Mapping[str, Callable[[Tensor], Any]], batch: Batch, context: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return ϕ(F, y) + γ ϕ(F, F̂_y), both cross-entropies (line 5); F̂_y is 0 if no other client has the class."""
        logits = nets["model"](batch.x).logits
        loss = batch.cross_entropies(logits)
        distance = -(context[OUTPUTS][batch.y] * F.log_softmax(logits, dim=1)).sum(1)
        return {"model": batch.mean(loss + self.params.gamma * distance)}

    @torch.no_grad()
    def reply(self) -> Message:
        """Return F̄: for each class the mean softmax output of the model on its windows (lines 6 to 8)."""
        assert self.data is not None  # the engine sets it while the client works
        model = self.nets["model"].eval()
        outputs = torch.cat([model(chunk).logits.softmax(1) for chunk in self.data.x.split(CHUNK)])
        return Message({OUTPUTS: class_means(outputs, self.data.y, self.task.classes)})


class FedDistill(Server):
    """Exchanges only the mean outputs of the clients' models for each class, instead of weights.

    With partial participation, the last outputs that a client sent are used. The server keeps classes² numbers for each
    client.
    """

    paper = "Jeong et al. 2018, arXiv:1811.11479"
    sends = "classes x classes outputs down and up; own model"
    beyond_average = "mean outputs by class"
    Client = FedDistillClient
    Params = FedDistillParams

    def __init__(self, task: Task, params: Any, initial: Mapping[str, Tensor]) -> None:
        super().__init__(task, params, initial)
        self.outputs: dict[
            int, Tensor
        ] = {}  # client -> (classes, classes); rows of classes that it does not have are zero

    def message(self, client: int, round: Round) -> Message:
        """Return F̂ for this client: for each class, the mean over the other clients that have it (lines 13 to 15)."""
        others = [self.outputs[id] for id in sorted(self.outputs) if id != client]
        if not others:
            return Message({OUTPUTS: torch.zeros(self.task.classes, self.task.classes)})
        outputs = torch.stack(others)
        having = (outputs.sum(2) > 0).sum(0)
        return Message({OUTPUTS: outputs.sum(0) / having.clamp(min=1).unsqueeze(1)})

    def check_reply(self, client: int, reply: Message) -> None:
        """Require probabilities for each class, or zeros for a class that the client does not have."""
        check_tensors(reply.tensors, {OUTPUTS: torch.empty(self.task.classes, self.task.classes)})
        outputs = reply.tensors[OUTPUTS]
        if not ((outputs >= 0) & (outputs.sum(1) < 1 + ROUNDING)).all():
            raise BadMessage(f"'{OUTPUTS}' has rows that are not probabilities (at least 0, sum at most 1)")

    def aggregate(self, replies: Mapping[int, Message], round: Round) -> None:
        """Store the outputs of the clients that replied."""
        self.outputs = self.outputs | {id: reply.tensors[OUTPUTS] for id, reply in replies.items()}

    def save(self) -> Message:
        """Return the outputs of all clients."""
        return Message({str(client): outputs for client, outputs in self.outputs.items()})

    def restore(self, saved: Message) -> None:
        """Restore what `save` returned."""
        self.outputs = {int(client): outputs for client, outputs in saved.tensors.items()}
