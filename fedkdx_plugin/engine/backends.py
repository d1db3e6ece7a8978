"""Which backend does the work: by name, or the fastest that can."""

from __future__ import annotations

import multiprocessing

import torch

from fedkdx_plugin.engine.backend import Backend
from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.parallel import Parallel
from fedkdx_plugin.engine.sequential import Sequential
from fedkdx_plugin.engine.training import Settings
from fedkdx_plugin.engine.workspace import Workspace
from registry.errors import UserError

NAMES = ("auto", "sequential", "parallel")


def make(name: str, workspace: Workspace, data: DeviceData, settings: Settings, selected: int) -> Backend:
    """The backend asked for; 'auto' takes processes on a CPU where there are several cores and clients.

    Args:
        selected: number of clients that train in a round.

    Raises:
        UserError: the one asked for cannot run here; the text says why.
    """
    if name in ("auto", "parallel"):
        workers = min(torch.get_num_threads(), selected)
        reason = _against_parallel(data.test_x.device, workers)
        if not reason:
            return Parallel(workspace, data, settings, workers)
        if name == "parallel":
            raise UserError(f"--backend parallel: {reason}; auto takes what can run")
    return Sequential(workspace, data, settings)


def _against_parallel(device: torch.device, workers: int) -> str:
    if device.type != "cpu":
        return f"it is for CPUs, and the data are on {device}"
    if workers < 2:
        return "it takes two clients a round and two threads (OMP_NUM_THREADS)"
    if "fork" not in multiprocessing.get_all_start_methods():
        return "this system cannot fork processes"
    return ""
