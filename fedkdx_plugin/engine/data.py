"""The shards on the device, loaded once for a whole run."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dataset_utils.scaling import Statistics
    from dataset_utils.shards import Shard, ShardSet


def memory_format(device: torch.device) -> torch.memory_format:
    """Return channels last for a CPU, where convolution and pooling are faster by it (benchmarks/layout.py)."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


@dataclass(frozen=True)
class DeviceData:
    """Every client's windows on the device.

    Attributes:
        train_x, train_y: one tensor for each client, (n_k, channels, 1, time) float32 and (n_k,) int64; on the device,
            or in host memory, from which a client's windows are fetched when it trains.
        test_x, test_y: all clients' test windows, one client after the other, unseen clients last.
        test_client: (N,), client of each test window.
        test_slices: position of each client's test windows.
        evaluated_on: kind of the test windows: 'test' or 'validation'.
        unseen: clients that never train; all their windows are test windows.
        statistics: statistics of each client's training windows (None: not known) if the windows are still to be scaled
            by pooled statistics; else None.
        scaled: cache of `scaling.apply`.
    """

    train_x: list[Tensor]
    train_y: list[Tensor]
    test_x: Tensor
    test_y: Tensor
    test_client: Tensor
    test_slices: list[slice]
    evaluated_on: str = "test"
    unseen: tuple[int, ...] = ()
    statistics: Sequence[Statistics | None] | None = None
    scaled: dict[bytes, DeviceData] = field(default_factory=dict, compare=False, repr=False)

    @property
    def clients(self) -> int:
        """Number of clients."""
        return len(self.train_y)

    @property
    def seen_windows(self) -> int:
        """Number of test windows of clients that are not unseen; these come first."""
        return min((self.test_slices[id].start for id in self.unseen), default=len(self.test_y))

    def leave_out(self, unseen: Sequence[int]) -> DeviceData:
        """Return data in which these clients are unseen: all their windows are test windows, after the others'."""
        test = {id: (self.test_x[place], self.test_y[place]) for id, place in enumerate(self.test_slices)}
        for id in unseen:
            x, y = test.pop(id)
            more = self.train_x[id].to(x.device), self.train_y[id].to(y.device)
            test[id] = torch.cat([more[0], x]), torch.cat([more[1], y])
        return replace(
            self,
            train_x=[x[:0] if id in unseen else x for id, x in enumerate(self.train_x)],
            train_y=[y[:0] if id in unseen else y for id, y in enumerate(self.train_y)],
            unseen=tuple(unseen),
            **_test_fields(test),
        )

    def without_tests(self, clients: Collection[int]) -> DeviceData:
        """Return data in which these clients have no test windows."""
        test = {
            id: (self.test_x[place], self.test_y[place]) if id not in clients else (self.test_x[:0], self.test_y[:0])
            for id, place in enumerate(self.test_slices)
        }
        return replace(self, **_test_fields(test))

    def pooled(self) -> DeviceData:
        """Return data with all training windows at client 0."""
        empty = [slice(0)] * (self.clients - 1)
        return replace(
            self,
            train_x=[torch.cat(self.train_x), *(self.train_x[0][none] for none in empty)],
            train_y=[torch.cat(self.train_y), *(self.train_y[0][none] for none in empty)],
        )

    @staticmethod
    def from_shards(shards: ShardSet, device: torch.device, training_windows: torch.device | None = None) -> DeviceData:
        """Copy all shards to the device; the training windows to another device if one is given."""

        def windows(shard: Shard, to: torch.device = device) -> tuple[Tensor, Tensor]:
            x = torch.from_numpy(shard.x).to(to, memory_format=memory_format(device))
            return x, torch.from_numpy(shard.y).to(to)

        train = [windows(shard, training_windows or device) for shard in shards.train]
        test = {id: windows(shard) for id, shard in enumerate(shards.test)}
        return DeviceData(
            train_x=[x for x, _ in train],
            train_y=[y for _, y in train],
            evaluated_on=shards.evaluated_on,
            statistics=shards.statistics,
            **_test_fields(test),
        )


def _test_fields(test: Mapping[int, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Return `test_x` to `test_slices` of `DeviceData` from each client's test windows, in the order of storage."""
    x, y = (torch.cat(part) for part in zip(*test.values(), strict=True))
    places, end = {}, 0
    for id, (_, own) in test.items():
        places[id] = slice(end, end + len(own))
        end += len(own)
    client = torch.cat([torch.full_like(own, id) for id, (_, own) in test.items()])
    return {"test_x": x, "test_y": y, "test_client": client, "test_slices": [places[id] for id in sorted(places)]}
