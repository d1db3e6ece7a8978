"""Compressed movements of the shared student, as both sides make and apply them (paper eq. 2, 9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedkdx_plugin.algorithm.compression import Compressed, compress_together, decompress

State = dict[str, Tensor]


class Sender:
    """Who makes compressed updates: a client of its training, the server of a round. The paper's way of doing it."""

    def gradient(self, change: State, rate: float) -> State:
        """Return the accumulated gradient that a change of the student stands for: `change`/`rate`."""
        return dict(zip(change, torch._foreach_div(list(change.values()), rate), strict=True))

    def compress(self, gradients: Sequence[State], epsilon: float) -> list[Compressed]:
        """Compress several gradients, each by itself, with energy threshold ε (eq. 9)."""
        return compress_together(gradients, epsilon)

    def sent(self, gradient: State, payload: State, rate: float) -> None:
        """Take note of what is sent of a gradient; by default there is nothing to note."""


def move(weights: Mapping[str, Tensor], payload: Mapping[str, Tensor], rate: float) -> None:
    """Apply eq. 2 in place: W ← W - rate · G. Both sides call this alone, so that their copies stay the same."""
    gradient = decompress(payload, {name: tensor.shape for name, tensor in weights.items()})
    torch._foreach_sub_(list(weights.values()), [gradient[name] for name in weights], alpha=rate)


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> State:
    """Return `one` - `other`, tensor by tensor, of the names of `one`."""
    return dict(zip(one, torch._foreach_sub(list(one.values()), [other[name] for name in one]), strict=True))


def size(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of all tensors together."""
    return sum(tensor.nbytes for tensor in tensors.values())


def group(tensors: Mapping[str, Tensor], key: int | str) -> State:
    """Return the tensors below `key/`, without it."""
    prefix = f"{key}/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def labelled(tensors: Mapping[str, Tensor], key: int | str) -> State:
    """Return what `group` takes apart: each name with `key/` before it."""
    return {f"{key}/{name}": tensor for name, tensor in tensors.items()}
