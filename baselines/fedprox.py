"""FedProx: Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from baselines.fedavg import FedAvg, FedAvgClient
from registry.functional import beside, squared_distance
from registry.interface import Batch
from registry.parameters import Params, option


@dataclass(frozen=True)
class FedProxParams(Params):
    """Hyper-parameters of FedProx; the authors tune μ in {0.001, 0.01, 0.1, 1} for each data set."""

    mu: float = option(0.01, "weight μ of the proximal term; 0 is FedAvg", 0.0)


class FedProxClient(FedAvgClient):
    """Minimises F_k(W) + μ/2 ‖W − W^t‖² (eq. 2); the proximal term is over the shared parameters (no statistics)."""

    windows_meet = ""

    def context(self) -> Mapping[str, Tensor]:
        """Return W^t, the shared part of the received model."""
        return {name: tensor.clone() for name, tensor in self.shared().items()}

    def losses(
        self, nets: Mapping[str, Callable[[Tensor], Any]], batch: Batch, context: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return F_k and the proximal term."""
        distance = squared_distance(beside(nets["model"], context), batch.x)
        return super().losses(nets, batch, context) | {"proximal": self.params.mu / 2 * distance}


class FedProx(FedAvg):
    """Averages models as FedAvg does; a proximal term keeps the clients near the global model: + μ/2 ‖W − W^t‖².

    The paper's inexact solutions are the replies of clients that had time for fewer epochs than the others
    (`--stragglers`); they are averaged like all others. Deviation from the paper's Algorithm 2: clients are selected
    uniformly and averaged by number of samples, instead of selected by number of samples and averaged uniformly, so
    that μ = 0 is FedAvg.
    """

    paper = "Li et al. 2020, arXiv:1812.06127"
    sends = "model down, model up; one common model"
    Client = FedProxClient
    Params = FedProxParams
    accepts_partial_work = True
