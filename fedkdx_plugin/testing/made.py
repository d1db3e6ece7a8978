"""Small data, networks and federations, made without files: a run takes a fraction of a second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.record import Observer, RoundRecord
from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.engine.schedule import Schedule
from fedkdx_plugin.engine.training import Settings
from registry.interface import Model, Server, Task

SHAPE, CLASSES = (3, 1, 16), 4


class TinyNet(Model):
    """Convolution with batch norm and two linear layers: every kind of state, trained in milliseconds."""

    width = 8

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__(shape, classes)
        self.conv = nn.Conv2d(shape[0], self.width, (1, 5), stride=(1, 2))
        self.bn = nn.BatchNorm2d(self.width)
        self.fc = nn.Linear(self.width * ((shape[2] - 5) // 2 + 1), 2 * self.width)
        self.feature_size = 2 * self.width
        self.head = nn.Linear(self.feature_size, classes)

    def features(self, x: Tensor) -> Tensor:
        """Compute the features of windows: (n, channels, 1, time) -> (n, feature_size)."""
        features: Tensor = self.fc(self.bn(self.conv(x)).relu().flatten(1)).relu()
        return features


class TinierNet(TinyNet):
    """Smaller student, with features of another size."""

    width = 4


def make_task(student: type[Model] = TinyNet, local_bn: bool = False) -> Task:
    """Return the task of classifying the windows of `make_data` with `TinyNet`."""
    return Task(SHAPE, CLASSES, TinyNet, student, local_bn)


def make_data(
    sizes: tuple[int, ...] = (40, 7, 65, 20), tests: int = 12, seed: int = 0, shape: tuple[int, int, int] = SHAPE
) -> DeviceData:
    """Return data of clients of unequal size; every class has its own frequency, every client its own offset.

    Args:
        sizes: training windows of each client.
        tests: test windows of each client.
        shape: (channels, 1, time) of a window.

    Returns:
        Windows and labels; windows have torch's default type.
    """
    rng = torch.Generator().manual_seed(seed)
    time = torch.arange(shape[2]) / shape[2]
    scales = torch.tensor([1.0, 0.5, -1.0]).repeat(1 + shape[0] // 3)[: shape[0]]

    def windows(count: int, client: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(CLASSES, (count,), generator=rng)
        wave = torch.sin(2 * torch.pi * (y[:, None] + 1) * time)
        x = wave[:, None, None, :] * scales[:, None, None] + 0.1 * client
        return x + 0.4 * torch.randn(x.shape, generator=rng), y

    train = [windows(size, client) for client, size in enumerate(sizes)]
    test = [windows(tests, client) for client in range(len(sizes))]
    return DeviceData(
        train_x=[x for x, _ in train],
        train_y=[y for _, y in train],
        test_x=torch.cat([x for x, _ in test]),
        test_y=torch.cat([y for _, y in test]),
        test_client=torch.arange(len(sizes)).repeat_interleave(tests),
        test_slices=[slice(tests * client, tests * (client + 1)) for client in range(len(sizes))],
    )


def make_federation(
    algorithm: type[Server],
    data: DeviceData | None = None,
    task: Task | None = None,
    rounds: int = 3,
    join_ratio: float = 0.5,
    params: Mapping[str, Any] | None = None,
    backend: str = "auto",
    sampling: str = "fixed",
    **settings: Any,
) -> Federation:
    """Return a federation, by default with `make_data` and `make_task`.

    Args:
        params: hyper-parameters that differ from the defaults.
        settings: fields of `engine.training.Settings`; by default, batches of 16, 2 epochs and a learning rate of 0.05.
    """
    settings = {"batch_size": 16, "local_epochs": 2, "learning_rate": 0.05} | settings
    return Federation(
        algorithm,
        task or make_task(),
        algorithm.Params(**(params or {})),
        data or make_data(),
        Settings(**settings),
        Schedule(rounds, join_ratio, sampling=sampling),
        backend,
    )


class Recorder(Observer):
    """Observer that keeps all records."""

    def __init__(self) -> None:
        self.records: list[RoundRecord] = []

    def on_round_end(self, record: RoundRecord) -> None:
        """Keep the record."""
        self.records.append(record)


def same_state(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Return whether two states have the same names and the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
