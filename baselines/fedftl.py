"""FedFTL: Saha and Ahmad, Federated Transfer Learning: concept and applications, 2020; as in FedHealth, 2019.

The survey gives no algorithm; this is its example for wearables, FedHealth (Chen et al., arXiv:1907.09173). Deviations
from it:

- The server has no public data, so its model is trained by FedAvg alone.
- Transfer takes place in every round, not once at the end.
- What is retrained are the last `layers` of any model. With three of them, and `cnn`, these are the dense ones, as in
  FedHealth, which fixes the convolutions.
- The server has no windows, so the feature statistics come from the clients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from baselines.fedavg import FedAvg, FedAvgClient
from registry.aggregation import MEAN as PLAIN
from registry.aggregation import Average, sample_weights
from registry.errors import UserError
from registry.interface import Batch, Message, Model, Round, Task, float_state, last_layers
from registry.messages import check_state
from registry.parameters import Params, option
from registry.prototypes import features_of

MEAN, COVARIANCE = "features/mean", "features/covariance"


@dataclass(frozen=True)
class FedFTLParams(Params):
    """Hyper-parameters of FedFTL; neither paper gives a value for the weight, and the default is small."""

    coral: float = option(0.01, "weight of the CORAL term (FedHealth's η)", low=0)
    layers: int = option(3, "number of last layers that are retrained, the output layer among them; never the first", 2)


class Transferred(Model):
    """Model of which the last layers are trained; all else is fixed, batch-norm statistics everywhere."""

    def __init__(self, base: Model, count: int) -> None:
        channels, height, time = base.shape
        super().__init__((channels, height, time), base.classes)
        self.base, self.feature_size = base, base.feature_size
        upper = tuple(f"{path}." for layer in last_layers(base, count) for path in layer)
        for name, parameter in base.named_parameters():
            parameter.requires_grad_(f"{name}.".startswith(upper))

    @property
    def head(self) -> nn.Module:  # type: ignore[override]  # read-only here: it is the base's
        """Head of the base model."""
        return self.base.head

    def features(self, x: Tensor) -> Tensor:
        """Compute the features of windows with the base model."""
        return self.base.features(x)

    def train(self, mode: bool = True) -> Transferred:
        """Set training mode, but leave batch norm in evaluation mode."""
        super().train(mode)
        for part in self.base.modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
        return self


class FedFTLClient(FedAvgClient):
    """Trains the server's model as FedAvg does, and the upper layers of a copy of its own.

    The copy starts from the server's model again in every round, because its upper layers only fit the lower layers
    with which they were trained. The client sends mean and covariance of its features; with a single window, the mean
    is that window's features.
    """

    private = ("personal.*",)
    windows_meet = "sends mean and covariance of its features, without noise"

    @classmethod
    def build(cls, task: Task) -> dict[str, nn.Module]:
        """Return the model, and the client's own copy of it."""
        return {"model": task.model(), "personal": Transferred(task.model(), task.params.layers)}

    def serves(self) -> str:
        """Return the name of the copy once the client has trained; until then that of the server's model."""
        return "personal" if self.trained else "model"

    def receive(self, message: Message) -> None:
        """Install the server's model in both networks, and compute the statistics of its features."""
        tensors = dict(message.tensors)
        self.target = {COVARIANCE: tensors.pop(COVARIANCE)} if COVARIANCE in tensors else {}
        self.load(tensors)
        self.load(float_state({"personal.base": self.nets["model"]}))
        self.statistics = self._statistics()

    def context(self) -> Mapping[str, Tensor]:
        """Return the server's covariance of features; nothing in the first round."""
        return self.target

    def losses(
        self, nets: Mapping[str, Callable[[Tensor], Any]], batch: Batch, context: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return cross-entropy for both; for the copy plus the distance of its feature covariance to the server's."""
        features, logits = nets["personal"](batch.x)
        personal = batch.cross_entropy(logits)
        if COVARIANCE in context:  # no client has sent statistics before the first round
            _, own = statistics(features, batch.mask)
            distance = (own - context[COVARIANCE]).square().mean() / 4  # ‖C_S − C_T‖² / 4d²
            personal = personal + self.params.coral * distance
        return super().losses(nets, batch, context) | {"personal": personal}

    def reply(self) -> Message:
        """Return the model, with mean and covariance of its features."""
        mean, covariance = self.statistics
        return Message(self.shared() | {MEAN: mean, COVARIANCE: covariance}, {"samples": self.samples})

    def _statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and covariance of the features of the received model on this client's windows."""
        assert self.data is not None  # the engine sets it while the client works
        return statistics(features_of(self.nets["model"], self.data))


class FedFTL(FedAvg):
    """Averages a model as FedAvg does; each client retrains its upper layers, with features aligned to the others'.

    The covariance to which the clients of a round align is that of the model sent in the round before, on the windows
    of that round's clients.
    """

    paper = "Saha and Ahmad 2020, arXiv:2010.15561; FedHealth, Chen et al. 2019, arXiv:1907.09173"
    sends = "model and feature covariance down and up; own copy of the model"
    Client = FedFTLClient
    beyond_average = "means and covariances of features"
    Params = FedFTLParams

    @classmethod
    def check(cls, task: Task, params: FedFTLParams) -> None:
        """Raise UserError for a model of which only the head would be retrained, and no features aligned."""
        model = Transferred(task.model(), params.layers)
        if not model.eval().features(torch.zeros(1, *model.shape)).requires_grad:
            name = task.model_class.__name__
            raise UserError(f"FedFTL: {name} has no layer between its first and its head, to be retrained with it")

    def __init__(self, task: Task, params: FedFTLParams, initial: Mapping[str, Tensor]) -> None:
        super().__init__(task, params, initial)
        self.features = task.model().feature_size
        self.covariance: dict[str, Tensor] = {}  # empty before the first round, else C_S

    def message(self, client: int, round: Round) -> Message:
        """Return the model and, after the first round, the covariance of features."""
        return Message(self.weights | self.covariance)

    def check_reply(self, client: int, reply: Message) -> None:
        """Require a model with `samples`, and mean and covariance of its features."""
        statistics = {MEAN: torch.empty(self.features), COVARIANCE: torch.empty(self.features, self.features)}
        check_state(reply, self.weights | statistics)

    def aggregate(self, replies: Mapping[int, Message], round: Round) -> None:
        """Average the models, and pool the covariances."""
        tensors = {id: dict(reply.tensors) for id, reply in replies.items()}
        parts = [(own.pop(MEAN), own.pop(COVARIANCE)) for own in tensors.values()]
        super().aggregate({id: Message(own, replies[id].meta) for id, own in tensors.items()}, round)
        self.covariance = {COVARIANCE: pooled(parts, self.average.shares(sample_weights(replies)), self.average)}

    def save(self) -> Message:
        """Return the model and the covariance."""
        return Message(self.weights | self.covariance)

    def restore(self, saved: Message) -> None:
        """Restore what `save` returned."""
        self.weights = {name: tensor for name, tensor in saved.tensors.items() if name != COVARIANCE}
        self.covariance = {name: tensor for name, tensor in saved.tensors.items() if name == COVARIANCE}


def statistics(features: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return mean (d,) and covariance (d, d) of the rows where `mask` is true; the covariance of one row is 0."""
    real = torch.ones_like(features[:, 0]) if mask is None else mask.to(features.dtype)
    share = (real / real.sum().clamp(min=1)).unsqueeze(1)
    mean = (share * features).sum(0)
    centred = features - mean
    return mean, (share * centred).T @ centred


def pooled(parts: Sequence[tuple[Tensor, Tensor]], shares: Sequence[float], average: Average) -> Tensor:
    """Return the covariance (d, d) of all clients' features together: within clients plus between clients.

    Args:
        parts: mean (d,) and covariance (d, d) of each client; at least one.
        shares: weights of the clients, which add up to 1.
        average: mean of the clients, taken of the means first and then of the covariances around it.
    """

    def over(values: Sequence[Tensor]) -> Tensor:
        if average.how.rule != PLAIN:
            return average([{"": value} for value in values], shares)[""]
        total = torch.zeros_like(values[0])
        for share, value in zip(shares, values, strict=True):  # rounded after each product, unlike `weighted_sum`
            total = total + share * value
        return total

    mean = over([own for own, _ in parts])
    return over([covariance + torch.outer(own - mean, own - mean) for own, covariance in parts])
