"""FedNTD: Lee et al., Preservation of the Global Knowledge by Not-True Distillation, NeurIPS 2022."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baselines.beside import Beside, GuidedClient
from registry.functional import kd, soften
from registry.interface import Batch
from registry.parameters import Params, option

OUT = -1e9  # logit of the true class, whose probability is then 0: infinity would leave 0 · ∞ in a divergence


@dataclass(frozen=True)
class FedNTDParams(Params):
    """Hyper-parameters of FedNTD: the paper's experiments have β = 1 and τ = 1."""

    beta: float = option(1.0, "weight β of the distillation; 0 is FedAvg", 0.0)
    tau: float = option(1.0, "temperature τ of the distillation", 1e-3)


class FedNTDClient(GuidedClient):
    """Minimises CE + β KL(q̃_g ‖ q̃_l), of global and own model's softened outputs over the not-true classes."""

    windows_meet = ""

    def losses(
        self, nets: Mapping[str, Callable[[Tensor], Any]], batch: Batch, context: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return cross-entropy and β·L_NTD."""
        own, shared = nets["model"](batch.x).logits, nets["global"](batch.x).logits
        distance = not_true(own, shared, batch.y, self.params.tau)
        return {"model": batch.cross_entropy(own), "distillation": self.params.beta * batch.mean(distance)}


class FedNTD(Beside):
    """Averages models as FedAvg does; clients keep what the global model says of all classes but the true one.

    For each window the true class is left out of the logits of both models; what the others' probabilities are among
    themselves is distilled from the global model, as it was received and without gradient, into the client's. With
    two classes there is nothing among which to distil, and the term is 0. It has the factor τ² of distillation,
    which is in the authors' code, not in the paper; at τ = 1 there is no difference.
    """

    paper = "Lee et al. 2022, arXiv:2106.03097"
    sends = "model down, model up; one common model"
    Client = FedNTDClient
    Params = FedNTDParams


def not_true(own: Tensor, shared: Tensor, y: Tensor, tau: float) -> Tensor:
    """Return τ² KL(q̃_shared ‖ q̃_own) over the classes other than y, (n,).

    Args:
        own, shared: logits (n, classes). No gradient reaches `shared`.
        y: (n,).
        tau: the temperature.
    """
    true = y.unsqueeze(1) == torch.arange(own.shape[1], device=y.device)
    return kd(soften(own.masked_fill(true, OUT), tau), soften(shared.masked_fill(true, OUT), tau), tau)
