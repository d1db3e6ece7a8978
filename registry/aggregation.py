"""Sums and stacks of several clients' tensors, for servers; always in the order of client ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from registry.messages import Message, check_samples


def sample_weights(replies: Mapping[int, Message]) -> list[float]:
    """Return n_k / n of each reply, from its `samples`. Raises BadMessage where that is missing or not positive."""
    counts = [check_samples(reply) for reply in replies.values()]
    total = sum(counts)
    return [count / total for count in counts]


def weighted_sum(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return Σ_k w_k · state_k, tensor by tensor; all states have the same names."""
    names = list(states[0])
    if not names:
        return {}
    total = torch._foreach_mul([states[0][name] for name in names], weights[0])
    for state, weight in zip(states[1:], weights[1:], strict=True):
        torch._foreach_add_(total, [state[name] for name in names], alpha=weight)
    return dict(zip(names, total, strict=True))


def stacked(replies: Mapping[int, Message]) -> dict[str, Tensor]:
    """Stack the replies' tensors with a leading axis of clients: name -> (clients, ...)."""
    first = next(iter(replies.values()))
    return {name: torch.stack([reply.tensors[name] for reply in replies.values()]) for name in first.tensors}


def labelled(models: Mapping[int, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Put several clients' tensors into one message: `<id>/<name>`."""
    return {f"{id}/{name}": tensor for id, model in models.items() for name, tensor in model.items()}


def of_client(tensors: Mapping[str, Tensor], id: int | None) -> dict[str, Tensor]:
    """Return the tensors without a label, those of a client in their place; None: of a client without its own."""
    common = {name: tensor for name, tensor in tensors.items() if "/" not in name}
    label = f"{id}/"
    return common | {name.removeprefix(label): own for name, own in tensors.items() if name.startswith(label)}


def by_client(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Take apart what `labelled` put together, in the order of client ids."""
    models: dict[int, dict[str, Tensor]] = {}
    for id, name in (key.split("/", 1) for key in tensors):
        models.setdefault(int(id), {})[name] = tensors[f"{id}/{name}"]
    return dict(sorted(models.items()))
