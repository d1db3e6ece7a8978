"""Compressed updates of the shared student: made and applied by both sides (paper eq. 2, 9)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedkdx_plugin.algorithm.compression import Compressed, compress_together, decompress

State = dict[str, Tensor]


class Sender:
    """Makes compressed updates as the paper does: a client after its training, the server after a round."""

    def gradient(self, change: State, rate: float) -> State:
        """Return the accumulated gradient of a change of the student: `change`/`rate`."""
        return dict(zip(change, torch._foreach_div(list(change.values()), rate), strict=True))

    def compress(self, gradients: Sequence[State], epsilon: float) -> list[Compressed]:
        """Compress several gradients, each separately, with energy threshold ε (eq. 9)."""
        return compress_together(gradients, epsilon)

    def sent(self, gradient: State, payload: State, rate: float) -> None:
        """Store what is needed later of a gradient that was sent as `payload`; by default nothing."""


def move(weights: Mapping[str, Tensor], payload: Mapping[str, Tensor], rate: float) -> None:
    """Apply eq. 2 in place: W ← W - rate · G. Both sides use only this function, so that their copies stay equal."""
    gradient = decompress(payload, {name: tensor.shape for name, tensor in weights.items()})
    torch._foreach_sub_(list(weights.values()), [gradient[name] for name in weights], alpha=rate)


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> State:
    """Return `one` - `other`, tensor by tensor, for the names of `one`."""
    return dict(zip(one, torch._foreach_sub(list(one.values()), [other[name] for name in one]), strict=True))


def size(tensors: Mapping[str, Tensor]) -> int:
    """Return the number of bytes of all tensors."""
    return sum(tensor.nbytes for tensor in tensors.values())


def group(tensors: Mapping[str, Tensor], key: int | str) -> State:
    """Return the tensors whose names begin with `key/`, without this prefix."""
    prefix = f"{key}/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def labelled(tensors: Mapping[str, Tensor], key: int | str) -> State:
    """Return the tensors with `key/` put before each name; `group` is the inverse."""
    return {f"{key}/{name}": tensor for name, tensor in tensors.items()}
