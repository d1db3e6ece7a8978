"""FedBN: Li et al., FedBN: Federated Learning on Non-IID Features via Local Batch Normalization, ICLR 2021."""

from __future__ import annotations

from typing import Any

from baselines.fedavg import FedAvg, FedAvgClient
from registry.errors import UserError
from registry.interface import Task, private_names


class FedBNClient(FedAvgClient):
    """Keeps its batch-norm layers: scale, shift and running statistics."""

    local_bn = True


class FedBN(FedAvg):
    """Averages all of the clients' models but batch norm, which each client keeps: FedAvg with `--bn local`.

    Deviation from Algorithm 1: clients are weighted by number of samples, as in FedAvg, instead of equally. A client
    that has never trained has the initial batch norm beside the averaged weights.
    """

    paper = "Li et al. 2021, arXiv:2102.07623"
    sends = "model without batch norm down and up; own batch norm"
    Client = FedBNClient

    @classmethod
    def check(cls, task: Task, params: Any) -> None:
        """Raise UserError for a model without batch norm, with which nothing would be kept."""
        if not private_names(cls.Client, task, cls.Client.build(task)):
            raise UserError(f"FedBN: {task.model_class.__name__} has no batch norm to keep; it would be FedAvg")
