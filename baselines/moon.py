"""MOON: Li, He and Song, Model-Contrastive Federated Learning, CVPR 2021."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional as F

from baselines.beside import Beside, GuidedClient, of_model, renamed
from registry.functional import unit
from registry.interface import Batch, Message, Model, Task, outputs
from registry.parameters import Params, option

PREVIOUS = "previous."


@dataclass(frozen=True)
class MOONParams(Params):
    """Hyper-parameters of MOON; the paper tunes μ in {0.1, 1, 5, 10} and sets τ = 0.5 (§4.1)."""

    mu: float = option(1.0, "weight μ of the contrastive term; 0 is FedAvg", 0.0)
    tau: float = option(0.5, "temperature τ of the contrastive term", 1e-3)
    projection: int = option(
        0, "outputs of a projection head before the output layer, 256 in the paper; 0: none", 0, 100_000
    )


class Projected(Model):
    """A model with the paper's projection head (§3.2): two layers between its features and a new output layer."""

    def __init__(self, model: Model, outputs: int) -> None:
        super().__init__((model.shape[0], 1, model.shape[2]), model.classes)
        size = model.feature_size
        self.network = model
        self.network.head = nn.Identity()  # only its features are used
        self.projection = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, outputs))
        self.feature_size = outputs
        self.head = nn.Linear(outputs, model.classes)

    def features(self, x: Tensor) -> Tensor:
        """Compute z, the projected features: (n, channels, 1, time) -> (n, outputs)."""
        projected: Tensor = self.projection(self.network.features(x))
        return projected


class MOONClient(GuidedClient):
    """Trains its features to be similar to those of the global model and dissimilar to those of its previous model.

    Between rounds the client keeps its trained model, which is the previous model of the next round. The global and the
    previous model are not trained and are set again in every round, so they are neither kept nor sent.
    """

    kept = ("model.*",)
    frozen = ("global", "previous")
    windows_meet = ""

    @classmethod
    def build(cls, task: Task) -> dict[str, nn.Module]:
        """Return the model, with the projection head if there is one, and two copies that `receive` fills."""
        nets = super().build(task)
        if not task.params.projection:
            return nets
        model = Projected(cast(Model, nets["model"]), task.params.projection)
        return {"model": model, **{name: copy.deepcopy(model) for name in cls.frozen}}

    def receive(self, message: Message) -> None:
        """Start from the global model, which is also the previous model in the first round (no contrast yet)."""
        previous = {name: tensor.clone() for name, tensor in of_model(self.state()).items()}
        super().receive(message)
        previous = previous if self.trained else of_model(self.state())
        self.load(renamed(previous, PREVIOUS))

    def losses(
        self, nets: Mapping[str, Callable[[Tensor], Any]], batch: Batch, context: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return cross-entropy and μ·ℓ_con (eq. 3, 4)."""
        output = nets["model"](batch.x)
        shared, previous = (other.features.detach() for other in outputs(nets, batch.x, *self.frozen))
        contrast = contrastive(output.features, shared, previous, self.params.tau)
        return {"model": batch.cross_entropy(output.logits), "contrast": self.params.mu * batch.mean(contrast)}


class MOON(Beside):
    """Averages models as FedAvg does; a contrastive term keeps clients' features near those of the global model.

    The representation z is the input of the output layer, `features`. By default it is the model's own, so that MOON
    trains the same network as the other algorithms; that of most models here is rectified, and so two of them are never
    at more than a right angle. The paper adds a projection head before the output layer, whose outputs may have any
    sign: `projection=256`.
    """

    paper = "Li et al. 2021, arXiv:2103.16257"
    sends = "model down, model up; one common model"
    Client = MOONClient
    Params = MOONParams


def contrastive(z: Tensor, z_global: Tensor, z_previous: Tensor, tau: float) -> Tensor:
    """Return ℓ_con = −log e^{sim(z, z_glob)/τ} / (e^{sim(z, z_glob)/τ} + e^{sim(z, z_prev)/τ}), (n,) (eq. 3)."""
    z, z_global, z_previous = unit(z), unit(z_global), unit(z_previous)
    return F.softplus(((z * z_previous).sum(1) - (z * z_global).sum(1)) / tau)
