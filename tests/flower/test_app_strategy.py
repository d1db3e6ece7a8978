"""The algorithms in somebody's own Flower app: the numbers of one process, by Flower's own loop over the rounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedkdx_plugin.engine.data import DeviceData, memory_format
from fedkdx_plugin.engine.rounds import Federation, Schedule
from fedkdx_plugin.flower import roster
from fedkdx_plugin.testing.made import Recorder, same_state
from registry import catalog
from registry.errors import UserError

pytest.importorskip("flwr")
pytestmark = pytest.mark.flower

from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord  # noqa: E402

from fedkdx_plugin.flower import Strategy, client_app  # noqa: E402
from fedkdx_plugin.flower.packing import pack  # noqa: E402
from tests.flower.grid import FakeGrid  # noqa: E402

SHAPE, CLASSES, SIZES, TESTS = (3, 16), 4, (40, 7, 25), 12
OPTIONS = {"local_epochs": 2, "batch_size": 16, "local_learning_rate": 0.05}
NOT_IN_AN_APP = {"Centralised": "pools everybody's data", "Local": "needs no server"}
ANY_SHAPE = {"FedMAT": "makes models for windows of other shapes"}  # of functions, which make one for theirs
PAPERS = [name for name in catalog.BUILT_IN["algorithms"] if name not in NOT_IN_AN_APP | ANY_SHAPE]


class Net(nn.Module):
    """A network as anybody writes one: windows (n, channels, time) to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 8, 5, stride=2)
        self.norm = nn.BatchNorm1d(8)
        self.hidden = nn.Linear(48, 16)
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        return self.head(self.hidden(self.norm(self.conv(x)).relu().flatten(1)).relu())


def windows(client: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng((client, seed))
    y = rng.integers(0, CLASSES, count)
    wave = np.sin(2 * np.pi * (y[:, None, None] + 1) * np.arange(16) / 16) + 0.1 * client
    return wave + 0.4 * rng.normal(size=(count, *SHAPE)), y


def load(context):
    client = context.node_config["partition-id"]
    return (*windows(client, SIZES[client], 0), *windows(client, TESTS, 1))


def in_one_process(strategy: Strategy, rounds: int) -> tuple[Federation, Recorder]:
    """Return the same rounds by the engine's own loop, done."""

    def all_of(sizes, seed):
        parts = [windows(client, size, seed) for client, size in enumerate(sizes)]
        layout = memory_format(torch.device("cpu"))
        x = [torch.from_numpy(x).float().unsqueeze(2).contiguous(memory_format=layout) for x, _ in parts]
        return x, [torch.from_numpy(y) for _, y in parts]

    train_x, train_y = all_of(SIZES, 0)
    test_x, test_y = all_of([TESTS] * len(SIZES), 1)
    data = DeviceData(
        train_x=train_x,
        train_y=train_y,
        test_x=torch.cat(test_x),
        test_y=torch.cat(test_y),
        test_client=torch.arange(len(SIZES)).repeat_interleave(TESTS),
        test_slices=[slice(TESTS * k, TESTS * (k + 1)) for k in range(len(SIZES))],
    )
    plan = strategy.plan
    about = plan.choice.server, plan.task(), plan.choice.params, data, plan.settings()
    federation, recorder = Federation(*about, Schedule(rounds, strategy.fraction_train), "sequential"), Recorder()
    federation.run([recorder])
    return federation, recorder


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(roster, "LOOK_SECONDS", 0.001)  # between two looks at who is there


def make(name: str = "FedAvg", model=Net, fraction: float = 1.0, **options) -> tuple[Strategy, FakeGrid]:
    function = (lambda: model()) if isinstance(model, type) else model
    strategy = Strategy(
        name, function, SHAPE, CLASSES, fraction_train=fraction, min_available_nodes=3, **OPTIONS | options
    )
    return strategy, FakeGrid(client_app(name, function, load))


@pytest.mark.parametrize("name", PAPERS)
def test_an_app_gives_the_bits_of_one_process(name):
    strategy, grid = make(name, fraction=0.7)
    result = strategy.start(grid, num_rounds=2)
    federation, recorder = in_one_process(strategy, 2)
    theirs = strategy._coordinator.server
    assert same_state(dict(theirs.save().tensors), dict(federation.server.save().tensors))
    for here, there in zip(recorder.records, strategy.records, strict=True):
        for field in ("selected", "rejected", "lost", "bytes_up", "bytes_down", "train_loss", "server"):
            assert getattr(here, field) == getattr(there, field), field
        served = here.metrics["served"]
        means = result.evaluate_metrics_clientapp[here.round]
        assert means["num-examples"] == TESTS * len(SIZES) and means["clients"] == len(SIZES)
        assert means["accuracy"] == pytest.approx(served.accuracy, abs=1e-12)
        assert means["f1"] == pytest.approx(served.client_f1.mean(), abs=1e-12)  # as many windows each
        assert result.train_metrics_clientapp[here.round]["train-loss"] == here.train_loss
    assert result.arrays.keys() == federation.server.networks().keys()
