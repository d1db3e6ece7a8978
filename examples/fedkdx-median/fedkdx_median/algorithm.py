"""FedMedian: Yin et al., Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates, 2018."""

from __future__ import annotations

from collections.abc import Mapping

from baselines.fedavg import FedAvg
from registry.aggregation import stacked
from registry.interface import Message, Round


class FedMedian(FedAvg):
    """Takes the coordinate-wise median of the clients' models, which a few bad clients cannot pull away."""

    paper = "Yin et al. 2018, arXiv:1803.01498"
    averages = False

    def aggregate(self, replies: Mapping[int, Message], round: Round) -> None:
        self.weights = {name: values.quantile(0.5, dim=0) for name, values in stacked(replies).items()}
