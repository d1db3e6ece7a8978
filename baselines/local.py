"""Local: every client trains alone, a lower bound for personalised methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from baselines.fedavg import FedAvg, FedAvgClient
from registry.parameters import Params, option

ALL, SELECTED = "all", "selected"


@dataclass(frozen=True)
class LocalParams(Params):
    """Hyper-parameters of training alone."""

    local_rounds: str = option(
        ALL,
        "who trains in a round: all clients, as none waits for a server; or the selected ones, for equal work",
        choices=(ALL, SELECTED),
    )


class LocalClient(FedAvgClient):
    """Keeps its whole model private, so that FedAvg has nothing to average."""

    private = ("model.*",)


class Local(FedAvg):
    """Trains each client alone, without sharing any weights: a lower bound for personalised methods.

    A client that needs no server trains in every round. With a join ratio of 0.4 it makes 2.5 times the training steps
    of a client of another method; `local_rounds=selected` compares at equal work.
    """

    paper = "training alone; see McMahan et al. 2017, arXiv:1602.05629"
    sends = "no weights: empty messages down, only the number of windows up; own model"
    Client = LocalClient
    Params = LocalParams
    averages = False

    @classmethod
    def trains_everyone(cls, params: Any) -> bool:
        """Return whether clients do not wait until they are selected."""
        return bool(params.local_rounds == ALL)
