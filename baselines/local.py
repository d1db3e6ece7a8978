"""Local: every client trains alone, a lower bound for personalised methods."""

from __future__ import annotations

from baselines.fedavg import FedAvg, FedAvgClient


class LocalClient(FedAvgClient):
    """Keeps its whole model private, so that FedAvg has nothing to average."""

    private = ("model.*",)


class Local(FedAvg):
    """Trains each client alone, without any communication: a lower bound for personalised methods."""

    paper = "no communication; see McMahan et al. 2017, arXiv:1602.05629"
    sends = "sends nothing; own model"
    Client = LocalClient
    averages = False
