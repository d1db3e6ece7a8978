"""Normalisation layers of a model, exchanged for those of another kind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import gcd

import torch
from torch import nn

NORMS = ("batch", "group", "layer", "none")
GROUPS = 8  # of channels, or the largest number that divides both 8 and the number of channels


def with_norm(module: nn.Module, norm: str) -> nn.Module:
    """Exchange every batch norm in a network, in place, and return it.

    Group norm (Wu and He 2018, arXiv:1803.08494) and layer norm see each window by itself: nothing depends on who else
    is in a batch, no statistics are sent or averaged, and batches may be of one window.

    Args:
        module: the network.
        norm: 'batch' leaves it as it is; 'group' normalises 8 groups of channels over time, 'layer' all channels
            together; 'none' leaves normalisation out.
    """
    if norm == "batch":
        return module
    for part in list(module.modules()):
        for name, child in part.named_children():
            if is_batch_norm(child):
                setattr(part, name, _other(child, norm))
    return _other(module, norm) if is_batch_norm(module) else module


def is_batch_norm(module: nn.Module) -> bool:
    """Return whether a layer is batch norm of any number of dimensions."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


@contextmanager
def statistics_kept(nets: Iterable[nn.Module]) -> Iterator[None]:
    """Put all buffers of networks, running statistics of batch norm above all, back after the block as they were.

    For a pass in training mode that is to leave no trace.
    """
    buffers = [buffer for net in nets for buffer in net.buffers()]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(old)


def _other(batch_norm: nn.Module, norm: str) -> nn.Module:
    assert isinstance(batch_norm, nn.modules.batchnorm._BatchNorm)
    if norm == "none":
        return nn.Identity()
    channels = batch_norm.num_features
    groups = 1 if norm == "layer" else gcd(GROUPS, channels)
    return nn.GroupNorm(groups, channels, batch_norm.eps, batch_norm.affine)
