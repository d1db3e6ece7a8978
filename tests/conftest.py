"""Fixtures, and the small federations of `fedkdx_plugin.testing` under the names that tests know them by."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dataset_utils import shards
from dataset_utils.scaling import statistics
from fedkdx_plugin.algorithm.additions import AdditionsServer
from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.testing.made import CLASSES as CLASSES
from fedkdx_plugin.testing.made import SHAPE as SHAPE
from fedkdx_plugin.testing.made import Recorder as Recorder
from fedkdx_plugin.testing.made import TinierNet as TinierNet
from fedkdx_plugin.testing.made import TinyNet as TinyNet
from fedkdx_plugin.testing.made import make_data as make_data
from fedkdx_plugin.testing.made import make_federation as make_federation
from fedkdx_plugin.testing.made import make_task as make_task
from fedkdx_plugin.testing.made import same_state as same_state
from fedkdx_plugin.testing.running import float64
from registry.interface import Model, Server, copy_state


def smaller_student(algorithm: type[Server], model: type[Model] = TinyNet) -> type[Model]:
    """Return a student smaller than the model, or the model itself where teachers start from their students."""
    return model if issubclass(algorithm, AdditionsServer) else TinierNet


def enter(federation: Federation, id: int, shared: dict[str, Tensor]) -> None:
    """Put in place what a client would predict with where the server gives it `shared`."""
    copy_state(federation.workspace.nets, federation.workspace.state_for_evaluation(id, shared))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny networks are faster on one thread, and bits do not depend on how many there are."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_seed() -> None:
    """Seed PyTorch, so that what is drawn without a seed does not depend on the tests that ran before."""
    torch.manual_seed(0)


@pytest.fixture
def double() -> Iterator[None]:
    """Make data and networks in float64."""
    with float64():
        yield


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
    """Make shards of the same clients, each with units of its own, before they are scaled by pooled statistics."""
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
    """Find a file of real data in the folder that FEDKDX_TEST_DATA names, or skip."""

    def find(name: str) -> Path:
        folder = os.environ.get("FEDKDX_TEST_DATA")
        if not folder or not (Path(folder) / name).exists():
            pytest.skip(f"set FEDKDX_TEST_DATA to the folder that holds {name}")
        return Path(folder) / name

    return find
