"""FedNTD: the not-true distillation in float64, what it leaves alone, and FedAvg without it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from baselines.fedavg import FedAvg
from baselines.fedntd import FedNTD, FedNTDClient, FedNTDParams, not_true
from registry.interface import Batch, float_state
from tests.conftest import SHAPE, Recorder, make_data, make_federation, make_task, same_state


def by_hand(own: np.ndarray, shared: np.ndarray, y: np.ndarray, tau: float) -> list[float]:
    """Apply the formula sample by sample, over the classes that are not y."""
    values = []
    for z, g, label in zip(own, shared, y, strict=True):
        z, g = np.delete(z, label) / tau, np.delete(g, label) / tau
        p, q = np.exp(z) / np.exp(z).sum(), np.exp(g) / np.exp(g).sum()
        values.append(tau**2 * float((q * np.log(q / p)).sum()))
    return values


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_the_term_is_the_papers(tau):
    rng = np.random.default_rng(0)
    own, shared, y = rng.normal(size=(6, 5)), rng.normal(size=(6, 5)), rng.integers(5, size=6)
    found = not_true(torch.from_numpy(own), torch.from_numpy(shared), torch.from_numpy(y), tau)
    np.testing.assert_allclose(found, by_hand(own, shared, y, tau), rtol=1e-12)


def test_the_true_logit_feels_nothing_and_the_global_model_neither():
    own, shared = torch.randn(8, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    y = torch.arange(8) % 4
    value = not_true(own, shared, y, 1.0)
    value.sum().backward()
    assert (value > 0).all() and shared.grad is None
    true = torch.nn.functional.one_hot(y, 4).bool()
    assert (own.grad[true] == 0).all() and (own.grad[~true] != 0).all()


def test_two_classes_and_equal_models_have_no_term():
    z, other, y = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([0, 1, 1])
    assert not_true(z, other, y, 1.0).tolist() == [0, 0, 0]
    z = torch.randn(3, 4)
    assert not_true(z, z, y, 2.0).tolist() == [0, 0, 0]


def test_the_losses_and_padding_rows(double):
    one = FedNTDClient(0, make_task(), FedNTDParams(0.7, 2.0), 10)
    one.nets = FedNTDClient.build(one.task)
    for net in one.nets.values():
        for tensor in float_state({"": net.eval()}).values():
            tensor.add_(torch.rand(tensor.shape) / 5)
    data = make_data(sizes=(10,))
    x, y = data.train_x[0], data.train_y[0]
    found = one.losses(one.nets, Batch(x, y), {})
    own, shared = (one.nets[name](x).logits.detach().numpy() for name in ("model", "global"))
    right = 0.7 * np.mean(by_hand(own, shared, y.numpy(), 2.0))
    np.testing.assert_allclose(found["distillation"].item(), right, rtol=1e-9)
    padded = Batch(torch.cat([x, torch.full((3, *SHAPE), 100.0)]), torch.cat([y, y[:3]]), torch.arange(13) < 10)
    for name, value in one.losses(one.nets, padded, {}).items():
        torch.testing.assert_close(value, found[name])


@pytest.mark.parametrize("local_bn", [False, True])
def test_without_the_term_it_is_fedavg_and_with_it_not(local_bn):
    task = make_task(local_bn=local_bn)
    runs = [make_federation(FedAvg, task=task)]
    runs += [make_federation(FedNTD, task=task, params={"beta": beta}) for beta in (0.0, 1.0)]
    for one in runs:
        one.run()
    plain, without, term = (dict(one.server.weights) for one in runs)
    assert same_state(plain, without) and not same_state(plain, term)


def test_it_sends_what_fedavg_sends_and_keeps_nothing():
    bytes_sent = []
    for algorithm in (FedAvg, FedNTD):
        recorder, federation = Recorder(), make_federation(algorithm)
        federation.run([recorder])
        bytes_sent.append([(record.bytes_up, record.bytes_down) for record in recorder.records])
    assert bytes_sent[0] == bytes_sent[1]
    assert not any(federation.workspace.kept) and federation.views == ["served"]
