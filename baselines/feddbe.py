"""FedDBE: Zhang et al., Eliminating Domain Bias for Federated Learning in Representation Space, NeurIPS 2023."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from baselines.fedavg import FedAvg, FedAvgClient
from registry.aggregation import sample_weights
from registry.interface import Batch, Message, Model, Output, Round, Task
from registry.messages import check_state
from registry.parameters import Params, option
from registry.prototypes import features_of

MEAN, BIAS = "features/mean", "model.bias"


@dataclass(frozen=True)
class FedDBEParams(Params):
    """Hyper-parameters of FedDBE; the authors choose κ by data set, and the default is this project's."""

    kappa: float = option(1.0, "weight κ of the distance of a batch's mean features to the common mean", 0.0)


class Biased(Model):
    """Model that adds a bias to its features before the output layer; `Output.features` are those without it."""

    def __init__(self, base: Model) -> None:
        channels, height, time = base.shape
        super().__init__((channels, height, time), base.classes)
        self.base, self.feature_size, self.head = base, base.feature_size, base.head
        base.head = nn.Identity()
        self.bias = nn.Parameter(torch.zeros(base.feature_size))

    def features(self, x: Tensor) -> Tensor:
        """Compute the generic features of windows with the base model."""
        return self.base.features(x)

    def forward(self, x: Tensor) -> Output:
        """Compute generic features z, and the logits of z + bias."""
        features = self.features(x)
        return Output(features, self.head(features + self.bias))


class FedDBEClient(FedAvgClient):
    """Keeps the bias of its features, and draws the mean of its generic features to the common mean.

    With the generic features z, the client's bias b and the common mean m (d values):

        CE(head(z + b), y) + κ/2d ‖mean of z over the batch − m‖²

    In the first round, which has no m yet, b stays 0 and there is no distance; the client then sends the mean of its
    features after training.
    """

    private = (BIAS,)
    windows_meet = "draws the mean features of a batch to a common mean"

    @classmethod
    def build(cls, task: Task) -> dict[str, nn.Module]:
        """Return the model with a bias of its features."""
        return {"model": Biased(task.model())}

    def trains(self, epoch: int, epochs: int) -> Sequence[str]:
        """Return all; without the bias as long as there is no common mean."""
        return ("*",) if self.target else ("*", f"!{BIAS}")

    def receive(self, message: Message) -> None:
        """Install the model, and keep the common mean for `context`."""
        tensors = dict(message.tensors)
        self.target = {MEAN: tensors.pop(MEAN)} if MEAN in tensors else {}
        self.load(tensors)

    def context(self) -> Mapping[str, Tensor]:
        """Return m, (d,); nothing in the first round."""
        return self.target

    def losses(
        self, nets: Mapping[str, Callable[[Tensor], Any]], batch: Batch, context: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the cross-entropy and the distance."""
        features, logits = nets["model"](batch.x)
        losses = {"model": batch.cross_entropy(logits)}
        if MEAN in context:
            real = torch.ones_like(features[:, 0]) if batch.mask is None else batch.mask.to(features.dtype)
            mean = (real / real.sum().clamp(min=1)) @ features
            losses["mean"] = self.params.kappa / 2 * (mean - context[MEAN]).square().mean()
        return losses

    def reply(self) -> Message:
        """Return the model; in the first round also the mean of its features."""
        reply = super().reply()
        if self.target:
            return reply
        assert self.data is not None  # the engine sets it while the client works
        mean = features_of(self.nets["model"], self.data).mean(0)
        return Message(dict(reply.tensors) | {MEAN: mean}, reply.meta)


class FedDBE(FedAvg):
    """Averages models as FedAvg does, but each client has a bias of its features, and their means are held together.

    The common mean is Σ (n_k/n) of the means that the clients of the first round send after it, and stays, as in the
    paper, where all clients take part in that round. The authors' mean over past batches has a momentum μ; here it is
    1, which gives the mean of the batch. The server learns the mean features of the clients of the first round, of one
    with a single window its features.
    """

    paper = "Zhang et al. 2023, arXiv:2311.14975"
    sends = "model down, model up, mean features once; own bias of features"
    Client = FedDBEClient
    beyond_average = "mean features of the first round"
    Params = FedDBEParams
    sums = True

    def __init__(self, task: Task, params: Any, initial: Mapping[str, Tensor]) -> None:
        super().__init__(task, params, initial)
        self.features = task.model().feature_size
        self.mean: dict[str, Tensor] = {}  # empty before the first round, else m

    def message(self, client: int, round: Round) -> Message:
        """Return the model and, after the first round, the common mean."""
        return Message(self.weights | self.mean)

    def check_reply(self, client: int, reply: Message) -> None:
        """Require a model with `samples`; before there is a common mean also the mean of its features."""
        check_state(reply, self.weights if self.mean else self.weights | {MEAN: torch.empty(self.features)})

    def contribution(self, client: int, reply: Message) -> Mapping[str, Tensor]:
        """Return the model of a reply."""
        return {name: tensor for name, tensor in reply.tensors.items() if name != MEAN}

    def idle(self, sent: Message) -> Mapping[str, Tensor]:
        """Return the model that was sent."""
        return self.contribution(0, sent)

    def aggregate(self, replies: Mapping[int, Message], round: Round) -> None:
        """Average the models; in the first round also the mean features."""
        super().aggregate(
            {id: Message(self.contribution(id, reply), reply.meta) for id, reply in replies.items()}, round
        )
        if not self.mean:
            means = [{MEAN: reply.tensors[MEAN]} for reply in replies.values()]
            self.mean = self.average(means, sample_weights(replies))

    def save(self) -> Message:
        """Return the model and the common mean."""
        return Message(self.weights | self.mean)

    def restore(self, saved: Message) -> None:
        """Restore what `save` returned."""
        self.weights = {name: tensor for name, tensor in saved.tensors.items() if name != MEAN}
        self.mean = {name: tensor for name, tensor in saved.tensors.items() if name == MEAN}
