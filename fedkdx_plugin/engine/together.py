"""Several clients' networks in one set of tensors with a leading axis of clients, trained step by step together."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fedkdx_plugin.engine.training import Settings, batches
from fedkdx_plugin.engine.vectorised import Rows, convert
from fedkdx_plugin.fused.native import left_out
from registry.interface import Batch, Client, Round, float_state

ALIGNED = (
    16  # values: what a client's share of a flat tensor is a multiple of, so that products may read in large words
)
PREFIX = "net_"  # so that no network's name is one that `nn.Module` has already


class Ready(NamedTuple):
    """A client that has received its message.

    Attributes:
        client: with id, training windows and learning rate in place.
        context: as it gave it.
        state: its own copy of its networks' floating-point state, by full name.
    """

    client: Client
    context: Mapping[str, Tensor]
    state: Mapping[str, Tensor]


class Together(nn.Module):
    """The losses of a client class as a function of explicit state, which `torch.vmap` maps over clients.

    Losses are those of a stand-in that has `task` and `params` but nothing of a client's own: what they may use.

    Args:
        client: any of the clients.
        nets: the networks; copied.
    """

    def __init__(self, client: Client, nets: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.rows = Rows()
        self.copies = convert(nets, self.rows)
        for name, net in self.copies.items():
            self.add_module(PREFIX + name, net)
        self.frozen = client.frozen
        self._stand_in = object.__new__(type(client))
        self._stand_in.task, self._stand_in.params = client.task, client.params
        self.layouts = {name: _Layout(name, net) for name, net in self.copies.items() if name not in self.frozen}

    def forward(self, x: Tensor, y: Tensor, mask: Tensor | None, context: Mapping[str, Tensor]) -> Tensor:
        """Sum of the losses on a batch."""
        self.rows.mask = mask
        try:
            losses = self._stand_in.losses(dict(self.copies), Batch(x, y, mask), context)
        finally:
            self.rows.mask = None
        return reduce(add, losses.values())

    def losses_of(self, state: Mapping[str, Tensor], batch: Batch, context: Mapping[str, Tensor]) -> Tensor:
        """(clients,), from state, batch and context with a leading axis of clients; updates running statistics."""

        def one(state: Mapping, x: Tensor, y: Tensor, mask: Tensor | None, context: Mapping) -> Tensor:
            return functional_call(self, state, (x, y, mask, context), tie_weights=False)

        named = {PREFIX + name: tensor for name, tensor in state.items()}
        with left_out():
            return vmap(one, (0, 0, 0, None if batch.mask is None else 0, 0))(named, *batch, dict(context))

    def training_mode(self) -> None:
        for name, net in self.copies.items():
            net.train(name not in self.frozen)

    def logits(self, net: str, states: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """(clients, n, classes) of a network in several states, each on its own windows (clients, n, ...)."""
        module = self.copies[net].eval()
        own = {name.removeprefix(f"{net}."): tensor for name, tensor in states.items()}
        return vmap(lambda state, x: functional_call(module, state, (x,), tie_weights=False).logits)(own, x)


class _Layout:
    """Where a network's trained parameters lie in a flat vector: one tensor to clip and to move instead of many."""

    def __init__(self, net: str, module: nn.Module) -> None:
        trained = {f"{net}.{name}": p for name, p in module.named_parameters() if p.requires_grad}
        self.shapes = {name: parameter.shape for name, parameter in trained.items()}
        self.sizes = [shape.numel() for shape in self.shapes.values()]
        self.sizes.append(-sum(self.sizes) % ALIGNED)

    def join(self, state: Mapping[str, Tensor]) -> Tensor:
        """(values,) of one client's state."""
        parts = [state[name].reshape(-1) for name in self.shapes]
        return torch.cat([*parts, parts[0].new_zeros(self.sizes[-1])]) if parts else torch.empty(0)

    def part(self, flat: Tensor) -> dict[str, Tensor]:
        """Name -> (clients, ...), views of (clients, values)."""
        parts = flat.split_with_sizes(self.sizes, 1)
        return {
            name: own.unflatten(1, shape) if shape else own.squeeze(1)
            for own, (name, shape) in zip(parts, self.shapes.items(), strict=False)  # the last part fills up
        }


