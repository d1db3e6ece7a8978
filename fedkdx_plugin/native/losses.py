"""FedKDX's losses and their gradients as one operation, instead of about a hundred small ones of PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fedkdx_plugin.native import library, twin
from registry import functional
from registry.interface import Batch, Output

# functions that the compiled losses replace: of the paper's equations, and those that these take from
# `registry.functional`
EQUATIONS = ("apart", "nkd", "contrastive", "_equation_8")
SHARED = ("soften", "kd", "unit")
FUNCTIONS = (*EQUATIONS, *SHARED)
FEWEST, MOST = 8, 64  # windows of the batch on which both are compared: one for each class, within these bounds
# factors for every eight windows, powers of two, which cause no rounding:
SCALES = (1.0, 1.0, 1.0, 1.0, 1.0, 8.0, 2.0**-17, 2.0**-30)  # of the features: one is short, one too short
SPREADS = (1.0, 1.0, 1.0, 1.0, 4.0, 16.0, 64.0, 0.0)  # of the logits: some are certain, one is uniform

Losses = Callable[[Any, Output, Output, Batch], dict[str, Tensor]]


class Terms(NamedTuple):
    """Parameters of the terms besides cross-entropy: temperatures, γ, and weights; a term with weight 0 is left out.

    Features shorter than `shortest` are treated as having no direction.
    """

    tau: float
    gamma: float
    kd: float
    nkd: float
    tau_ctl: float
    ctl: float
    shortest: float


def compiled(method: Losses) -> Losses:
    """Decorate a client's method: `mutual` replaces it where it takes the batch and gives the same (see `twin`).

    The method finds `FUNCTIONS` in the module that it is written in. A method that overrides the decorated one is not
    replaced. The client has `params`, and `terms()`, which returns them as `Terms`, or None if `mutual` does not
    support them.
    """

    @functools.wraps(method)
    def losses(client: Any, teacher: Output, student: Output, batch: Batch) -> dict[str, Tensor]:
        terms = client.terms() if fits(teacher, student, batch) else None
        if terms is None or not _agrees(method, client, teacher, terms):
            return method(client, teacher, student, batch)
        loss_t, loss_s = mutual(teacher, student, batch.y, terms)
        return {"teacher": loss_t, "student": loss_s}

    return losses


def _agrees(method: Losses, client: Any, teacher: Output, terms: Terms) -> bool:
    """Return whether `mutual` agrees with the method for these parameters and sizes of networks."""
    operations, variables, shared = library.required(), method.__globals__, vars(functional)
    classes, size = teacher.logits.shape[1], teacher.features.shape[1]
    ours = (mutual, Mutual.forward, Mutual.backward, operations.mutual_losses, operations.contrastive_loss)
    of_batch = (F.cross_entropy, Batch.mean, Batch.cross_entropies)
    theirs = (*twin.made_of(variables, FUNCTIONS), method, method.__code__, *of_batch)

    def by_method(*batch: Any) -> Iterable[Tensor]:
        return method(client, *batch).values()

    def by_mutual(teacher: Output, student: Output, batch: Batch) -> Iterable[Tensor]:
        return mutual(teacher, student, batch.y, terms)

    def reasons() -> list[str]:
        pytorchs = _trial(by_method, classes, size, torch.float64)
        found = _trial(by_mutual, classes, size, torch.float32)
        differences = twin.difference(pytorchs, found, terms=max(classes, size, FEWEST))
        own = twin.replaced(method.__module__, variables, EQUATIONS, variables)
        return own + twin.replaced(method.__module__, variables, SHARED, shared) + differences

    kind = (type(client), repr(client.params), classes, size)
    return twin.agrees("losses of FedKDX", kind, [*ours, *theirs], reasons, [*variables.values(), *shared.values()])


def _trial(losses: Callable[..., Iterable[Tensor]], classes: int, size: int, dtype: torch.dtype) -> twin.Side:
    """Return losses on a trial batch as a side to compare; the batch has the same numbers in either precision."""
    rows = min(max(FEWEST, classes), MOST)
    spreads, scales = (
        torch.tensor(each, dtype=dtype, device="cpu").repeat(MOST)[:rows, None] for each in (SPREADS, SCALES)
    )
    by: dict[str, Tensor] = {}
    for seed, network in enumerate(("teacher", "student")):
        features = twin.random(rows, size, seed=seed).relu()
        features[seed] = 0
        by[f"the {network}'s features"] = features.to(dtype).requires_grad_()
        by[f"the {network}'s logits"] = (spreads * twin.random(rows, classes, seed=2 + seed)).to(dtype).requires_grad_()
    batch = Batch(torch.empty(rows, device="cpu"), torch.arange(rows, device="cpu") % classes)

    def values() -> dict[str, Tensor]:
        h_t, z_t, h_s, z_s = by.values()
        found = losses(Output(scales * h_t, z_t), Output(scales * h_s, z_s), batch)
        return dict(zip(("the teacher's loss", "the student's loss"), found, strict=True))

    return twin.Side(values, by)


def fits(teacher: Output, student: Output, batch: Batch) -> bool:
    """Return whether `mutual` takes these: float32, on a CPU, all rows real, classes int64 and without weights."""
    tensors = (*teacher, *student)
    of_a_kind = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
    whole = batch.mask is None and batch.weights is None and batch.y.dtype == torch.int64
    return of_a_kind and whole and library.operations() is not None


def mutual(teacher: Output, student: Output, y: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """Compute the mean losses of teacher and student over the batch; the gradient of each reaches its own side alone.

    Args:
        teacher, student: logits (n, classes) and features (n, size), of the same size.
        y: (n,), int64, true classes.
        terms: parameters of the terms; NKD of the teacher is the mutual one.

    Returns:
        two scalars.
    """
    inputs = (teacher.logits, student.logits, teacher.features, student.features, y, terms)
    losses: tuple[Tensor, Tensor] = Mutual.apply(*inputs)  # type: ignore[no-untyped-call]  # PyTorch gives it none
    return losses


class Mutual(torch.autograd.Function):
    """The operation of `mutual`."""

    @staticmethod
    def forward(
        ctx: Any, z_t: Tensor, z_s: Tensor, h_t: Tensor, h_s: Tensor, y: Tensor, terms: Terms
    ) -> tuple[Tensor, Tensor]:
        """Compute both losses, and their gradients by logits and features for `backward`."""
        z_t, z_s, y = z_t.contiguous(), z_s.contiguous(), y.contiguous()
        n, classes = z_t.shape
        room = torch.empty(8, classes, dtype=torch.float64)
        values, by = z_t.new_empty(2), [torch.empty_like(z_t), torch.empty_like(z_s)]
        library.required().mutual_losses(
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
            values += terms.ctl * library.required().contrastive_loss(
                *(h_t.data_ptr(), h_s.data_ptr()),
                *(n, size, terms.tau_ctl, terms.shortest),
                *(room.data_ptr(), *(tensor.data_ptr() for tensor in by[2:])),
            )
        ctx.save_for_backward(*by)
        ctx.ctl = terms.ctl
        return values[0], values[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_t: Tensor, by_s: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the stored gradients by those of the two losses."""
        logits, features = ctx.saved_tensors[:2], ctx.saved_tensors[2:]
        by = [own * arrives for own, arrives in zip(logits, (by_t, by_s), strict=True)]
        if features:
            by += [own * (ctx.ctl * arrives) for own, arrives in zip(features, (by_t, by_s), strict=True)]
        return (*by, *[None] * (6 - len(by)))
