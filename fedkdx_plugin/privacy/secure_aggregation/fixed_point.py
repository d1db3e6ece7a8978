"""Tensors as whole numbers modulo 2^64 that can be added up, and the mean of the tensors out of their sum.

A client with weight w (its number of samples) turns a value x into round(w x 2^f), after x was clipped to ±RANGE. With
n clients, each of a weight of at most MOST_WEIGHT, f is chosen so that the sum is at most 2^62 whatever they hold: it
cannot overflow. Beside its values each client adds its weight and how many of its values were clipped, so that the sum
tells the total of both, and no client's. The mean, Σ round(w x 2^f) / (2^f Σ w), is off by at most n / (2^(f+1) Σ w),
beside the rounding of float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedkdx_plugin.privacy.secure_aggregation.masks import Values
from registry.messages import BadMessage, Message
from registry.text import shown

RANGE_BITS, WEIGHT_BITS, SUM_BITS = 16, 20, 62
RANGE, MOST_WEIGHT = 2.0**RANGE_BITS, 2**WEIGHT_BITS
MOST_CLIENTS = 2**16
MOST_TENSORS, MOST_VALUES = 10**5, 2**28  # of a reply
COUNTS = 2  # numbers behind a reply's values: weight, and how many values were clipped
TYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}


def fraction_bits(clients: int) -> int:
    """Return f, the number of binary places of values that so many clients add up. Raises ValueError: too many."""
    if not 1 <= clients <= MOST_CLIENTS:
        raise ValueError(f"{clients} clients; from 1 to {MOST_CLIENTS} can be summed")
    return SUM_BITS - RANGE_BITS - WEIGHT_BITS - (clients - 1).bit_length()


def largest_error(clients: int, weight: int) -> float:
    """Return the bound on a mean's error by the rounding of each client's values.

    Args:
        clients: number of clients in the sum, as of `fraction_bits`.
        weight: their total weight.
    """
    return float(clients / (2.0 ** (fraction_bits(clients) + 1) * weight))


@dataclass(frozen=True)
class Layout:
    """Names, shapes and types of a reply's tensors, in the order in which their values are added up."""

    tensors: tuple[tuple[str, tuple[int, ...], str], ...]

    @staticmethod
    def of(reply: Message) -> Layout:
        """Return a reply's layout. Raises BadMessage: it holds what cannot be added up."""
        kinds = {kind: name for name, kind in TYPES.items()}
        for name, tensor in reply.tensors.items():
            if tensor.dtype not in kinds:
                raise BadMessage(f"tensor '{name}' is of {tensor.dtype}, which cannot be added up")
        tensors = sorted((name, tuple(own.shape), kinds[own.dtype]) for name, own in reply.tensors.items())
        return Layout(tuple(tensors))

    def to_meta(self) -> list[list[Any]]:
        """Return it as metadata of a message."""
        return [[name, list(shape), kind] for name, shape, kind in self.tensors]

    @staticmethod
    def from_meta(found: Any) -> Layout:
        """Read what `to_meta` returned. Raises BadMessage unless all of it is of its type and within its bounds."""
        if not isinstance(found, list) or len(found) > MOST_TENSORS:
            raise BadMessage("its layout is no list of tensors")
        layout = Layout(tuple(map(_tensor, found)))
        names = [name for name, _, _ in layout.tensors]
        if names != sorted(set(names)) or layout.size > MOST_VALUES:
            raise BadMessage(f"its layout has {layout.size} values, or names that are not in their order")
        return layout

    @property
    def size(self) -> int:
        """Number of values."""
        return sum(math.prod(shape) for _, shape, _ in self.tensors)

    def zeros(self) -> Message:
        """Return a reply of this layout by which its form can be checked; it takes no memory."""
        tensors = {name: torch.zeros((), dtype=TYPES[kind]).expand(shape) for name, shape, kind in self.tensors}
        return Message(tensors, {"samples": 1})

    def encode(self, tensors: Mapping[str, Tensor], weight: int, clients: int) -> tuple[Values, int]:
        """Return what a client adds to the sum, (size + COUNTS,), and how many of its values were clipped.

        Args:
            tensors: finite, of this layout.
            weight: w, from 1 to MOST_WEIGHT.
            clients: n.

        Raises:
            ValueError: the weight is out of range.
        """
        if not 1 <= weight <= MOST_WEIGHT:
            raise ValueError(f"{weight} samples; from 1 to {MOST_WEIGHT} can be summed")
        parts = [tensors[name].detach().cpu().to(torch.float64).reshape(-1).numpy() for name, _, _ in self.tensors]
        values = np.concatenate(parts) if parts else np.empty(0)
        beyond = np.abs(values) > RANGE
        scaled = np.rint(np.clip(values, -RANGE, RANGE) * (weight * 2.0 ** fraction_bits(clients)))
        clipped = int(beyond.sum())
        counts = np.array([weight, clipped], dtype=np.int64)
        return np.concatenate([scaled.astype(np.int64), counts]).view(np.uint64), clipped

    def decode(self, total: Values, clients: int) -> Mean:
        """Return the mean out of a sum.

        Args:
            total: sum of what the clients added, modulo 2^64.
            clients: n.

        Raises:
            BadMessage: no honest clients' values have this sum.
        """
        signed = total.view(np.int64)
        *_, weight, clipped = signed.tolist()
        if not 1 <= weight <= clients * MOST_WEIGHT or not 0 <= clipped <= clients * self.size:
            raise BadMessage("the sum's counts are out of range")
        scale = 2.0 ** fraction_bits(clients)
        values = torch.from_numpy(signed[:-COUNTS].astype(np.float64)) / (scale * weight)
        if bool((values.abs() > RANGE).any()):
            raise BadMessage(f"the sum is of values beyond ±{RANGE:.0f}")
        tensors, start = {}, 0
        for name, shape, kind in self.tensors:
            count = math.prod(shape)
            tensors[name] = values[start : start + count].reshape(shape).to(TYPES[kind])
            start += count
        return Mean(Message(tensors, {"samples": weight}), clipped)


@dataclass(frozen=True)
class Mean:
    """Knowledge that a server gains of its clients' replies.

    Attributes:
        reply: one reply with the mean of their tensors, weighted by their samples, and the total of these.
        clipped: how many of all clients' values were clipped to ±RANGE.
    """

    reply: Message
    clipped: int


def _tensor(found: Any) -> tuple[str, tuple[int, ...], str]:
    try:
        name, shape, kind = found
        right = isinstance(name, str) and kind in TYPES and len(shape) <= 16
        right = right and all(type(size) is int and 0 <= size <= MOST_VALUES for size in shape)
    except (TypeError, ValueError):
        right = False
    if not right:
        raise BadMessage(f"its layout has the tensor {shown(repr(found))}")
    return name, tuple(shape), kind