class Stack:
    """The state of several clients.

    Attributes:
        flats: network -> (clients, values), what is trained.
        others: all other state by full name, with a leading axis of clients.
    """

    def __init__(self, together: Together, states: Sequence[Mapping[str, Tensor]]) -> None:
        self.layouts = {name: layout for name, layout in together.layouts.items() if layout.shapes}
        self.flats = {
            net: torch.stack([layout.join(state) for state in states]) for net, layout in self.layouts.items()
        }
        trained = {name for layout in self.layouts.values() for name in layout.shapes}
        self.others = {
            name: torch.stack([state[name] for state in states]) for name in states[0] if name not in trained
        }

    def gradients(
        self, together: Together, batch: Batch, context: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Losses (clients,) of the first clients, as many as the batch has, and gradients by network as in `flats`."""
        count = len(batch.y)
        leaves = {net: flat[:count].detach().requires_grad_() for net, flat in self.flats.items()}
        state = {name: tensor[:count] for name, tensor in self.others.items()}
        for net, leaf in leaves.items():
            state |= self.layouts[net].part(leaf)
        losses = together.losses_of(state, batch, {name: tensor[:count] for name, tensor in context.items()})
        found = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
        return losses.detach(), {net: grad for net, grad in zip(leaves, found, strict=True) if grad is not None}

    def state(self, client: int) -> dict[str, Tensor]:
        """One client's state by full name; views."""
        state = {name: tensor[client] for name, tensor in self.others.items()}
        for net, layout in self.layouts.items():
            state |= {name: part[0] for name, part in layout.part(self.flats[net][client : client + 1]).items()}
        return state


@dataclass(frozen=True)
class Plan:
    """Which windows each client's batches hold, with the longest work first.

    Attributes:
        index: (clients, steps, batch size), places in all clients' windows laid end to end.
        rows: real rows of every batch, (clients, steps); 0 where a client has no batch left.
    """

    index: Tensor
    rows: Tensor

    @staticmethod
    def of(ready: Sequence[Ready], round: Round, settings: Settings) -> Plan:
        """The very batches of `training.batches`; rows that only fill up are the client's first window."""
        own = [
            list(batches(len(one.client.data.y), round, one.client.id, settings, torch.device("cpu"))) for one in ready
        ]
        width = max((len(batch) for client in own for batch in client), default=0)
        index = torch.zeros(len(ready), max(map(len, own)), width, dtype=torch.int64)
        rows = torch.zeros(index.shape[:2], dtype=torch.int64)
        start = 0
        for place, (one, client) in enumerate(zip(ready, own, strict=True)):
            index[place] = start
            for step, batch in enumerate(client):
                index[place, step, : len(batch)] += batch
                rows[place, step] = len(batch)
            start += len(one.client.data.y)
        return Plan(index, rows)


def steps(ready: Ready, round: Round, settings: Settings) -> int:
    """Batches of a client's round."""
    return settings.epochs(round, ready.client.id) * math.ceil(len(ready.client.data.y) / settings.batch_size)


def train(together: Together, ready: Sequence[Ready], round: Round, settings: Settings) -> tuple[Stack, Tensor]:
    """Train clients together; nothing is fetched from the device.

    Args:
        ready: sorted by `steps`, the most first: those that still have a batch at a step are always the first ones.

    Returns:
        Their state, and of each the mean over the round's windows of its summed losses, (clients,).
    """
    stack = Stack(together, [one.state for one in ready])
    context = stacked_context(ready)
    windows = torch.cat([one.client.data.x for one in ready])
    labels = torch.cat([one.client.data.y for one in ready])
    device, dtype = windows.device, windows.dtype
    plan = Plan.of(ready, round, settings)
    index, counts = plan.index.to(device), plan.rows.to(device)
    rates = torch.tensor([one.client.learning_rate for one in ready], dtype=dtype).to(device)
    weights, total = counts.to(dtype), torch.zeros(len(ready), device=device, dtype=dtype)
    places = torch.arange(plan.index.shape[2], device=device)
    together.training_mode()
    for step, rows in enumerate(plan.rows.T.tolist()):
        active = sum(count > 0 for count in rows)
        width, together.rows.fewest = max(rows[:active]), min(rows[:active])
        chosen = index[:active, step, :width]
        mask = None if together.rows.fewest == width else places[:width] < counts[:active, step, None]
        losses, gradients = stack.gradients(together, Batch(windows[chosen], labels[chosen], mask), context)
        for net, gradient in gradients.items():
            stack.flats[net][:active] -= _bounded(gradient, rates[:active], settings.clip_norm)
        total[:active] += losses * weights[:active, step]
    return stack, total / weights.sum(1)


def _bounded(gradient: Tensor, rates: Tensor, bound: float) -> Tensor:
    """What to move by: each client's gradient by its rate, scaled down as `clip_grad_norm_` does."""
    if bound > 0:
        norms = torch.linalg.vector_norm(gradient, dim=1)
        rates = rates * (bound / (norms + 1e-6)).clamp(max=1)
    return gradient * rates.unsqueeze(1)


def stacked_context(ready: Sequence[Ready]) -> dict[str, Tensor]:
    """The clients' contexts with a leading axis of clients."""
    return {name: torch.stack([one.context[name] for one in ready]) for name in ready[0].context}


def copied_state(nets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """A copy of the networks' floating-point state by full name."""
    return {name: tensor.clone() for name, tensor in float_state(nets).items()}


def signature(ready: Ready) -> tuple[Any, ...]:
    """What clients must have in common to be stacked: names, shapes and types of their contexts."""
    return tuple((name, tensor.shape, tensor.dtype) for name, tensor in sorted(ready.context.items()))
