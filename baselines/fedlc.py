"""FedLC: Zhang et al., Federated Learning with Label Distribution Skew via Logits Calibration, ICML 2022."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baselines.fedavg import FedAvg, FedAvgClient
from registry.interface import Batch
from registry.parameters import Params, option

MARGINS = "margins"
ABSENT = 1e-8  # windows that a class without any counts as: a margin of 100 τ


@dataclass(frozen=True)
class FedLCParams(Params):
    """Hyper-parameters of FedLC; the paper tunes τ."""

    tau: float = option(1.0, "scale τ of the margins between classes; 0 is FedAvg", 0.0)


class FedLCClient(FedAvgClient):
    """Minimises the cross-entropy of the calibrated logits f_c − τ n_c^(−1/4), n_c its windows of class c.

    The logit of a rare class is lowered in training, so that the model learns to raise it; a class that the client
    does not have is nearly left out, instead of being trained never to be said. The counts stay on the client.
    """

    windows_meet = "counts its windows of each class"

    def context(self) -> Mapping[str, Tensor]:
        """Return n_c^(−1/4), (classes,)."""
        assert self.data is not None  # the engine sets it while the client works
        counts = torch.bincount(self.data.y, minlength=self.task.classes)
        return {MARGINS: counts.to(self.data.x.dtype).clamp(min=ABSENT) ** -0.25}

    def losses(
        self, nets: Mapping[str, Callable[[Tensor], Any]], batch: Batch, context: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the cross-entropy of the calibrated logits."""
        logits = nets["model"](batch.x).logits
        return {"model": batch.cross_entropy(logits - self.params.tau * context[MARGINS])}


class FedLC(FedAvg):
    """Averages models as FedAvg does; clients lower the logits of their rare classes in training, by τ n_c^(−1/4).

    Predictions are not calibrated. In the paper's formula the denominator leaves the true class out, which has no
    minimum; here it is over all classes, as in the softmax that it calibrates, so that τ = 0 is FedAvg. The paper
    says nothing of classes without windows, where n_c^(−1/4) is infinite; they count as 10⁻⁸ windows.
    """

    paper = "Zhang et al. 2022, arXiv:2209.00189"
    sends = "model down, model up; one common model"
    Client = FedLCClient
    Params = FedLCParams
