"""Clients trained together come out as each does alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from baselines.fedavg import FedAvg
from fedkdx_plugin.engine import stacked
from fedkdx_plugin.models.cnn import CNNSmall
from fedkdx_plugin.models.cnn_lstm import CNNLSTM
from registry import catalog
from registry.interface import Task
from tests.conftest import CLASSES, SHAPE, Recorder, TinierNet, TinyNet, make_data, make_federation, same_state

NAMES = list(catalog.BUILT_IN["algorithms"])
SIZES = (40, 7, 65, 20, 33)  # whole batches, less than one, and one window left over (65 = 4 · 16 + 1)


@pytest.fixture
def double() -> Iterator[None]:
    """Networks in float64: what is left of a difference between backends is the order of sums."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def windows(sizes=SIZES):
    """`make_data` in the default type."""
    data = make_data(sizes)
    own = [x.to(torch.get_default_dtype()) for x in data.train_x]
    return replace(data, train_x=own, test_x=data.test_x.to(torch.get_default_dtype()))


TASK = Task(SHAPE, CLASSES, TinyNet, TinierNet)


def run(algorithm, backend="stacked", task=TASK, data=None, **options):
    """A federation of unequal clients after all its rounds, and its records."""
    options = {"rounds": 2, "join_ratio": 0.8} | options
    done, recorder = make_federation(algorithm, data or windows(), task, backend=backend, **options), Recorder()
    assert done.backend.name == backend
    done.run([recorder])
    return done, recorder.records


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


@pytest.mark.parametrize("model", [TinyNet, CNNSmall, CNNLSTM])
@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_and_model_as_the_reference(name, model, double):
    algorithm = catalog.load("algorithms", name)
    one, two = (
        run(algorithm, backend, Task(SHAPE, CLASSES, model, TinierNet)) for backend in ("sequential", "stacked")
    )
    assert all(reason == "" for reason in two[0].backend._reasons.values())
    assert two[0].backend._reasons
    # FedFomo's gains travel as text, where a last digit may be missing
    assert_alike(one, two, 1e-9, bytes=200 if name == "FedFomo" else 0)


@pytest.mark.parametrize("name", NAMES)
def test_repeats_its_own_bits(name):
    one, two = (run(catalog.load("algorithms", name)) for _ in range(2))
    assert same_state(one[0].save().tensors, two[0].save().tensors)
    assert [r.train_loss for r in one[1]] == [r.train_loss for r in two[1]]


@pytest.mark.parametrize("name", ["FedKDX", "FedFTL", "MOON"])
def test_in_float32_within_rounding(name):
    """One round: later ones amplify what rounding there was."""
    one, two = (run(catalog.load("algorithms", name), backend, rounds=1) for backend in ("sequential", "stacked"))
    assert_alike(one, two, 1e-4)


@pytest.mark.parametrize("settings", [{"clip_norm": 0.0}, {"clip_norm": 0.05}, {"decay": 0.5}, {"batch_size": 100}])
def test_clipping_rates_and_whole_batches_as_the_reference(settings, double):
    """With rates that differ: in round 2 some clients have trained and others have not."""
    algorithm = catalog.load("algorithms", "FedKDX")
    runs = [run(algorithm, backend, join_ratio=0.6, rounds=3, **settings) for backend in ("sequential", "stacked")]
    assert len({client.trained for client in runs[0][0].workspace.clients}) > 1
    assert_alike(*runs, 1e-9)


@pytest.mark.parametrize(("name", "params"), [("FedKDX", {"serve": "validation"}), ("FedMAT", {})])
def test_local_batch_norm_and_held_out_windows_as_the_reference(name, params, double):
    algorithm, task = catalog.load("algorithms", name), Task(SHAPE, CLASSES, TinyNet, TinierNet, local_bn=True)
    assert_alike(*(run(algorithm, b, task=task, params=params) for b in ("sequential", "stacked")), 1e-9)


def test_portions_that_fit_into_memory_change_nothing(double, monkeypatch):
    whole = run(FedAvg)
    assert whole[0].backend._at_once > len(SIZES)
    monkeypatch.setattr(stacked, "CPU_MEMORY", 1)
    parts = run(FedAvg)
    assert parts[0].backend._at_once == parts[0].backend._rows_at_once == 1
    assert_alike(whole, parts, 1e-9)
