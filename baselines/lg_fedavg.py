"""LG-FedAvg: Liang et al., Think Locally, Act Globally: FL with Local and Global Representations, 2020."""

from __future__ import annotations

from baselines.fedavg import FedAvg, FedAvgClient
from baselines.fedper import HEAD


class LGFedAvgClient(FedAvgClient):
    """Keeps all layers below the output layer, its local representation; trains them together with the shared head."""

    private = ("model.*", f"!{HEAD}")


class LGFedAvg(FedAvg):
    """Averages the output layers alone; each client keeps its own representation: h = g(l_k(x)), g ← Σ (n_k/n) g_k.

    Of the paper's auxiliary tasks for the local representation this is the supervised one. The authors start from a
    model that FedAvg has trained; here all start from the same random one, as in every other algorithm, and the head
    sees features that have learnt apart. A client that has never trained has the initial representation.
    """

    paper = "Liang et al. 2020, arXiv:2001.01523"
    sends = "head down and up; own representation"
    Client = LGFedAvgClient
