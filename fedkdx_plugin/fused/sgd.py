"""Clipping and plain SGD as one operation."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedkdx_plugin.fused import native
from fedkdx_plugin.fused.native import POINTER, SIZE


class ClipAndMove:
    """Plain SGD of several networks, the norm of each one's gradient bounded as `clip_grad_norm_` does.

    Args:
        groups: each network's parameters: float32, on a CPU, without gaps in memory.
        rate: learning rate.
        bound: of a gradient's norm; 0: none.
    """

    def __init__(self, groups: Sequence[Sequence[nn.Parameter]], rate: float, bound: float) -> None:
        self.rate, self.bound = rate, bound
        self._operation = native.operations().clip_and_move
        self._groups = [(list(group), _pointers(group), _sizes(group)) for group in groups]

    @staticmethod
    def takes(parameters: Sequence[nn.Parameter]) -> bool:
        """Whether these can be moved so."""
        return native.operations() is not None and all(
            p.dtype == torch.float32 and p.device.type == "cpu" and p.untyped_storage().nbytes() == p.nbytes
            for p in parameters
        )

    def __call__(self) -> None:
        """Move all parameters that have a gradient, and forget it."""
        for parameters, places, sizes in self._groups:
            gradients = [_alike(p.grad, p) for p in parameters]
            self._operation(len(parameters), places, _pointers(gradients), sizes, self.bound, self.rate)
            for parameter in parameters:
                parameter.grad = None


def _alike(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """A gradient laid out in memory as its parameter; autograd makes nearly all of them so."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array:
    return (POINTER * len(tensors))(*[None if tensor is None else tensor.data_ptr() for tensor in tensors])


def _sizes(tensors: Sequence[Tensor]) -> ctypes.Array:
    return (SIZE * len(tensors))(*[tensor.numel() for tensor in tensors])
