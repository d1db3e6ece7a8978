"""MOON: Li, He and Song, Model-Contrastive Federated Learning, CVPR 2021."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from baselines.fedavg import FedAvg, FedAvgClient
from registry.functional import unit
from registry.interface import Batch, Message, Task, outputs
from registry.messages import check_state
from registry.parameters import Params, hyper

MODEL, GLOBAL, PREVIOUS = "model.", "global.", "previous."


@dataclass(frozen=True)
class MOONParams(Params):
    """Hyper-parameters of MOON; the paper tunes μ in {0.1, 1, 5, 10} and sets τ = 0.5 (§4.1)."""

    mu: float = hyper(1.0, "weight μ of the contrastive term; 0 is FedAvg", 0.0)
    tau: float = hyper(0.5, "temperature τ of the contrastive term", 1e-3)


class MOONClient(FedAvgClient):
    """Draws its features towards those of the global model and away from those of its own previous one.

    Between rounds it keeps its trained model, from which the next round's previous one is made. The global and the
    previous model are fixed and rebuilt in every round, so nothing more is kept and nothing more is sent.
    """

    kept = ("model.*",)
    frozen = ("global", "previous")

    @classmethod
    def build(cls, task: Task) -> dict[str, nn.Module]:
        """The model, and two copies for `receive` to fill."""
        model = task.model()
        return {"model": model, "global": copy.deepcopy(model), "previous": copy.deepcopy(model)}

    def receive(self, message: Message) -> None:
        """Start from the global model; the first time it stands for the previous one, too (no contrast yet)."""
        previous = {name: tensor.clone() for name, tensor in _model(self.state()).items()}
        self.load(message.tensors)
        current = _model(self.state())
        self.load({name.replace(MODEL, GLOBAL, 1): tensor for name, tensor in current.items()})
        previous = previous if self.trained else current
        self.load({name.replace(MODEL, PREVIOUS, 1): tensor for name, tensor in previous.items()})

    def losses(self, nets: Mapping, batch: Batch, context: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy + μ·ℓ_con (eq. 3, 4)."""
        output = nets["model"](batch.x)
        fixed = (other.features.detach() for other in outputs(nets, batch.x, *self.frozen))
        contrast = contrastive(output.features, *fixed, self.params.tau)
        return {"model": batch.cross_entropy(output.logits), "contrast": self.params.mu * batch.mean(contrast)}

    def reply(self) -> Message:
        return Message(_model(self.shared()), {"samples": self.samples})


class MOON(FedAvg):
    """Averages models as FedAvg does, of clients whose features are drawn to the global model's and off their last.

    The representation z is what the output layer sees, `features`. The paper puts a projection head there, two fully
    connected layers between the convolutions and the output layer; our models have just those two layers already, so
    that no head is added and MOON trains the very network that the other algorithms do.
    """

    paper = "Li et al. 2021, arXiv:2103.16257"
    sends = "model down, model up; one common model"
    Client = MOONClient
    Params = MOONParams

    def __init__(self, task: Task, params: Any, initial: Mapping[str, Tensor]) -> None:
        super().__init__(task, params, _model(initial))

    def check_reply(self, client: int, reply: Message) -> None:
        """The model with `samples`: its two copies do not travel."""
        check_state(reply, self.weights)


def contrastive(z: Tensor, z_global: Tensor, z_previous: Tensor, tau: float) -> Tensor:
    """ℓ_con = −log e^{sim(z, z_glob)/τ} / (e^{sim(z, z_glob)/τ} + e^{sim(z, z_prev)/τ}), (n,) (eq. 3)."""
    z, z_global, z_previous = unit(z), unit(z_global), unit(z_previous)
    return F.softplus(((z * z_previous).sum(1) - (z * z_global).sum(1)) / tau)


def _model(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith(MODEL)}
