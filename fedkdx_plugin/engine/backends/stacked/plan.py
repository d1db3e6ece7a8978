"""Plan of the windows in the clients' batches, with fixed shapes for all clients and steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedkdx_plugin.engine.training import Settings, permutations, windows_of
from registry import contract
from registry.interface import Client, Round


class Ready(NamedTuple):
    """A client that has received its message.

    Attributes:
        client: with id, training windows and learning rate in place.
        context: its context.
        place: its row in the state of the working clients.
    """

    client: Client
    context: Mapping[str, Tensor]
    place: int


@dataclass(frozen=True)
class Plan:
    """The batches of a round.

    Attributes:
        index: (clients, steps, width), positions in all clients' windows laid end to end; padding rows hold the
            client's first window.
        rows: number of real rows of every batch, (clients, steps); 0 where a client has no batch left.
        patterns: what is trained in some step, as `Client.trains` gives it.
        phase: position in `patterns` of what is trained in each step, (clients, steps).
        keys: of the augmentations of each client, (clients, names), int64.
    """

    index: Tensor
    rows: Tensor
    patterns: tuple[tuple[str, ...], ...]
    phase: Tensor
    keys: Tensor

    @property
    def masked(self) -> bool:
        """Whether some batch has padding rows."""
        return bool((self.rows < self.index.shape[2]).any())

    @property
    def fewest(self) -> int:
        """Number of rows of the smallest batch."""
        return int(self.rows[self.rows > 0].min())

    @staticmethod
    def of(ready: Sequence[Ready], round: Round, settings: Settings) -> Plan:
        """Plan the batches of `training.batches`."""
        own = [permutations(len(windows_of(one.client).y), round, one.client.id, settings) for one in ready]
        trains = [
            [contract.trains(one.client, epoch, len(order)) for epoch in range(len(order))]
            for one, order in zip(ready, own, strict=True)
        ]
        patterns = tuple(sorted({pattern for epochs in trains for pattern in epochs}))
        width = min(settings.batch_size, max(order.shape[1] for order in own))
        steps = max(len(order) * -(-order.shape[1] // settings.batch_size) for order in own)
        index = torch.zeros(len(ready), steps, width, dtype=torch.int64)
        rows, phase = (torch.zeros(len(ready), steps, dtype=torch.int64) for _ in range(2))
        start = 0
        for place, order in enumerate(own):
            epochs, count = order.shape
            filled = torch.full((epochs, -(-count // settings.batch_size) * settings.batch_size), -1)
            filled[:, :count] = order
            batches = filled.view(-1, settings.batch_size)[:, :width]
            index[place] = start
            index[place, : len(batches)] += batches.clamp(min=0)
            rows[place, : len(batches)] = (batches >= 0).sum(1)
            phases = torch.tensor([patterns.index(pattern) for pattern in trains[place]])
            phase[place, : len(batches)] = phases.repeat_interleave(len(batches) // epochs)
            start += count
        times = contract.repeats(ready[0].client)  # the same for all, as it depends on hyper-parameters alone
        index, rows, phase = (part.repeat_interleave(times, 1) for part in (index, rows, phase))
        keys = [settings.augment.keys(settings.seed, round.index, one.client.id) for one in ready]
        return Plan(index, rows, patterns, phase, torch.tensor(keys, dtype=torch.int64))


def kind(context: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """Return what clients must have in common to be stacked: names, shapes and dtypes of their contexts."""
    return tuple(
        (name, tensor.shape, tensor.dtype) if isinstance(tensor, Tensor) else (name, type(tensor))
        for name, tensor in sorted(context.items())
    )
