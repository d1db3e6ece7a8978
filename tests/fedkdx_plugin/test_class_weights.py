"""`--class-weights balanced`: the loss by hand, every backend, and what is compiled."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F

from baselines.fedavg import FedAvg
from fedkdx_plugin.algorithm.fedkdx import FedKDX
from fedkdx_plugin.configuration.config import Options
from fedkdx_plugin.engine.training import ALIKE, BALANCED, CLASS_WEIGHTS, hold_out
from fedkdx_plugin.models.cnn import CNNSmall
from fedkdx_plugin.native import library, losses
from registry import catalog
from registry.interface import Batch, Message, Output, Round
from tests.conftest import CLASSES, make_data, make_federation, same_state
from tests.fedkdx_plugin.stacked_runs import assert_alike, both, run
from tests.fedkdx_plugin.test_stacked_step import Refuse, made_step

# plain, two networks, losses by row, a second head, clusters, inner loops, losses of other modules, pooled windows,
# held-out windows, logits that are changed first
KINDS = ["FedAvg", "FedKDX", "FedDistill", "FedRoD", "IFCA", "Per-FedAvg", "pFedMe", "GPFL", "FedFomo", "FedLC"]


def uneven():
    """Clients of two and three classes of very different frequency."""
    data = make_data((40, 7, 33))
    y = [torch.where(torch.arange(len(own)) % 5 > 0, 1, own % (2 + id % 2)) for id, own in enumerate(data.train_y)]
    return dataclasses.replace(data, train_y=y)


def test_the_choices_of_the_option_are_those_there_are():
    (own,) = (field for field in dataclasses.fields(Options) if field.name == "class_weights")
    assert own.metadata["choices"] == CLASS_WEIGHTS and own.default == ALIKE


def test_a_step_is_that_of_pytorchs_weighted_cross_entropy(double):
    data = uneven()
    federation = make_federation(FedAvg, data, join_ratio=1, class_weights=BALANCED, local_epochs=1, batch_size=64)
    client = federation.backend.begin(0, Message(federation.server.weights), Round(1, 1))
    x, y, _ = client.data
    present = np.unique(y.numpy())
    weights = torch.zeros(CLASSES)
    weights[present] = torch.from_numpy(compute_class_weight("balanced", classes=present, y=y.numpy()))
    assert len(present) < CLASSES
    torch.testing.assert_close(client.data.weights, weights, rtol=1e-12, atol=0)
    net = client.nets["model"]
    expected = torch.autograd.grad(F.cross_entropy(net(x).logits, y, weight=weights), list(net.parameters()))
    loss = client.losses(client.nets, client.data, {})["model"]
    for found, right in zip(torch.autograd.grad(loss, list(net.parameters())), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)
    plain = torch.autograd.grad(F.cross_entropy(net(x).logits, y), net.head.bias)
    assert not torch.allclose(plain[0], expected[-1], rtol=1e-2)


@pytest.mark.parametrize("name", KINDS)
def test_stacked_training_is_the_references_and_weights_have_an_effect(name, double, capsys):
    algorithm = catalog.load("algorithms", name)
    one, other = both(algorithm, data=uneven(), class_weights=BALANCED)
    assert_alike(one, other, 1e-8, bytes=64)
    assert capsys.readouterr().err == ""
    plain, _ = run(algorithm, "sequential", data=uneven())
    assert not same_state(plain.save().tensors, one[0].save().tensors)


def test_worker_processes_give_the_bits_of_the_reference():
    one, _ = run(FedAvg, "sequential", data=uneven(), class_weights=BALANCED)
    torch.set_num_threads(2)  # as many workers, of one thread each
    other, _ = run(FedAvg, "parallel", data=uneven(), class_weights=BALANCED)
    other.close()
    assert same_state(one.save().tensors, other.save().tensors)


@pytest.mark.parametrize("name", ["FedAvg", "FedKDX"])
def test_a_step_with_weights_waits_for_nothing_and_has_fixed_shapes(name):
    step, ready, plan, state = made_step(catalog.load("algorithms", name), CNNSmall, class_weights=BALANCED)
    assert step.weights.shape == (len(ready), CLASSES)
    expected, before = step.train(ready, plan, state.clone()), state
    with Refuse():
        step.load(ready, plan, before, torch.arange(len(ready)))
        for _ in range(plan.rows.shape[1]):
            step.once()
    assert torch.equal(step.total / step.rows.sum(1), expected)
    for own, one in zip(step.weights, ready, strict=True):
        assert torch.equal(own, one.client.data.weights)


@pytest.mark.slow
def test_a_compiled_step_with_weights_is_the_step():
    step, ready, plan, state = made_step(FedAvg, CNNSmall, class_weights=BALANCED)
    expected = step.train(ready, plan, state.clone())
    step._move = torch.compile(type(step)._moved, fullgraph=True, dynamic=False)
    torch.testing.assert_close(step.train(ready, plan, state), expected, rtol=1e-4, atol=1e-4)


def test_weights_are_of_the_windows_that_are_trained_on_not_of_those_held_out():
    federation = make_federation(catalog.load("algorithms", "FedFomo"), uneven(), class_weights=BALANCED)
    sent = federation.server.messages([0], Round(1, 1))[0]
    client = federation.backend.begin(0, sent, Round(1, 1))
    training, held = hold_out(Batch(*uneven().train_x[:1], uneven().train_y[0]), client.holdout(), 0, 0)
    assert torch.equal(client.data.y, training.y) and torch.equal(client.validation.y, held.y)
    counts = torch.bincount(training.y, minlength=CLASSES)
    present = counts > 0
    expected = len(training.y) / (present.sum() * counts[present])
    torch.testing.assert_close(client.data.weights[present], expected)
    assert client.validation.weights is None


@pytest.mark.skipif(library.operations() is None, reason="no C compiler here")
def test_compiled_losses_leave_weighted_batches_out(monkeypatch):
    teacher, student = (Output(torch.randn(4, 8), torch.randn(4, CLASSES)) for _ in range(2))
    plain = Batch(torch.randn(4, 3, 1, 16), torch.tensor([0, 1, 1, 1]))
    weighted = dataclasses.replace(plain, weights=torch.tensor([2.0, 0.5, 0.0, 0.0]))
    assert losses.fits(teacher, student, plain) and not losses.fits(teacher, student, weighted)
    used = []
    mutual = losses.mutual
    monkeypatch.setattr(losses, "mutual", lambda *of: used.append(1) or mutual(*of))
    run(FedKDX, "sequential", data=uneven(), class_weights=BALANCED)
    assert not used
