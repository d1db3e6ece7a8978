"""Compressed movements of the shared student, as both sides make and apply them (paper eq. 2, 9, 10)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedkdx_plugin.algorithm.compression import decompress, left_out


def move(weights: Mapping[str, Tensor], payload: Mapping[str, Tensor], rate: float) -> None:
    """Eq. 2 in place: W ← W - rate · G. Server and clients call this alone, so that their copies stay the same."""
    gradient = decompress(payload, {name: tensor.shape for name, tensor in weights.items()})
    torch._foreach_sub_(list(weights.values()), [gradient[name] for name in weights], alpha=rate)


def owed(change: Mapping[str, Tensor], rate: float, residual: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The gradient to send: `change`/`rate`, and what earlier ones left out, which is kept as a change: rates decay.

    Error feedback (Seide et al. 2014; Karimireddy et al., arXiv:1901.09847). The residual begins as {} and names
    only tensors of which something was left out.
    """
    whole = [tensor + residual[name] if name in residual else tensor for name, tensor in change.items()]
    return dict(zip(change, torch._foreach_div(whole, rate), strict=True))


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`one` - `other`, tensor by tensor, of the names of `one`."""
    return dict(zip(one, torch._foreach_sub(list(one.values()), [other[name] for name in one]), strict=True))


def residual_of(gradient: Mapping[str, Tensor], payload: Mapping[str, Tensor], rate: float) -> dict[str, Tensor]:
    """The change that a payload leaves out, to be owed next time."""
    return {name: rate * tensor for name, tensor in left_out(gradient, payload).items()}


def size(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors together."""
    return sum(tensor.nbytes for tensor in tensors.values())


def group(tensors: Mapping[str, Tensor], key: int | str) -> dict[str, Tensor]:
    """The tensors below `key/`, without it."""
    prefix = f"{key}/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def labelled(tensors: Mapping[str, Tensor], key: int | str) -> dict[str, Tensor]:
    """What `group` takes apart: each name with `key/` before it."""
    return {f"{key}/{name}": tensor for name, tensor in tensors.items()}
