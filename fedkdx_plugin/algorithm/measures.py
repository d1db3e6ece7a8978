"""Shares of an update's rank and energy that a payload of `compression` keeps."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedkdx_plugin.algorithm.compression import FACTORS, dense_key


def energy_kept(payload: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the squared Frobenius norm of a payload as a share of that of all tensors, (), float64; 1 if that is 0.

    For factors it is the sum of squares of Σ times the lengths of U's columns and V's rows, which are orthogonal up to
    rounding. It is in [0, 1] for all finite values: they are divided by a power of two first, which changes no digit,
    so that no square overflows and those of the largest values do not vanish.
    """
    whole = _flat(list(tensors.values()))
    sent = _flat([_sizes(payload, name) for name in payload if not name.endswith((FACTORS[0], FACTORS[2]))])
    largest = torch.cat([whole, whole.new_zeros(1)]).abs().amax()
    power = torch.where(largest > 0, largest / (2 * torch.frexp(largest).mantissa), 1)
    energy, kept = ((values / power).square().sum() for values in (whole, sent))
    return torch.where(energy > 0, kept / energy, 1).clamp(max=1)


def _sizes(payload: Mapping[str, Tensor], name: str) -> Tensor:
    """Return the values of a tensor in a payload whose squares add up to its energy; for Σ, the singular values."""
    if not name.endswith(FACTORS[1]):
        return payload[name]
    left, right = (payload[name.removesuffix(FACTORS[1]) + factor].double() for factor in FACTORS[::2])
    sizes: Tensor = payload[name] * torch.linalg.vector_norm(left, dim=0) * torch.linalg.vector_norm(right, dim=1)
    return sizes


def _flat(tensors: list[Tensor]) -> Tensor:
    """Return all values, (n,), float64; flattened first, so that no sum depends on a tensor's memory layout."""
    return torch.cat([t.flatten() for t in tensors]).double() if tensors else torch.zeros(0, dtype=torch.float64)


def rank_share(payload: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> float:
    """Return the mean over matrices of R / min(P, Q), which is 1 for a matrix sent unchanged; NaN without matrices."""
    shares = []
    for name, shape in shapes.items():
        if len(shape) >= 2 and shape.numel() > 0:
            factor = payload.get(name + FACTORS[1]) if dense_key(name) not in payload else None
            shares.append(1.0 if factor is None else len(factor) / min(shape[0], shape.numel() // shape[0]))
    return sum(shares) / len(shares) if shares else float("nan")
