"""FedFTL: Saha and Ahmad, Federated Transfer Learning: concept and applications, 2020; as in FedHealth, 2019.

The survey gives no algorithm; this is its example for wearables, FedHealth (Chen et al., arXiv:1907.09173). Deviations
from it: the cloud has no public data, so the server's model is trained by FedAvg alone; transfer goes on in every round
next to it, not once at the end; the cloud's feature statistics come from the clients, as it has no windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from baselines.fedavg import FedAvg, FedAvgClient
from registry.aggregation import sample_weights
from registry.interface import Batch, Message, Model, Round, Task, float_state
from registry.messages import check_state
from registry.parameters import Params, hyper

MEAN, COVARIANCE = "features/mean", "features/covariance"
CHUNK = 512  # windows in a forward pass, which bounds the memory for a client with very many


@dataclass(frozen=True)
class FedFTLParams(Params):
    """Hyper-parameters of FedFTL; no value of the weight was found in either paper, and the default is a mild one."""

    coral: float = hyper(0.01, "weight of the CORAL term (FedHealth's η)", low=0)


class Transferred(Model):
    """A model of which only the fully connected layers learn: all else is fixed, batch norm statistics too."""

    def __init__(self, base: Model) -> None:
        super().__init__(base.shape, base.classes)
        self.base, self.feature_size = base, base.feature_size
        for part in base.modules():
            if not isinstance(part, nn.Linear):
                for parameter in part.parameters(recurse=False):
                    parameter.requires_grad_(False)

    @property
    def head(self) -> nn.Module:
        return self.base.head

    def features(self, x: Tensor) -> Tensor:
        return self.base.features(x)

    def train(self, mode: bool = True) -> Transferred:
        super().train(mode)
        for part in self.base.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
        return self


class FedFTLClient(FedAvgClient):
    """Trains the server's model as in FedAvg, and next to it a copy of its own, of which the upper layers learn.

    The copy starts anew from the server's model in every round, since what it has learnt fits the layers below it.
    Means and covariances of features go up: of a client with a single window, its features.
    """

    private = ("personal.*",)

    @classmethod
    def build(cls, task: Task) -> dict[str, nn.Module]:
        return {"model": task.model(), "personal": Transferred(task.model())}

    def serves(self) -> str:
        """The copy, once there is one; until then the server's model."""
        return "personal" if self.trained else "model"

    def receive(self, message: Message) -> None:
        tensors = dict(message.tensors)
        self.target = {COVARIANCE: tensors.pop(COVARIANCE)} if COVARIANCE in tensors else {}
        self.load(tensors)
        self.load(float_state({"personal.base": self.nets["model"]}))
        self.statistics = self._statistics()

    def context(self) -> Mapping[str, Tensor]:
        return self.target

    def losses(self, nets: Mapping, batch: Batch, context: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy for both; for the copy also the distance of its features' covariance to the server's."""
        features, logits = nets["personal"](batch.x)
        personal = batch.cross_entropy(logits)
        if COVARIANCE in context:  # nobody has sent statistics before the first round
            _, own = statistics(features, batch.mask)
            distance = (own - context[COVARIANCE]).square().mean() / 4  # ‖C_S − C_T‖² / 4d²
            personal = personal + self.params.coral * distance
        return super().losses(nets, batch, context) | {"personal": personal}

    def reply(self) -> Message:
        mean, covariance = self.statistics
        return Message(self.shared() | {MEAN: mean, COVARIANCE: covariance}, {"samples": self.samples})

    @torch.no_grad()
    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Of the server's model, as it came, on this client's windows."""
        model = self.nets["model"].eval()
        return statistics(torch.cat([model.features(chunk) for chunk in self.data.x.split(CHUNK)]))


class FedFTL(FedAvg):
    """Averages a model as FedAvg does; each client retrains its upper layers, with features aligned to the others'.

    The covariance that a round's clients align to is that of the model sent one round before, on the windows of the
    clients of that round.
    """

    paper = "Saha and Ahmad 2020, arXiv:2010.15561; FedHealth, Chen et al. 2019, arXiv:1907.09173"
    sends = "model and feature covariance down and up; own copy of the model"
    Client = FedFTLClient
    Params = FedFTLParams

    def __init__(self, task: Task, params: FedFTLParams, initial: Mapping[str, Tensor]) -> None:
        super().__init__(task, params, initial)
        self.features = task.model().feature_size
        self.covariance: dict[str, Tensor] = {}  # empty before the first round, else C_S

    def message(self, client: int, round: Round) -> Message:
        return Message(self.weights | self.covariance)

    def check_reply(self, client: int, reply: Message) -> None:
        """A model with `samples`, and mean and covariance of its features."""
        statistics = {MEAN: torch.empty(self.features), COVARIANCE: torch.empty(self.features, self.features)}
        check_state(reply, self.weights | statistics)

    def aggregate(self, replies: Mapping[int, Message], round: Round) -> None:
        tensors = {id: dict(reply.tensors) for id, reply in replies.items()}
        parts = [(own.pop(MEAN), own.pop(COVARIANCE)) for own in tensors.values()]
        super().aggregate({id: Message(own, replies[id].meta) for id, own in tensors.items()}, round)
        self.covariance = {COVARIANCE: pooled(parts, sample_weights(replies))}

    def save(self) -> Message:
        return Message(self.weights | self.covariance)

    def restore(self, saved: Message) -> None:
        self.weights = {name: tensor for name, tensor in saved.tensors.items() if name != COVARIANCE}
        self.covariance = {name: tensor for name, tensor in saved.tensors.items() if name == COVARIANCE}


def statistics(features: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean (d,) and covariance (d, d) of the rows that `mask` does not leave out; of one row, zeros."""
    real = torch.ones_like(features[:, 0]) if mask is None else mask.to(features.dtype)
    share = (real / real.sum().clamp(min=1)).unsqueeze(1)
    mean = (share * features).sum(0)
    centred = features - mean
    return mean, (share * centred).T @ centred


def pooled(parts: Sequence[tuple[Tensor, Tensor]], shares: Sequence[float]) -> Tensor:
    """Covariance of all clients' features together: within the clients, and between them."""
    mean = sum(share * own for share, (own, _) in zip(shares, parts, strict=True))
    return sum(
        share * (covariance + torch.outer(own - mean, own - mean))
        for share, (own, covariance) in zip(shares, parts, strict=True)
    )
