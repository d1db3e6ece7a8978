"""FedProx: Li et al., Federated Optimization in Heterogeneous Networks, MLSys 2020."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from baselines.fedavg import FedAvg, FedAvgClient
from registry.interface import Batch
from registry.parameters import Params, hyper


@dataclass(frozen=True)
class FedProxParams(Params):
    """Hyper-parameters of FedProx; its authors tune μ in {0.001, 0.01, 0.1, 1} for each data set."""

    mu: float = hyper(0.01, "weight μ of the proximal term; 0 is FedAvg", 0.0)


class FedProxClient(FedAvgClient):
    """Minimises F_k(W) + μ/2 ‖W − W^t‖² (eq. 2) over the parameters that it shares; batch-norm statistics are none."""

    def context(self) -> Mapping[str, Tensor]:
        """W^t, what is shared of the model as it came."""
        return {name: tensor.clone() for name, tensor in self.shared().items()}

    def losses(self, nets: Mapping, batch: Batch, context: Mapping[str, Tensor]) -> dict[str, Tensor]:
        parameters = {f"model.{name}": tensor for name, tensor in nets["model"].named_parameters()}
        distance = sum((w - context[name]).square().sum() for name, w in parameters.items() if name in context)
        return super().losses(nets, batch, context) | {"proximal": self.params.mu / 2 * distance}


class FedProx(FedAvg):
    """Averages models as FedAvg does, of clients that are held near the global one: + μ/2 ‖W − W^t‖².

    Its inexact solutions are what clients send that had time for fewer epochs than the others (`--stragglers`): they
    are averaged like all others. One thing differs from the paper's Algorithm 2: clients are drawn uniformly and
    averaged by their numbers of samples, where it draws by samples and averages uniformly, so that μ = 0 is FedAvg.
    """

    paper = "Li et al. 2020, arXiv:1812.06127"
    sends = "model down, model up; one common model"
    Client = FedProxClient
    Params = FedProxParams
    accepts_partial_work = True
