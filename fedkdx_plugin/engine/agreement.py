"""Whether clients come out stacked as they do alone: what no look at an algorithm's or a model's code can tell."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedkdx_plugin.engine.randomness import seeded
from fedkdx_plugin.engine.together import Ready, Stack, Together, copied_state, stacked_context
from registry.interface import Batch, copy_state

ROWS = 8  # of a trial batch: few, so that a row which only fills up weighs much
TOLERANCE = 1e-4  # relative; trials are in float64, and what is wrong is wrong by percents


class Alone(NamedTuple):
    """A client's trial without a stack: its loss, the gradients of each network as one vector, its state afterwards."""

    loss: Tensor
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]


def disagreement(nets: Mapping[str, nn.Module], group: Sequence[Ready]) -> str | None:
    """What differs in a first step of two clients; '' if nothing does.

    The trial is in float64, on a few windows of each client and rows that only fill the batch up.

    Args:
        nets: the networks as the algorithm built them; not changed.
        group: clients that are to be stacked.

    Returns:
        The difference or the error in words; None where no client has a finite loss, which tells nothing.
    """
    try:
        with seeded(0, "trial"):
            return _try(nets, group)
    except Exception as error:  # whatever vmap, a layer or a loss cannot do
        return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _try(nets: Mapping[str, nn.Module], group: Sequence[Ready]) -> str | None:
    nets = {name: copy.deepcopy(net).double() for name, net in nets.items()}
    trials: list[tuple[Ready, Batch, Alone]] = []
    for one in map(_double, group):
        rows = min(ROWS - len(trials), len(one.client.data.y))
        batch = Batch(one.client.data.x[:rows].double(), one.client.data.y[:rows])
        alone = _alone(nets, one, batch)
        if all(tensor.isfinite().all() for tensor in (alone.loss, *alone.gradients.values())):
            trials.append((one, batch, alone))
        if len(trials) == 2:
            break
    return _compare(nets, trials) if trials else None


def _double(one: Ready) -> Ready:
    def converted(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: t.double() if t.is_floating_point() else t for name, t in tensors.items()}

    return Ready(one.client, converted(one.context), converted(one.state))


def _alone(nets: Mapping[str, nn.Module], one: Ready, batch: Batch) -> Alone:
    copy_state(nets, one.state)
    for name, net in nets.items():
        net.train(name not in one.client.frozen)
        net.zero_grad()
    loss = torch.stack(list(one.client.losses(nets, batch, one.context).values())).sum()
    loss.backward()
    gradients = {
        name: torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in trained])
        for name, net in nets.items()
        if name not in one.client.frozen and (trained := [p for p in net.parameters() if p.requires_grad])
    }
    return Alone(loss.detach(), gradients, copied_state(nets))


def _compare(nets: Mapping[str, nn.Module], trials: Sequence[tuple[Ready, Batch, Alone]]) -> str:
    together = Together(trials[0][0].client, nets)
    together.training_mode()
    stack = Stack(together, [one.state for one, _, _ in trials])
    together.rows.fewest = min(len(batch.y) for _, batch, _ in trials)
    batch = _filled_up([batch for _, batch, _ in trials])
    losses, gradients = stack.gradients(together, batch, stacked_context([one for one, _, _ in trials]))
    for place, (_, _, alone) in enumerate(trials):
        if not _close(losses[place], alone.loss):
            return f"its losses come out as {float(losses[place]):.6g}, not {float(alone.loss):.6g}"
        for net, expected in alone.gradients.items():
            found = gradients[net][place, : len(expected)] if net in gradients else torch.zeros_like(expected)
            if not _close(found, expected):
                return f"gradients of network '{net}' come out different"
        for name, found in stack.others.items():
            if not _close(found[place], alone.state[name]):
                return f"'{name}' comes out different"
    return ""


def _filled_up(batches: Sequence[Batch]) -> Batch:
    """Batches of unequal size as one with a leading axis of clients, at least one row of each filling up."""
    width = 1 + max(len(batch.y) for batch in batches)
    places = [torch.arange(width, device=batch.y.device) for batch in batches]
    chosen = [torch.where(place < len(batch.y), place, 0) for place, batch in zip(places, batches, strict=True)]
    return Batch(
        torch.stack([batch.x[index] for batch, index in zip(batches, chosen, strict=True)]),
        torch.stack([batch.y[index] for batch, index in zip(batches, chosen, strict=True)]),
        torch.stack([place < len(batch.y) for batch, place in zip(batches, places, strict=True)]),
    )


def _close(found: Tensor, expected: Tensor) -> bool:
    """Whether the difference is small against the whole; where that is next to nothing, against 1."""
    scale = torch.linalg.vector_norm(expected.double()).clamp(min=TOLERANCE)
    return bool(torch.linalg.vector_norm((found - expected).double()) <= TOLERANCE * scale)
