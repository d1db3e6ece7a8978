"""FedKDX: Federated Learning with Negative Knowledge Distillation for Enhanced Healthcare AI Systems, 2026."""

from __future__ import annotations

from fedkdx_plugin.algorithm.client import FedKDXClient, FedKDXParams
from fedkdx_plugin.algorithm.student_server import StudentServer


class FedKDX(StudentServer):
    """Private teachers and a shared student distil into each other; only compressed student updates travel."""

    paper = "Vu et al. 2026, FedKDX (Algorithm 1)"
    sends = "compressed student updates down and up; own teacher"
    Client = FedKDXClient
    Params = FedKDXParams
