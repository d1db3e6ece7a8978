"""Replies far out of line with the others of their round are set aside, by name."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

import torch
from torch import Tensor

ENOUGH = 3  # replies of a round, from which on their median says what is usual


class Outliers:
    """Compares the norms of replies.

    What is compared is the norm of what a reply does to the server (`Server.contribution`), all floating-point tensors
    together, in float64. What is usual is the median of the
    round's norms; with fewer than `ENOUGH` replies, the median of the last round that had any.

    Args:
        factor: a reply is set aside whose norm is more than so many times the usual one, above 0.

    Attributes:
        usual: the norm that was usual in the last round; 0 before the first.
    """

    def __init__(self, factor: float) -> None:
        self.factor, self.usual = factor, 0.0

    def found(self, contributions: Mapping[int, Mapping[str, Tensor]]) -> dict[int, str]:
        """Return client -> why its reply is set aside, and note what is usual among the others."""
        norms = {id: norm(own) for id, own in contributions.items()}
        if not norms:
            return {}
        usual = statistics.median(norms.values()) if len(norms) >= ENOUGH else self.usual
        apart = {}
        if usual > 0:
            apart = {
                id: f"client {id}: a reply of norm {own:.3g}, more than {self.factor:g} times the usual {usual:.3g}"
                for id, own in norms.items()
                if not own <= self.factor * usual
            }
        others = [own for id, own in norms.items() if id not in apart]
        self.usual = statistics.median(others) if others else self.usual
        return apart


def norm(tensors: Mapping[str, Tensor]) -> float:
    """Return the Euclidean norm of all floating-point tensors together, computed in float64."""
    parts = [torch.linalg.vector_norm(tensor.double()) for tensor in tensors.values() if tensor.is_floating_point()]
    return float(torch.linalg.vector_norm(torch.stack(parts))) if parts else 0.0
