"""FedKD+: FedKD of Wu et al. 2022 with what this project adds to FedKDX, too, so that the two can be compared."""

from __future__ import annotations

from dataclasses import dataclass

from baselines.fedkd import FedKD, FedKDClient, FedKDParams
from fedkdx_plugin.algorithm.additions import AdditionsClient, AdditionsParams, AdditionsServer


@dataclass(frozen=True)
class FedKDPlusParams(AdditionsParams, FedKDParams):
    """Hyper-parameters of FedKD, and of the additions."""


class FedKDPlusClient(AdditionsClient, FedKDClient):
    """Minimises what FedKD's client does."""


class FedKDPlus(AdditionsServer, FedKD):
    """FedKD with a teacher that starts from the student, both predicting, differences down, 8 bits, error feedback."""

    paper = "Wu et al. 2022, doi:10.1038/s41467-022-29763-x, with additions of this project"
    sends = "compressed student updates up, differences down; own teacher and student"
    Client = FedKDPlusClient
    Params = FedKDPlusParams
