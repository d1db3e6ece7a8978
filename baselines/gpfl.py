"""GPFL: Zhang et al., GPFL: Simultaneously Learning Global and Personalized Feature Information, ICCV 2023."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.fedavg import FedAvg, FedAvgClient
from registry.functional import unit
from registry.interface import Batch, Message, Model, Output, Task
from registry.parameters import Params, option

EMBEDDING = "categories.weight"
GENERIC, DECAYS = "generic", "decays"
VALVE = ("gamma.", "beta.")


@dataclass(frozen=True)
class GPFLParams(Params):
    """Hyper-parameters of GPFL: the authors' for their CNN; for UCI-HAR they have μ = 1, for deep networks 0."""

    lam: float = option(0.01, "weight λ of the distance of global features to the embedding of their class", 0.0)
    mu: float = option(0.1, "weight decay μ of valve and embeddings; μ times the learning rate stays below 2", 0.0)


class Conditioned(Model):
    """Model whose features pass a conditional valve before the output layer: ReLU((1 + γ(c)) ⊙ z + β(c)).

    γ and β are linear layers with ReLU and layer norm. Logits and `Output.features` are under the client's condition.

    Attributes:
        condition: the client's condition, (d,), which `GPFLClient.receive` sets.
    """

    condition: Tensor

    def __init__(self, base: Model) -> None:
        channels, height, time = base.shape
        super().__init__((channels, height, time), base.classes)
        self.base, self.feature_size, self.head = base, base.feature_size, base.head
        base.head = nn.Identity()
        self.gamma, self.beta = (
            nn.Sequential(nn.Linear(self.feature_size, self.feature_size), nn.ReLU(), nn.LayerNorm(self.feature_size))
            for _ in range(2)
        )
        self.register_buffer("condition", torch.zeros(self.feature_size))

    def valve(self, z: Tensor, condition: Tensor) -> Tensor:
        """Compute features (n, d) under a condition (d,)."""
        passed: Tensor = ((1 + self.gamma(condition)) * z + self.beta(condition)).relu()
        return passed

    def features(self, x: Tensor) -> Tensor:
        """Compute the features of windows under the client's condition."""
        return self.valve(self.base.features(x), self.condition)

    def both(self, x: Tensor, generic: Tensor) -> tuple[Output, Tensor]:
        """Compute the output under the client's condition, and the features (n, d) under another one, in one pass."""
        z = self.base.features(x)
        personal = self.valve(z, self.condition)
        return Output(personal, self.head(personal)), self.valve(z, generic)


class GPFLClient(FedAvgClient):
    """Keeps its head; trains features for itself and, under the common condition, towards common class embeddings.

    With the embeddings e_c received, fixed for the round, its condition is p = Σ_c (n_c/n) e_c and the common one
    g = Σ_c e_c / C. With the features z_p and z_g under these, and the embeddings E_c that it trains, it minimises

        CE(head(z_p), y) + CE(cos(z_g, E), y) + λ ‖z_g − e_y‖ + μ/2 ‖valve, E‖²

    The last term is weight decay, as in the authors' code: w ← w − η (g + μ w), with the gradient g of the others. What
    bounds g leaves it alone; together with it, the norm of valve and embeddings would hold the losses back.
    """

    private = ("model.head.*", "model.condition")
    windows_meet = "mixes embeddings by its numbers of windows of each class"

    @classmethod
    def build(cls, task: Task) -> dict[str, nn.Module]:
        """Return the model with a valve, and the embeddings of the classes."""
        model = task.model()
        return {"model": Conditioned(model), "categories": nn.Embedding(task.classes, model.feature_size)}

    def receive(self, message: Message) -> None:
        """Install what is shared, and set the client's condition."""
        super().receive(message)
        assert self.data is not None  # the engine sets it while the client works
        embedding = message.tensors[EMBEDDING]
        shares = torch.bincount(self.data.y, minlength=self.task.classes).to(embedding) / len(self.data.y)
        self.load({"model.condition": shares @ embedding})
        self.fixed = {EMBEDDING: embedding, GENERIC: embedding.mean(0)}

    def context(self) -> Mapping[str, Tensor]:
        """Return e, (classes, d), g, (d,), and which of the model's values the decay is for, (values,), 1 or 0."""
        named = self.nets["model"].named_parameters()
        decays = [torch.full((w.numel(),), float(name.startswith(VALVE)), device=w.device) for name, w in named]
        return self.fixed | {DECAYS: torch.cat(decays).to(self.fixed[GENERIC])}

    def losses(
        self, nets: Mapping[str, Callable[[Tensor], Any]], batch: Batch, context: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return all terms but the decay."""
        model, embeddings = nets["model"], nets["categories"](torch.arange(self.task.classes, device=batch.x.device))
        assert isinstance(model, Conditioned)  # as `build` made it
        output, generic = model.both(batch.x, context[GENERIC])
        distance = torch.linalg.vector_norm(generic - context[EMBEDDING][batch.y], dim=1)
        return {
            "model": batch.cross_entropy(output.logits),
            "angle": batch.cross_entropy(F.linear(unit(generic), unit(embeddings))),
            "magnitude": self.params.lam * batch.mean(distance),
        }

    def update(
        self,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        rate: Tensor,
        step: Tensor,
        context: Mapping[str, Tensor],
    ) -> Mapping[str, Tensor]:
        """Return the parameters after a step of SGD with weight decay of valve and embeddings."""
        decay = {"model": self.params.mu * context[DECAYS] * weights["model"]}
        decay["categories"] = self.params.mu * weights["categories"]
        return {name: own - rate * (gradients[name] + decay[name]) for name, own in weights.items()}


class GPFL(FedAvg):
    """Averages all but the heads: features, a conditional valve, and embeddings of the classes that guide features.

    Clients take steps of their own, of SGD with weight decay, so that `--optimizer` is refused. Where the authors' code
    takes the norm of all rows of a batch together for the third term, this is the mean of the rows' norms, as in the
    paper, which does not depend on the size of a batch. A client predicts with its own head and condition, of when it
    trained last, on the shared rest.
    """

    paper = "Zhang et al. 2023, arXiv:2308.10279"
    sends = "model without head, valve and class embeddings down and up; own head"
    Client = GPFLClient
    Params = GPFLParams
