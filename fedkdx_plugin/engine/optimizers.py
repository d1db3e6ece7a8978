"""Optimisers of local training; each starts anew in every round, so that nothing of it is kept or sent.

`--optimizer` chooses one for all algorithms, except those whose clients take steps of their own (`Client.update`).
One client is trained by PyTorch's; several at once by the same equations over all their parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

SGD, MOMENTUM, ADAM, ADAMW = "sgd", "momentum", "adam", "adamw"
NAMES = (SGD, MOMENTUM, ADAM, ADAMW)
FACTOR = 0.9  # of momentum; this and what follows are PyTorch's defaults, where it has some
BETAS = (0.9, 0.999)
EPSILON = 1e-8
WEIGHT_DECAY = 0.01
NUMBERS = {SGD: 0, MOMENTUM: 1, ADAM: 3, ADAMW: 3}  # kept for each parameter within a round


class Optimizer:
    """Steps of an optimiser other than plain SGD for several networks; a step clears the gradients.

    Args:
        name: one of `NAMES`.
        groups: each network's parameters.
        rate: learning rate.
        bound: bound on the norm of each network's gradient (0: none).
    """

    def __init__(self, name: str, groups: Sequence[Sequence[nn.Parameter]], rate: float, bound: float) -> None:
        self._groups, self._bound = groups, bound
        everything = [parameter for group in groups for parameter in group]
        self._optimizer = _pytorchs(name, everything, rate)

    def __call__(self) -> None:
        """Move all parameters that have a gradient."""
        if self._bound > 0:
            for group in self._groups:
                clip_grad_norm_(group, self._bound)
        self._optimizer.step()
        self._optimizer.zero_grad()


def _pytorchs(name: str, parameters: list[nn.Parameter], rate: float) -> torch.optim.Optimizer:
    if name == MOMENTUM:
        return torch.optim.SGD(parameters, rate, FACTOR)
    if name == ADAM:
        return torch.optim.Adam(parameters, rate, BETAS, EPSILON)
    return torch.optim.AdamW(parameters, rate, BETAS, EPSILON, WEIGHT_DECAY)


def step(
    name: str,
    own: Tensor,
    gradient: Tensor,
    numbers: Sequence[Tensor],
    rates: Tensor,
    moving: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return parameters after a step, and what is kept for the next one.

    Args:
        name: one of `NAMES`.
        own: the parameters, (clients, ...).
        gradient: their gradient, after clipping.
        numbers: what was kept, `NUMBERS` tensors of the shape of `own`, zeros at first: of `momentum` the velocity; of
            `adam` and `adamw` both moments, and the number of steps that each parameter has taken.
        rates: learning rates, with which `own` can be multiplied.
        moving: which parameters are trained in this step, bool, of the shape of `own`; None: all.
    """
    new: tuple[Tensor, ...]
    if name == SGD:
        return own - gradient * rates, ()
    if name == MOMENTUM:
        (velocity,) = numbers
        new = (FACTOR * velocity + gradient,)
        moved = own - rates * new[0]
    else:
        first, second, count = numbers
        first, second = (
            beta * old + (1 - beta) * value
            for beta, old, value in zip(BETAS, (first, second), (gradient, gradient.square()), strict=True)
        )
        count = count + 1
        new = first, second, count
        start = own * (1 - rates * WEIGHT_DECAY) if name == ADAMW else own
        deviation = (second / (1 - BETAS[1] ** count)).sqrt() + EPSILON
        moved = start - rates * (first / (1 - BETAS[0] ** count)) / deviation
    if moving is None:
        return moved, new
    return torch.where(moving, moved, own), tuple(
        torch.where(moving, value, old) for value, old in zip(new, numbers, strict=True)
    )
