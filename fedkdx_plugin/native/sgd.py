"""Gradient clipping and plain SGD as one operation."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from fedkdx_plugin.native import library, twin
from fedkdx_plugin.native.library import POINTER, SIZE

SHAPES = ((16, 3, 1, 9), (7, 33))  # of a network's parameters on which both implementations are compared
RATE = 0.5
BOUNDS = (0.0, 1.0, 1e6)  # on the gradient's norm: none, one that changes the gradient, one that does not


def clip_and_move(groups: Sequence[Sequence[nn.Parameter]], rate: float, bound: float) -> Callable[[], None]:
    """Return a function that makes a step of plain SGD for several networks by PyTorch and clears the gradients.

    Args:
        groups: each network's parameters.
        rate: learning rate.
        bound: bound on the norm of each network's gradient (0: none).
    """

    @torch.no_grad()
    def move() -> None:
        for group in groups:
            if bound > 0:
                nn.utils.clip_grad_norm_(group, bound)
            moved: list[Tensor] = [parameter for parameter in group if parameter.grad is not None]
            if moved:
                torch._foreach_sub_(moved, [p.grad for p in moved if p.grad is not None], alpha=rate)
            for parameter in moved:
                parameter.grad = None

    return move


class ClipAndMove:
    """The step of `clip_and_move` as one compiled operation.

    Args:
        groups: each network's parameters: float32, on a CPU, without gaps in memory.
        rate, bound: see `clip_and_move`.
    """

    def __init__(self, groups: Sequence[Sequence[nn.Parameter]], rate: float, bound: float) -> None:
        self.rate, self.bound = rate, bound
        self._operation = library.required().clip_and_move
        self._groups = [(list(group), _pointers(group), _sizes(group)) for group in groups]

    @staticmethod
    def takes(parameters: Sequence[nn.Parameter]) -> bool:
        """Return whether the operation can be used for these parameters and agrees with PyTorch."""
        fit = library.operations() is not None and all(
            p.dtype == torch.float32 and p.device.type == "cpu" and p.untyped_storage().nbytes() == p.nbytes
            for p in parameters
        )
        return fit and _agrees()

    def __call__(self) -> None:
        """Move all parameters that have a gradient, and clear it."""
        for parameters, places, sizes in self._groups:
            gradients = [_alike(p.grad, p) for p in parameters]
            self._operation(len(parameters), places, _pointers(gradients), sizes, self.bound, self.rate)
            for parameter in parameters:
                parameter.grad = None


def _agrees() -> bool:
    """Return whether both implementations move parameters equally, clipped and not."""
    ours = (ClipAndMove.__init__, ClipAndMove.__call__, library.required().clip_and_move)
    theirs = (*twin.made_of(globals(), ["clip_and_move"]), nn.utils.clip_grad_norm_)
    return twin.agrees("clipping and SGD", None, [*ours, *theirs], _reasons)


def _reasons() -> list[str]:
    pytorchs, compiled = _side(clip_and_move, torch.float64), _side(ClipAndMove, torch.float32)
    values = sum(torch.Size(shape).numel() for shape in SHAPES)  # of a network
    foreign = twin.replaced(__name__, globals(), ["clip_and_move"], globals())
    return foreign + twin.difference(pytorchs, compiled, terms=values)


def _side(mover: Callable[..., Callable[[], None]], dtype: torch.dtype) -> twin.Side:
    """Return the parameters of two networks after a step as a side to compare; the last one has no gradient."""

    def values() -> dict[str, Tensor]:
        moved: dict[str, Tensor] = {}
        for bound in BOUNDS:
            drawn = [twin.random(*shape, seed=seed).to(dtype) for seed, shape in enumerate((*SHAPES, *SHAPES))]
            parameters = list(map(nn.Parameter, drawn))
            for seed, parameter in enumerate(parameters[:-1]):
                parameter.grad = twin.random(*parameter.shape, seed=len(drawn) + seed).to(dtype)
            mover([parameters[: len(SHAPES)], parameters[len(SHAPES) :]], RATE, bound)()
            names = [f"parameter {place} (norm bounded by {bound:g})" for place in range(len(parameters))]
            moved |= dict(zip(names, parameters, strict=True))
        return moved

    return twin.Side(values, {})


def _alike(gradient: Tensor | None, parameter: Tensor) -> Tensor | None:
    """Return a gradient in the memory layout of its parameter; autograd makes nearly all of them in it."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def _pointers(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    return (POINTER * len(tensors))(*[None if tensor is None else tensor.data_ptr() for tensor in tensors])


def _sizes(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_ssize_t]:
    return (SIZE * len(tensors))(*[tensor.numel() for tensor in tensors])
