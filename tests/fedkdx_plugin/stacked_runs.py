"""Federations whose clients are trained together, for the tests of the stacked backend."""

from __future__ import annotations

import pytest
import torch

from baselines.fedavg import FedAvg, FedAvgClient
from fedkdx_plugin.engine.backends.stacked import backend as stacked
from fedkdx_plugin.engine.backends.stacked.step import EAGER, Step
from registry.interface import Task
from tests.conftest import CLASSES, SHAPE, Recorder, TinierNet, TinyNet, make_data, make_federation

SIZES = (40, 7, 65, 20, 33)  # whole batches, less than one, and one window left over (65 = 4 · 16 + 1)


def windows(sizes=SIZES):
    """`make_data` of unequal clients."""
    return make_data(sizes)


TASK = Task(SHAPE, CLASSES, TinyNet, TinierNet)


def run(algorithm, backend="stacked", task=TASK, data=None, **options):
    """Run a federation of unequal clients; return it with its records."""
    options = {"rounds": 2, "join_ratio": 0.8} | options
    done, recorder = make_federation(algorithm, data or windows(), task, backend=backend, **options), Recorder()
    assert done.backend.name == backend
    done.run([recorder])
    return done, recorder.records


def both(algorithm, **options):
    """Run the same with the reference and stacked."""
    return run(algorithm, "sequential", **options), run(algorithm, "stacked", **options)


def assert_alike(one, other, tolerance, bytes=0):
    """Two runs: all state, of servers and clients, and every figure."""
    states = one[0].save(), other[0].save()
    assert states[0].tensors.keys() == states[1].tensors.keys()
    for name, tensor in states[0].tensors.items():
        torch.testing.assert_close(states[1].tensors[name], tensor, rtol=tolerance, atol=tolerance, msg=name)
    for a, b in zip(one[1], other[1], strict=True):
        assert (a.selected, a.rejected, a.bytes_down) == (b.selected, b.rejected, b.bytes_down)
        assert b.bytes_up == pytest.approx(a.bytes_up, abs=bytes)
        assert b.train_loss == pytest.approx(a.train_loss, rel=tolerance)
        assert a.metrics.keys() == b.metrics.keys()
        for view, figures in a.metrics.items():
            assert b.metrics[view].loss == pytest.approx(figures.loss, rel=tolerance)


def with_client(**members) -> type[FedAvg]:
    """FedAvg whose clients have other methods."""
    client = type("Client", (FedAvgClient,), members)
    return type("Changed", (FedAvg,), {"Client": client})


def losses(change):
    """FedAvg's losses, of which `change` makes others: (client, losses, batch) -> losses."""

    def changed(self, nets, batch, context):
        return change(self, FedAvgClient.losses(self, nets, batch, context), batch)

    return {"losses": changed}


def failing(*ways):
    """`Step.train` that fails where a step is run in one of these ways; else it is run operation by operation."""
    train = Step.train

    def broken(self, ready, plan, state):
        if self.way in ways:
            raise RuntimeError("no kernel")
        self.way, way = EAGER, self.way
        try:
            return train(self, ready, plan, state)
        finally:
            self.way = way

    return broken


def on_the_way(way, demanded=False):
    """FedAvg's federation whose steps begin in this way, as on a GPU."""
    federation = make_federation(FedAvg, windows(), TASK, rounds=2, join_ratio=0.8, backend="sequential")
    federation.backend = stacked.Stacked(
        federation.workspace, federation.data, federation.settings, demanded=demanded, selected=4, way=way
    )
    federation.evaluate = federation.backend.evaluator()
    return federation
