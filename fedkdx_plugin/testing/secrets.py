"""Check that what is private stays with the client: network state by name and by value, windows and labels."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.testing.case import AlgorithmCase, Heard, listen, run
from fedkdx_plugin.testing.made import make_data
from fedkdx_plugin.testing.running import Checks, require
from registry.interface import Task

CHECKS = Checks()


@CHECKS
def check_private_names(case: AlgorithmCase) -> None:
    """Require that no message, either way, names state that `Client.private` declares."""
    federation, heard = _overheard(case, case.task())
    _require_no_names(federation.workspace.private, heard, "Client.private")


@CHECKS
def check_private_values(case: AlgorithmCase) -> None:
    """Require that no upload holds the values of private state, under whatever name."""
    federation, heard = _overheard(case, case.task())
    _require_no_values(federation.workspace.private, federation, heard, "Client.private")


@CHECKS
def check_local_batch_norm(case: AlgorithmCase) -> None:
    """Require that batch norm stays with the client, by name and by value, where the user asks for it."""
    federation, heard = _overheard(case, case.task(local_bn=True))
    names = federation.workspace.private - case.federation().workspace.private
    _require_no_names(names, heard, "--bn local: send `shared()`, not `state()`")
    _require_no_values(names, federation, heard, "--bn local: send `shared()`, not `state()`")


@CHECKS
def check_windows_and_labels(case: AlgorithmCase) -> None:
    """Require that no message holds a client's windows or labels; pooling data is not a message of the algorithm."""
    data = make_data()
    federation = case.federation(data, rounds=2, join_ratio=1)
    heard = listen(federation)
    run(federation)
    windows = torch.cat([x.flatten(1) for x in data.train_x])
    for name, tensor in (*heard.up, *heard.down):
        if tensor.is_floating_point() and tensor.numel() and tensor.numel() % windows.shape[1] == 0:
            rows = tensor.reshape(-1, windows.shape[1]).to(windows.dtype)
            require(not (torch.cdist(rows, windows) == 0).any(), f"'{name}' in a message holds a training window")
        for y in data.train_y:
            require(not _equal(y, tensor), f"'{name}' in a message holds a client's labels, one by one")


def _overheard(case: AlgorithmCase, task: Task) -> tuple[Federation, Heard]:
    federation = case.federation(task=task, rounds=2, join_ratio=1)
    heard = listen(federation)
    run(federation)
    return federation, heard


def _require_no_names(names: frozenset[str], heard: Heard, declared: str) -> None:
    """Require that none of these names is in a message, nor one that ends with it."""
    for name, _ in (*heard.up, *heard.down):
        require(not name.endswith(tuple(names)), f"'{name}' is in a message, but private by {declared}")


def _require_no_values(names: frozenset[str], federation: Federation, heard: Heard, declared: str) -> None:
    """Require that no client's state of these names was uploaded.

    Left out are what the client had from the server and did not change, and weights of all ones and the like.
    """
    down, up = [tensor for _, tensor in heard.down], heard.up
    for kept in federation.workspace.kept:
        for private in sorted(kept.keys() & names):
            secret = kept[private]
            if secret.unique().numel() > 2 and not _among(secret, down):
                found = next((name for name, tensor in up if _equal(secret, tensor)), None)
                require(found is None, f"'{found}' in a reply holds '{private}', which is private by {declared}")


def _among(tensor: Tensor, others: Iterable[Tensor]) -> bool:
    return any(_equal(tensor, other) for other in others)


def _equal(secret: Tensor, other: Tensor) -> bool:
    """Return whether a tensor holds these values in this order, in whatever shape and type of floating point."""
    if other.numel() != secret.numel() or (secret.is_floating_point() and not other.is_floating_point()):
        return False
    return torch.equal(other.flatten(), secret.detach().flatten().to(other.dtype))
