"""Centralised: training on all data in one place, an upper bound for federated methods."""

from __future__ import annotations

from baselines.fedavg import FedAvg


class Centralised(FedAvg):
    """Trains one model on the data of all clients in one place: an upper bound, without privacy.

    A round makes as many passes over all training windows as a client would make over its own. The upload of the data
    is counted in the first round.
    """

    paper = "no federation: plain SGD on the pooled data"
    sends = "all windows up once; one common model"
    pools_data = True
    averages = False
    sums = False
