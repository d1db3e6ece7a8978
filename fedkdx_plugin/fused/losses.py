"""FedKDX's losses and their gradients as one operation: some hundred of PyTorch's on a few numbers each."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fedkdx_plugin.fused import native
from registry.interface import Batch, Output


class Terms(NamedTuple):
    """What is minimised beside cross-entropy: temperatures, γ, and weights; a term whose weight is 0 is left out."""

    tau: float
    gamma: float
    kd: float
    nkd: float
    tau_ctl: float
    ctl: float


def fits(teacher: Output, student: Output, batch: Batch) -> bool:
    """Whether `mutual` takes these: float32, on a CPU, all rows real, classes int64."""
    tensors = (*teacher, *student)
    of_a_kind = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
    whole = batch.mask is None and batch.y.dtype == torch.int64
    return of_a_kind and whole and native.operations() is not None


def mutual(teacher: Output, student: Output, y: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Means over the batch of what teacher and student minimise; the gradient of each reaches its own side alone.

    Args:
        teacher, student: logits (n, classes) and features (n, size), of the same size.
        y: (n,), int64, true classes.
        terms: NKD of the teacher is the mutual one.

    Returns:
        Two scalars.
    """
    return Mutual.apply(teacher.logits, student.logits, teacher.features, student.features, y, terms)


class Mutual(torch.autograd.Function):
    """See `mutual`."""

    @staticmethod
    def forward(
        ctx: Any, z_t: Tensor, z_s: Tensor, h_t: Tensor, h_s: Tensor, y: Tensor, terms: Terms
    ) -> tuple[Tensor, Tensor]:
        z_t, z_s, y = z_t.contiguous(), z_s.contiguous(), y.contiguous()
        n, classes = z_t.shape
        room = torch.empty(8, classes, dtype=torch.float64)
        values, by = z_t.new_empty(2), [torch.empty_like(z_t), torch.empty_like(z_s)]
        native.operations().mutual_losses(
            *(z_t.data_ptr(), z_s.data_ptr(), y.data_ptr()),
            *(n, classes),
            *(terms.tau, terms.gamma, terms.kd, terms.nkd),
            *(room.data_ptr(), values.data_ptr(), *(tensor.data_ptr() for tensor in by)),
        )
        if terms.ctl:
            h_t, h_s = h_t.contiguous(), h_s.contiguous()
            n, size = h_t.shape
            by += [torch.empty_like(h_t), torch.empty_like(h_s)]
            room = h_t.new_empty(n * (2 * size + n + 2))
            values += terms.ctl * native.operations().contrastive_loss(
                *(h_t.data_ptr(), h_s.data_ptr()),
                *(n, size, terms.tau_ctl),
                *(room.data_ptr(), *(tensor.data_ptr() for tensor in by[2:])),
            )
        ctx.save_for_backward(*by)
        ctx.ctl = terms.ctl
        return values[0], values[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_t: Tensor, by_s: Tensor) -> tuple[Tensor | None, ...]:
        logits, features = ctx.saved_tensors[:2], ctx.saved_tensors[2:]
        by = [own * arrives for own, arrives in zip(logits, (by_t, by_s), strict=True)]
        if features:
            by += [own * (ctx.ctl * arrives) for own, arrives in zip(features, (by_t, by_s), strict=True)]
        return (*by, *[None] * (6 - len(by)))
