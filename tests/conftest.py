"""A small federation on made data, shared by the tests of engine and algorithms."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dataset_utils import shards
from dataset_utils.scaling import statistics
from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.rounds import Federation, Schedule
from fedkdx_plugin.engine.training import Settings
from registry.interface import Model, Server, Task, copy_state

SHAPE, CLASSES = (3, 1, 16), 4


class TinyNet(Model):
    """A convolution with batch norm and two linear layers: every kind of state, in milliseconds."""

    width = 8

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__(shape, classes)
        self.conv = nn.Conv2d(shape[0], self.width, (1, 5), stride=(1, 2))
        self.bn = nn.BatchNorm2d(self.width)
        self.fc = nn.Linear(self.width * ((shape[2] - 5) // 2 + 1), 2 * self.width)
        self.feature_size = 2 * self.width
        self.head = nn.Linear(self.feature_size, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(self.conv(x)).relu().flatten(1)).relu()


class TinierNet(TinyNet):
    """A smaller student, with features of another size."""

    width = 4


def make_task(student: type[Model] = TinyNet, local_bn: bool = False) -> Task:
    return Task(SHAPE, CLASSES, TinyNet, student, local_bn)


def make_data(sizes: tuple[int, ...] = (40, 7, 65, 20), tests: int = 12, seed: int = 0) -> DeviceData:
    """Clients of unequal size; every class has its own frequency, every client its own offset; in the default type."""
    rng = torch.Generator().manual_seed(seed)
    time = torch.arange(SHAPE[2]) / SHAPE[2]

    def windows(count: int, client: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(CLASSES, (count,), generator=rng)
        wave = torch.sin(2 * torch.pi * (y[:, None] + 1) * time)
        x = wave[:, None, None, :] * torch.tensor([1.0, 0.5, -1.0])[:, None, None] + 0.1 * client
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
    params: dict | None = None,
    backend: str = "auto",
    **settings: float,
) -> Federation:
    settings = {"batch_size": 16, "local_epochs": 2, "learning_rate": 0.05} | settings
    return Federation(
        algorithm,
        task or make_task(),
        algorithm.Params(**(params or {})),
        data or make_data(),
        Settings(**settings),
        Schedule(rounds, join_ratio),
        backend,
    )


def enter(federation: Federation, id: int, shared: dict[str, Tensor]) -> None:
    """Put in place what a client would predict with where the server gives it `shared`."""
    copy_state(federation.workspace.nets, federation.workspace.state_for_evaluation(id, shared))


class Recorder:
    """A callback that keeps what it sees."""

    def __init__(self) -> None:
        self.records = []

    def on_round(self, record) -> None:
        self.records.append(record)


def same_state(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny networks are faster on one thread, and bits do not depend on how many there are."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_seed() -> None:
    """Seed the global generators, so that no test depends on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture
def double() -> Iterator[None]:
    """Run with data and networks in float64: 1e-9 is then millions of roundings, and far less than any mistake."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def shard_folder(tmp_path_factory) -> Path:
    """Shards of three clients, 3 channels x 32 samples, 4 classes."""
    folder = tmp_path_factory.mktemp("shards") / "made"
    rng = np.random.default_rng(0)

    def shard(count: int) -> shards.Shard:
        y = np.arange(count) % 4
        x = np.sin(2 * np.pi * (y[:, None] + 1) * np.arange(32) / 32)[:, None, None, :] + np.zeros((1, 3, 1, 1))
        return shards.Shard((x + 0.3 * rng.normal(size=x.shape)).astype(np.float32), y.astype(np.int64))

    about = {"name": "made", "classes": list("abcd"), "channels": list("xyz")}
    shards.write(folder, about, [shards.ClientData(shard(n), shard(12), {}) for n in (40, 8, 60)])
    return folder


@pytest.fixture(scope="session")
def federated_folder(shard_folder) -> Path:
    """Return the same clients, each in its own units, before they are scaled by pooled statistics."""
    folder, made = shard_folder.with_name("federated"), shards.load(shard_folder)
    clients = []
    for k, (train, test) in enumerate(zip(made.train, made.test, strict=True)):
        one, other = (shards.Shard((20 * k + 3 * shard.x).astype(np.float32), shard.y) for shard in (train, test))
        clients.append(shards.ClientData(one, other, {"statistics": statistics(one.x).to_dict()}))
    about = {"name": "made", "classes": list("abcd"), "channels": list("xyz"), "spec": {"scale": "federated"}}
    shards.write(folder, about, clients)
    return folder


@pytest.fixture
def real_data() -> Callable[[str], Path]:
    """Find a file of real data in the folder that FEDKDX_TEST_DATA names, or skip the test."""

    def find(name: str) -> Path:
        folder = os.environ.get("FEDKDX_TEST_DATA")
        if not folder or not (Path(folder) / name).exists():
            pytest.skip(f"set FEDKDX_TEST_DATA to the folder that holds {name}")
        return Path(folder) / name

    return find
