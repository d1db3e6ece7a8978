"""FedKDX+: FedKDX of the paper with the additions of this project (see `additions`)."""

from __future__ import annotations

from dataclasses import dataclass

from fedkdx_plugin.algorithm.additions import AdditionsClient, AdditionsParams, AdditionsServer
from fedkdx_plugin.algorithm.fedkdx import FedKDX, FedKDXClient, FedKDXParams


@dataclass(frozen=True)
class FedKDXPlusParams(AdditionsParams, FedKDXParams):
    """Hyper-parameters of the additions and of FedKDX."""


class FedKDXPlusClient(AdditionsClient, FedKDXClient):
    """Minimises the losses of FedKDX."""

    private = (*FedKDXClient.private, *AdditionsClient.private)


class FedKDXPlus(AdditionsServer, FedKDX):
    """Adds to FedKDX: teachers start from the student, both predict, differences down, 8 bits, error feedback."""

    paper = "Vu et al. 2026, FedKDX, with additions of this project"
    sends = "compressed student updates up, differences down; own teacher and student"
    Client = FedKDXPlusClient
    Params = FedKDXPlusParams
