"""FedAvgM: Hsu, Qi and Brown, Measuring the Effects of Non-Identical Data Distribution for Federated Classification."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from baselines.fedopt import FIRST, FedOpt
from registry.parameters import Params, option


@dataclass(frozen=True)
class FedAvgMParams(Params):
    """Hyper-parameters of FedAvgM; the paper tunes β in {0, 0.7, 0.9, 0.97, 0.99, 0.997} and has a server rate of 1."""

    server_rate: float = option(1.0, "the server's learning rate η", above=0)
    momentum: float = option(0.9, "momentum β of the server; 0 with a server rate of 1 is FedAvg", 0.0, below=1)


class FedAvgM(FedOpt):
    """Averages updates as FedAvg does, and moves the model with momentum: v ← β v + Δ, W ← W + η v.

    Running statistics of batch norm are averaged, without momentum; see `FedOpt`.
    """

    paper = "Hsu et al. 2019, arXiv:1909.06335"
    sends = "model down, model up; one common model"
    Params = FedAvgMParams

    def step(self, name: str, change: Tensor) -> Tensor:
        """Return v ← β v + Δ."""
        first: Tensor = self.params.momentum * self.moment(FIRST, name, change) + change
        self.moments[FIRST + name] = first
        return first
