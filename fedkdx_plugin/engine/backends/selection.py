"""Selection of the backend: by name, or the fastest that can run."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Mapping

import torch
from torch import nn

from fedkdx_plugin.engine.backends.base import Backend
from fedkdx_plugin.engine.backends.parallel import Parallel
from fedkdx_plugin.engine.backends.sequential import Sequential
from fedkdx_plugin.engine.backends.stacked.agreement import in_words
from fedkdx_plugin.engine.backends.stacked.backend import Stacked
from fedkdx_plugin.engine.backends.stacked.layers import reason_against
from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.dp_sgd import NOT_STACKED
from fedkdx_plugin.engine.training import Settings
from fedkdx_plugin.engine.workspace import Workspace
from registry.errors import UserError

NAMES = ("auto", "sequential", "parallel", "stacked")


def make(
    name: str,
    workspace: Workspace,
    data: DeviceData,
    settings: Settings,
    selected: int,
    client_memory: str = "device",
) -> Backend:
    """Make a backend; 'auto' stacks clients on a GPU, and uses processes on a CPU with several cores.

    Args:
        name: one of `NAMES`.
        workspace, data, settings: see `Backend`.
        selected: number of clients that train in a round.
        client_memory: see `Stacked`.

    Raises:
        UserError: the named backend cannot run here; the text says why.
    """
    on_cpu = data.test_x.device.type == "cpu"
    if name == "stacked" or (name == "auto" and not on_cpu):
        reason = f"--dp example: {NOT_STACKED}" if settings.dp_sgd else reason_against(workspace.nets)
        if not reason:
            try:
                return Stacked(workspace, data, settings, name == "stacked", client_memory, selected)
            except torch.cuda.OutOfMemoryError:
                raise
            except Exception as error:  # a network may be impossible to copy, probe, name ...
                reason = in_words(error)
        if name == "stacked":
            raise _unstackable(reason)
        print(f"clients are trained one by one: {reason}", file=sys.stderr)
    if name == "parallel" or (name == "auto" and on_cpu):
        check_parallel(name, data.test_x.device, selected)
        workers = min(torch.get_num_threads(), selected)
        if not _against_parallel(data.test_x.device, workers):
            return Parallel(workspace, data, settings, workers)
    return Sequential(workspace, data, settings)


def check_stacked(name: str, nets: Mapping[str, nn.Module]) -> None:
    """Raise UserError where the backend 'stacked' is named and networks show by their layers that it cannot run."""
    if name == "stacked" and (reason := reason_against(nets)):
        raise _unstackable(reason)


def _unstackable(reason: str) -> UserError:
    return UserError(f"--backend stacked: {reason}; auto takes what can run")


def check_parallel(name: str, device: torch.device, selected: int = 2) -> None:
    """Raise UserError where the backend 'parallel' is named and cannot run here.

    Args:
        name, selected: as of `make`; two clients, where their number is not known yet.
        device: of the data.
    """
    if name == "parallel" and (reason := _against_parallel(device, min(torch.get_num_threads(), selected))):
        raise UserError(f"--backend parallel: {reason}; auto takes what can run")


def _against_parallel(device: torch.device, workers: int) -> str:
    if device.type != "cpu":
        return f"it is for CPUs, and the data are on {device}"
    if workers < 2:
        return "it takes two clients a round and two threads (OMP_NUM_THREADS)"
    if "fork" not in multiprocessing.get_all_start_methods():
        return "this system cannot fork processes"
    return ""
