"""MOON: Li, He and Song, Model-Contrastive Federated Learning, CVPR 2021."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from baselines.beside import Beside, GuidedClient, of_model, renamed
from registry.functional import unit
from registry.interface import Batch, Message, outputs
from registry.parameters import Params, option

PREVIOUS = "previous."


@dataclass(frozen=True)
class MOONParams(Params):
    """Hyper-parameters of MOON; the paper tunes μ in {0.1, 1, 5, 10} and sets τ = 0.5 (§4.1)."""

    mu: float = option(1.0, "weight μ of the contrastive term; 0 is FedAvg", 0.0)
    tau: float = option(0.5, "temperature τ of the contrastive term", 1e-3)


class MOONClient(GuidedClient):
    """Trains its features to be similar to those of the global model and dissimilar to those of its previous model.

    Between rounds the client keeps its trained model, which is the previous model of the next round. The global and the
    previous model are not trained and are set again in every round, so they are neither kept nor sent.
    """

    kept = ("model.*",)
    frozen = ("global", "previous")

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

    The representation z is the input of the output layer, `features`. The paper adds a projection head, two fully
    connected layers between the convolutions and the output layer. The models here already have these two layers, so no
    head is added and MOON trains the same network as the other algorithms.
    """

    paper = "Li et al. 2021, arXiv:2103.16257"
    sends = "model down, model up; one common model"
    Client = MOONClient
    Params = MOONParams


def contrastive(z: Tensor, z_global: Tensor, z_previous: Tensor, tau: float) -> Tensor:
    """Return ℓ_con = −log e^{sim(z, z_glob)/τ} / (e^{sim(z, z_glob)/τ} + e^{sim(z, z_prev)/τ}), (n,) (eq. 3)."""
    z, z_global, z_previous = unit(z), unit(z_global), unit(z_previous)
    return F.softplus(((z * z_previous).sum(1) - (z * z_global).sum(1)) / tau)
