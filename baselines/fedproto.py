"""FedProto: Tan et al., FedProto: Federated Prototype Learning across Heterogeneous Clients, AAAI 2022."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baselines.local import OwnModelClient
from registry.interface import Batch, Message, Round, Server, Task
from registry.messages import check_tensors
from registry.parameters import Params, option
from registry.prototypes import (
    COUNTS,
    PROTOTYPES,
    Prototypes,
    check_counts,
    class_counts,
    class_means,
    distances,
    training_features_of,
)

KNOWN = "known"


@dataclass(frozen=True)
class FedProtoParams(Params):
    """Hyper-parameters of FedProto; the default is that of the authors' code (github.com/yuetan031/FedProto)."""

    lam: float = option(
        1.0, "weight λ of the distance of features to the prototypes; 0 is Local with local_rounds=selected", 0.0
    )


class FedProtoClient(OwnModelClient):
    """Keeps its model and minimises CE + λ/d ‖h(x) − C_y‖², with the prototypes C received.

    In the last term, windows of a class without a prototype count as 0. After training it sends the mean features of
    each class that it has, of its trained model with the batch norm of training, as they are in the last term. The
    authors average those of the last epoch's batches, while the model still moves.
    """

    windows_meet = "sends the mean features of each class, without noise"

    def receive(self, message: Message) -> None:
        """Keep the prototypes."""
        means = message.tensors[PROTOTYPES]
        known = torch.zeros(len(means), dtype=means.dtype, device=means.device)
        known[message.meta["known"]] = 1
        self.received = {PROTOTYPES: means, KNOWN: known}

    def context(self) -> Mapping[str, Tensor]:
        """Return the prototypes, (classes, d), and which are known, (classes,)."""
        return self.received

    def losses(
        self, nets: Mapping[str, Callable[[Tensor], Any]], batch: Batch, context: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the cross-entropy and the distance."""
        features, logits = nets["model"](batch.x)
        distance = distances(features, batch.y, context[PROTOTYPES], context[KNOWN])
        return {"model": batch.cross_entropy(logits), "prototypes": self.params.lam * batch.mean(distance)}

    def reply(self) -> Message:
        """Return the client's prototypes, and the number of windows of each class."""
        assert self.data is not None  # the engine sets it while the client works
        means = class_means(training_features_of(self.nets["model"], self.data), self.data.y, self.task.classes)
        return Message({PROTOTYPES: means}, {COUNTS: class_counts(self.data.y, self.task.classes)})


class FedProto(Server):
    """Exchanges only prototypes, the mean features of each class, instead of weights.

    C_c = Σ_k (n_kc / N_c) c_kc over the clients of the round that have class c; a class that none of them has keeps its
    prototype. The paper's eq. 6 divides once more by the number of these clients, which would draw features towards 0;
    the authors' code takes the plain mean of the clients. A client predicts with its own classifier, where the paper
    takes the nearest prototype; the authors' code reports both. The server learns every client's number of windows of
    each class, and of a class with a single window its features.
    """

    paper = "Tan et al. 2022, arXiv:2105.00243"
    sends = "classes x features prototypes down and up; own model"
    beyond_average = "prototypes of classes"
    Client = FedProtoClient
    Params = FedProtoParams

    def __init__(self, task: Task, params: Any, initial: Mapping[str, Tensor]) -> None:
        super().__init__(task, params, initial)
        self.prototypes = Prototypes(task.classes, task.model().feature_size)

    def message(self, client: int, round: Round) -> Message:
        """Return the prototypes, and which are known."""
        return self.prototypes.message()

    def check_reply(self, client: int, reply: Message) -> None:
        """Require prototypes, and numbers of windows."""
        check_tensors(reply.tensors, {PROTOTYPES: self.prototypes.means})
        check_counts(reply, self.task.classes)

    def aggregate(self, replies: Mapping[int, Message], round: Round) -> None:
        """Average the prototypes."""
        means = [reply.tensors[PROTOTYPES] for reply in replies.values()]
        self.prototypes.update(means, [reply.meta[COUNTS] for reply in replies.values()])

    def save(self) -> Message:
        """Return the prototypes."""
        return self.prototypes.message()

    def restore(self, saved: Message) -> None:
        """Restore what `save` returned."""
        self.prototypes.restore(saved)
