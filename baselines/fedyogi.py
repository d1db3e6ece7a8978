"""FedYogi: Reddi et al., Adaptive Federated Optimization, ICLR 2021."""

from __future__ import annotations

from torch import Tensor

from baselines.fedopt import Adaptive


class FedYogi(Adaptive):
    """Averages updates as FedAvg does, and moves the model as Yogi does, v ← v − (1 − β2) Δ² sign(v − Δ²).

    W ← W + η m / (√v + τ) (Algorithm 2). Unlike FedAdam's, v falls slowly after large updates. Running statistics of
    batch norm are averaged; see `FedOpt`.
    """

    paper = "Reddi et al. 2021, arXiv:2003.00295"
    sends = "model down, model up; one common model"

    def second(self, before: Tensor, square: Tensor) -> Tensor:
        """Return v − (1 − β2) Δ² sign(v − Δ²), which is never below 0."""
        second: Tensor = before - (1 - self.params.beta2) * square * (before - square).sign()
        return second
