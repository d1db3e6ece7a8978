"""One training step of a client: losses, one backward for all its networks, clipping, and how parameters move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from fedkdx_plugin.engine import precision
from fedkdx_plugin.engine.optimizers import SGD, Optimizer
from fedkdx_plugin.native.sgd import ClipAndMove, clip_and_move
from registry import contract
from registry.blame import wrong
from registry.interface import Batch, Client, matches, moves_by_sgd
from registry.normalisation import statistics_kept

Move = Callable[[], None]


class Steps:
    """Training steps of a client that has received its message.

    Args:
        client: with its learning rate in place.
        nets: its networks.
        context: its context.
        bound: bound on the norm of each network's gradient (0: none).
        optimizer: how parameters move, a name of `optimizers.NAMES`.
        mixed: whether losses are computed in mixed precision (see `precision`).
    """

    def __init__(
        self,
        client: Client,
        nets: Mapping[str, nn.Module],
        context: Mapping[str, Tensor],
        bound: float,
        optimizer: str = SGD,
        mixed: bool = False,
    ) -> None:
        self.client, self.nets, self.context, self.mixed = client, nets, context, mixed
        self.trained = {name: net for name, net in nets.items() if name not in client.frozen}
        for name, net in nets.items():
            net.train(name in self.trained)
            net.zero_grad()
        groups = {name: list(net.parameters()) for name, net in self.trained.items()}
        self._move: Move
        if not moves_by_sgd(type(client)):
            self._move = _OwnMove(client, groups, context, bound)
        elif optimizer == SGD:
            self._move = mover(list(groups.values()), client.learning_rate, bound)
        else:
            self._move = Optimizer(optimizer, list(groups.values()), client.learning_rate, bound)
        self._repeats, self._taken = contract.repeats(client), 0  # steps on each batch, and those taken so far
        # one that remembers moves parameters that no loss reaches in this step, unless they are fixed
        own = (parameter for group in groups.values() for parameter in group if parameter.requires_grad)
        self._unreached = [] if optimizer == SGD else list(own)

    def still(self, patterns: Sequence[str]) -> list[nn.Parameter]:
        """Return the parameters that do not match the patterns, which `take` is to leave as they are."""
        named = ((f"{net}.{name}", p) for net, module in self.trained.items() for name, p in module.named_parameters())
        return [parameter for name, parameter in named if not matches(name, patterns)]

    def take(self, batch: Batch, still: Sequence[nn.Parameter] = ()) -> Tensor:
        """Take a step on a batch, without moving the parameters `still`; return the sum of its losses, detached."""
        with self._statistics():
            loss = self._backward(batch)
        for parameter in self._unreached:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for parameter in still:
            parameter.grad = None
        self._move()
        self._taken += 1
        return loss

    def _backward(self, batch: Batch) -> Tensor:
        """Compute the gradients of the losses on a batch; return their sum, detached."""
        with precision.mixed(self.mixed, batch.x.device):
            losses = contract.losses(self.client, self.client.losses(self.nets, batch, self.context))
        loss = reduce(add, losses.values())
        if not loss.requires_grad:
            raise wrong(self.client, "losses", "a loss that depends on a network that is trained", losses)
        loss.backward()
        return loss.detach()

    def _statistics(self) -> AbstractContextManager[None]:
        """Leave running statistics as they are in a step that repeats another: a batch counts once in them.

        Otherwise the last batch of a round would outweigh all others, by 1 - 0.9^repeats.
        """
        return statistics_kept(self.nets.values()) if self._taken % self._repeats else nullcontext()


def mover(groups: Sequence[Sequence[nn.Parameter]], rate: float, bound: float) -> Move:
    """Return a function that makes a step of plain SGD for several networks and clears the gradients.

    Args:
        groups: each network's parameters.
        rate: learning rate.
        bound: bound on the norm of each network's gradient (0: none).
    """
    everything = [parameter for group in groups for parameter in group]
    make = ClipAndMove if ClipAndMove.takes(everything) else clip_and_move
    return make(groups, rate, bound)


class _OwnMove:
    """Steps of a client class that overrides `Client.update`."""

    def __init__(
        self, client: Client, groups: Mapping[str, list[nn.Parameter]], context: Mapping[str, Tensor], bound: float
    ) -> None:
        self.client, self.groups, self.context, self.bound = client, groups, context, bound
        like = next(parameter for group in groups.values() for parameter in group)
        self.rate = like.new_tensor(client.learning_rate)
        self.step = torch.zeros((), dtype=torch.int64, device=like.device)

    @torch.no_grad()
    def __call__(self) -> None:
        """Move all parameters as the client says, and clear the gradients."""
        gradients = {}
        for name, group in self.groups.items():
            if self.bound > 0:
                clip_grad_norm_(group, self.bound)
            gradients[name] = _flat([torch.zeros_like(p) if p.grad is None else p.grad for p in group])
        weights = {name: _flat(group) for name, group in self.groups.items()}
        moved = contract.update(self.client, weights, gradients, self.rate, self.step, self.context)
        for name, group in self.groups.items():
            for parameter, values in zip(group, moved[name].split([p.numel() for p in group]), strict=True):
                parameter.copy_(values.view(parameter.shape))
                parameter.grad = None
        self.step += 1


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """Return the values of several tensors one after the other, (values,)."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])
