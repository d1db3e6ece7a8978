"""FedPer: Arivazhagan et al., Federated Learning with Personalization Layers, 2019."""

from __future__ import annotations

from baselines.fedavg import FedAvg, FedAvgClient

HEAD = "model.head.*"


class FedPerClient(FedAvgClient):
    """Keeps the output layer, its personalization layer; trains it together with the shared base layers."""

    private = (HEAD,)


class FedPer(FedAvg):
    """Averages the models up to the output layer, which each client keeps: (W_B, W_Pk), W_B ← Σ (n_k/n) W_Bk.

    The paper keeps one or more blocks at the end; here it is `head`, which every model has. A client that has never
    trained has the initial head on the shared layers.
    """

    paper = "Arivazhagan et al. 2019, arXiv:1912.00818"
    sends = "model without head down and up; own head"
    Client = FedPerClient
