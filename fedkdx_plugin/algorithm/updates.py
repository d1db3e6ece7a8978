"""Compressed movements of the shared student, as both sides make and apply them (paper eq. 2, 9, 10)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from fedkdx_plugin.algorithm.compression import compress, compress_with_feedback, decompress


def move(weights: Mapping[str, Tensor], payload: Mapping[str, Tensor], rate: float) -> None:
    """Eq. 2 in place: W ← W - rate · G. Server and clients call this alone, so that their copies stay the same."""
    gradient = decompress(payload, {name: tensor.shape for name, tensor in weights.items()})
    for name, tensor in weights.items():
        tensor.sub_(gradient[name], alpha=rate)


def send(
    change: Mapping[str, Tensor],
    rate: float,
    epsilon: float,
    residual: Mapping[str, Tensor] | None,
    quantise: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The payload for the gradient `change`/`rate`, and the change it leaves out, to be added next time.

    Without a residual, no error feedback: nothing is left over. Residuals are kept as changes, since rates decay.
    """
    gradient = {name: tensor / rate for name, tensor in change.items()}
    if residual is None:
        return compress(gradient, epsilon, quantise).payload, {}
    waiting = {name: tensor / rate for name, tensor in residual.items()}
    compressed, left = compress_with_feedback(gradient, waiting, epsilon, quantise)
    return compressed.payload, {name: rate * tensor for name, tensor in left.items()}


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
