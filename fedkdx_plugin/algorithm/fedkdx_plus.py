"""FedKDX+: FedKDX of the paper with what this project adds to it (see `additions`)."""

from __future__ import annotations

from dataclasses import dataclass

from fedkdx_plugin.algorithm.additions import AdditionsClient, AdditionsParams, AdditionsServer
from fedkdx_plugin.algorithm.fedkdx import FedKDX, FedKDXClient, FedKDXParams


@dataclass(frozen=True)
class FedKDXPlusParams(AdditionsParams, FedKDXParams):
    """Hyper-parameters of FedKDX, and of the additions."""


class FedKDXPlusClient(AdditionsClient, FedKDXClient):
    """Minimises what FedKDX's client does."""


class FedKDXPlus(AdditionsServer, FedKDX):
    """FedKDX with a teacher that starts from the student, both predicting, differences down, 8 bits, error feedback."""

    paper = "Vu et al. 2026, FedKDX, with additions of this project"
    sends = "compressed student updates up, differences down; own teacher and student"
    Client = FedKDXPlusClient
    Params = FedKDXPlusParams
