"""FedKD+: FedKD of Wu et al. 2022 with the additions of FedKDX+, so that the two can be compared."""

from __future__ import annotations

from dataclasses import dataclass

from baselines.fedkd import FedKD, FedKDClient, FedKDParams
from fedkdx_plugin.algorithm.additions import AdditionsClient, AdditionsParams, AdditionsServer


@dataclass(frozen=True)
class FedKDPlusParams(AdditionsParams, FedKDParams):
    """Hyper-parameters of the additions and of FedKD."""


class FedKDPlusClient(AdditionsClient, FedKDClient):
    """Minimises the losses of FedKD."""

    private = (*FedKDClient.private, *AdditionsClient.private)


class FedKDPlus(AdditionsServer, FedKD):
    """Adds to FedKD: teachers start from the student, both predict, differences down, 8 bits, error feedback."""

    paper = "Wu et al. 2022, doi:10.1038/s41467-022-29763-x, with additions of this project"
    sends = "compressed student updates up, differences down; own teacher and student"
    Client = FedKDPlusClient
    Params = FedKDPlusParams
