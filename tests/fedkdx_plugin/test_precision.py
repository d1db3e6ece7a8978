"""Mixed precision: products in 16 bits, everything that is kept in float32, on every backend alike."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from baselines.fedavg import FedAvg
from fedkdx_plugin.algorithm.fedkdx import FedKDX
from fedkdx_plugin.models.cnn import CNNSmall
from fedkdx_plugin.testing.made import CLASSES, Recorder, make_data, make_federation
from registry.interface import Round, Task

PRODUCTS = {"aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten.convolution", "aten.convolution_backward"}


ONE = Round(1, 1)


class Products(TorchDispatchMode):
    """Counts matrix products and convolutions by type."""

    def __init__(self) -> None:
        super().__init__()
        self.types: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if str(operation).rpartition(".")[0] in PRODUCTS:
            made = [result] if isinstance(result, torch.Tensor) else [t for t in result if t is not None]
            self.types[made[0].dtype] += 1
        return result


SHAPE = (4, 1, 64)


def made(algorithm, backend, mixed, rounds=2, norm="batch", **settings):
    task = Task(SHAPE, CLASSES, CNNSmall, CNNSmall, norm=norm)
    data = make_data((24, 9, 16), shape=SHAPE)
    own = {"batch_size": 8, "local_epochs": 1} | settings
    return make_federation(algorithm, data, task, rounds, 1.0, backend=backend, mixed=mixed, **own)


@pytest.mark.parametrize("backend", ["sequential", "stacked"])
@pytest.mark.parametrize("algorithm", [FedAvg, FedKDX])
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_training_multiplies_in_16_bits_and_keeps_32(backend, algorithm, norm):
    federation = made(algorithm, backend, True, rounds=1, norm=norm)
    messages = federation.server.messages([0, 1, 2], ONE)
    federation.backend.train(messages, ONE)  # the first time, stacking is compared with single clients, in float32
    with Products() as products:
        results = federation.backend.train(messages, ONE)
    assert products.types[torch.bfloat16] > 20
    # what is left in float32 are the codec's products, and none where nothing is compressed
    assert algorithm is FedKDX or products.types[torch.float32] == 0
    for result in results.values():
        assert all(t.dtype != torch.bfloat16 for t in result.reply.tensors.values()) and result.loss.isfinite()
        assert result.loss.dtype == torch.float32
    kept = [t for own in federation.workspace.kept for t in own.values()]
    assert all(t.dtype == torch.float32 for t in kept)


def moved(federation):
    """Return how far the model has moved from its initial values, as one vector in float64."""
    before = federation.server.networks()
    start = {name: t.clone() for name, t in before.items()}
    federation.run()
    after = federation.server.networks()
    return torch.cat([(after[name].double() - start[name].double()).reshape(-1) for name in start])


@pytest.mark.parametrize("backend", ["sequential", "stacked"])
def test_the_model_moves_as_in_float32_to_16_bits(backend):
    """Rounding to 8 bits, 2^-9 of each factor at most, changes a few steps' direction by far less than a tenth."""
    whole, mixed = (moved(made(FedAvg, backend, own)) for own in (False, True))
    assert 0 < (whole - mixed).norm() < 0.1 * whole.norm()


def test_it_learns_as_well(monkeypatch):
    accuracies = []
    for own in (False, True):
        federation, recorder = made(FedAvg, "sequential", own, rounds=8), Recorder()
        federation.run([recorder])
        accuracies.append(recorder.records[-1].metrics["served"].accuracy)
    assert min(accuracies) > 0.8


def test_evaluation_is_in_float32():
    federation = made(FedAvg, "sequential", True, rounds=1)
    with Products() as products:
        federation.evaluate(federation.server.networks())
    assert products.types[torch.bfloat16] == 0


def test_float32_is_what_it_was():
    with Products() as products:
        federation = made(FedAvg, "stacked", False, rounds=1)
        federation.run()
    assert products.types[torch.bfloat16] == 0
