"""Batches of windows, and the means over them by which losses are reduced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree


@dataclass(frozen=True, eq=False)
class Batch:
    """Batch of windows of one client; it unpacks as `x, y, mask = batch`.

    Transformations of `torch.func` carry it with all its tensors.

    Attributes:
        x: (n, channels, 1, time).
        y: (n,), int64.
        mask: (n,), bool, False for rows that only pad the batch; None if all rows are real.
        weights: (classes,), of the classes in cross-entropies (`--class-weights`); None: all count alike.
    """

    x: Tensor
    y: Tensor
    mask: Tensor | None = None
    weights: Tensor | None = None

    def __iter__(self) -> Iterator[Any]:
        """Yield x, y and mask."""
        yield from (self.x, self.y, self.mask)

    def __getitem__(self, place: Any) -> Any:
        """Return what is at a place, or a slice, of (x, y, mask)."""
        return (self.x, self.y, self.mask)[place]

    def rows(self, index: Tensor | slice) -> Batch:
        """Return the batch of some rows, with the same weights of classes."""
        mask = None if self.mask is None else self.mask[index]
        return Batch(self.x[index], self.y[index], mask, self.weights)

    def split(self, size: int) -> list[Batch]:
        """Return batches of `size` rows each, in order; the last one may have fewer."""
        return [self.rows(slice(start, start + size)) for start in range(0, len(self.y), size)]

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean of (n,) values over the real rows."""
        if self.mask is None:
            return values.mean()
        return torch.where(self.mask, values, 0).sum() / self.mask.sum().clamp(min=1)

    def weight(self) -> float | Tensor:
        """Return the sum of the weights w_y of all rows, none of which pads the batch: their number without weights."""
        return len(self.y) if self.weights is None else self.weights[self.y].sum()

    def cross_entropies(self, logits: Tensor) -> Tensor:
        """Return the cross-entropy of each row of logits (n, classes), (n,); its `mean` is `cross_entropy`.

        With weights of classes, a row's is w_y CE / w̄, where w̄ is the mean of w_y over the real rows.
        """
        losses = F.cross_entropy(logits, self.y, reduction="none")
        if self.weights is None:
            return losses
        weights = self.weights.to(losses.dtype)[self.y]
        return losses * weights / self.mean(weights).clamp(min=torch.finfo(losses.dtype).tiny)

    def cross_entropy(self, logits: Tensor) -> Tensor:
        """Return the mean cross-entropy of logits (n, classes) over the real rows: Σ w_y CE / Σ w_y with weights."""
        if self.mask is None and self.weights is None:
            return F.cross_entropy(logits, self.y)
        return self.mean(self.cross_entropies(logits))


def balanced(y: Tensor, classes: int, like: Tensor) -> Tensor:
    """Return n / (C n_c) for each class c, (classes,): weights by which each of the C classes counts alike.

    n_c of the n labels are c, and C classes occur; the weight of one that does not is 0. As scikit-learn's "balanced".

    Args:
        y: labels, (n,), int64.
        classes: number of classes.
        like: a tensor of the type wanted.
    """
    counts = (y.unsqueeze(1) == torch.arange(classes, device=y.device)).sum(0)
    present = (counts > 0).sum().clamp(min=1)
    return torch.where(counts > 0, len(y) / (present * counts.clamp(min=1)).to(like.dtype), 0)


def _parts(batch: Batch) -> tuple[list[Tensor | None], None]:
    return [batch.x, batch.y, batch.mask, batch.weights], None


_pytree.register_pytree_node(Batch, _parts, lambda parts, _: Batch(*parts))
