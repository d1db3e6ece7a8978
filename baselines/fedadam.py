"""FedAdam: Reddi et al., Adaptive Federated Optimization, ICLR 2021."""

from __future__ import annotations

from torch import Tensor

from baselines.fedopt import Adaptive


class FedAdam(Adaptive):
    """Averages updates as FedAvg does, and moves the model as Adam does: v ← β2 v + (1 − β2) Δ² (Algorithm 2).

    W ← W + η m / (√v + τ), without correction of the first steps' bias, as in the paper. Running statistics of batch
    norm are averaged; see `FedOpt`.
    """

    paper = "Reddi et al. 2021, arXiv:2003.00295"
    sends = "model down, model up; one common model"

    def second(self, before: Tensor, square: Tensor) -> Tensor:
        """Return β2 v + (1 − β2) Δ²."""
        second: Tensor = self.params.beta2 * before + (1 - self.params.beta2) * square
        return second
