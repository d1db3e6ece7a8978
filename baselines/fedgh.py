"""FedGH: Yi et al., FedGH: Heterogeneous Federated Learning with Generalized Global Header, ACM MM 2023."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from baselines.fedavg import FedAvgClient
from baselines.fedper import HEAD
from registry.interface import BadMessage, Message, Round, Server, Task, matches
from registry.messages import check_tensors
from registry.parameters import Params, option
from registry.prototypes import PROTOTYPES, class_counts, class_means, features_of

CLASSES = "classes"
PREFIX = "model.head."
CLIP = 50.0  # bound on the norm of the head's gradient on the server, of the authors' code


@dataclass(frozen=True)
class FedGHParams(Params):
    """Hyper-parameters of FedGH; the default is that of the authors' code (github.com/LipingYi/FedGH)."""

    server_rate: float = option(0.01, "learning rate with which the server trains the head", 0.0)


class FedGHClient(FedAvgClient):
    """Keeps its model, replaces the head by the server's before it trains, and predicts with the trained whole."""

    private = ("model.*", f"!{HEAD}")
    kept = (HEAD,)
    windows_meet = "sends the mean features of each class, without noise"

    def reply(self) -> Message:
        """Return the mean features of each class that the client has, and which these are."""
        assert self.data is not None  # the engine sets it while the client works
        counts = class_counts(self.data.y, self.task.classes)
        means = class_means(features_of(self.nets["model"], self.data), self.data.y, self.task.classes)
        return Message({PROTOTYPES: means}, {CLASSES: [label for label, count in enumerate(counts) if count]})


class FedGH(Server):
    """Trains a common head on the server, on the clients' prototypes (mean features of each class).

    After each round the head makes as many steps of SGD as pairs (client, class) have come in, on the mean
    cross-entropy of all pairs. The paper makes one step for each pair, which would depend on their order. (In the
    authors' code the optimiser holds another network, so that the head stays as it is.) A client sends neither body nor
    head; it predicts with its own model as trained last, which is what the authors evaluate. The server learns which
    classes a client has, and of a class with a single window its features.
    """

    paper = "Yi et al. 2023, arXiv:2303.13137"
    sends = "head down, classes x features prototypes up; own model"
    beyond_average = "prototypes of classes"
    Client = FedGHClient
    Params = FedGHParams

    def __init__(self, task: Task, params: Any, initial: Mapping[str, Tensor]) -> None:
        super().__init__(task, params, {name: tensor for name, tensor in initial.items() if matches(name, (HEAD,))})
        model = task.model()
        self.module, self.features = model.head.double().eval(), model.feature_size

    def message(self, client: int, round: Round) -> Message:
        """Return the head."""
        return Message(self.weights)

    def check_reply(self, client: int, reply: Message) -> None:
        """Require prototypes, and the classes that they are of, ascending."""
        check_tensors(reply.tensors, {PROTOTYPES: torch.empty(self.task.classes, self.features)})
        classes = reply.meta.get(CLASSES)
        if not isinstance(classes, list) or not classes or any(type(label) is not int for label in classes):
            raise BadMessage(f"'{CLASSES}' must be a list of whole numbers")
        if classes != sorted(set(classes)) or classes[0] < 0 or classes[-1] >= self.task.classes:
            raise BadMessage(f"'{CLASSES}' must be ascending numbers from 0 to {self.task.classes - 1}")

    def idle(self, sent: Message) -> Mapping[str, Tensor]:
        """Return nothing: what clients send is not what they receive."""
        return {}

    def aggregate(self, replies: Mapping[int, Message], round: Round) -> None:
        """Train the head on the prototypes of the round."""
        present = [reply.meta[CLASSES] for reply in replies.values()]
        pairs = [reply.tensors[PROTOTYPES][classes] for reply, classes in zip(replies.values(), present, strict=True)]
        labels = [label for classes in present for label in classes]
        features, y = torch.cat(pairs).double(), torch.tensor(labels, device=pairs[0].device)
        head = {name.removeprefix(PREFIX): tensor.double() for name, tensor in self.weights.items()}
        for _ in range(len(y)):
            head = self._step(head, features, y)
        self.weights = {name: head[name.removeprefix(PREFIX)].to(old) for name, old in self.weights.items()}

    def _step(self, head: Mapping[str, Tensor], features: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Return the head after a step of SGD on the mean cross-entropy, its gradient clipped."""
        leaves = {name: tensor.requires_grad_() for name, tensor in head.items()}
        loss = F.cross_entropy(functional_call(self.module, leaves, (features,)), y)
        gradients = torch.autograd.grad(loss, list(leaves.values()))
        norm = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients]).norm()
        rate = self.params.server_rate * (CLIP / norm).clamp(max=1)
        return {name: (w - rate * g).detach() for (name, w), g in zip(leaves.items(), gradients, strict=True)}

    def networks(self) -> Mapping[str, Tensor]:
        """Return no state: every client predicts with its own model."""
        return {}
