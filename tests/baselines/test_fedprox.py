"""FedProx: the proximal term is there, squared and halved, and FedAvg without it."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from baselines.fedavg import FedAvg
from baselines.fedprox import FedProx, FedProxClient, FedProxParams
from registry.interface import Batch
from tests.conftest import CLASSES, Recorder, make_data, make_federation, make_task, same_state


def batch(count: int = 24) -> Batch:
    data = make_data(sizes=(count,))
    return Batch(data.train_x[0], data.train_y[0])


def client(local_bn: bool = False, **params) -> FedProxClient:
    torch.manual_seed(0)
    one = FedProxClient(0, make_task(local_bn=local_bn), FedProxParams(**params), 24)
    one.nets = FedProxClient.build(one.task)
    return one


def moved(one: FedProxClient) -> dict[str, torch.Tensor]:
    """Return the context, and a model, statistics included, that has moved since."""
    context = one.context()
    for tensor in one.state().values():
        tensor.add_(torch.randn(tensor.shape).to(tensor) / 10)
    return context


def test_the_term_is_equation_2_in_float64():
    one = client(mu=0.7)
    one.nets["model"].double().eval()
    context = moved(one)
    names = [f"model.{name}" for name, _ in one.nets["model"].named_parameters()]
    expected = 0.7 / 2 * sum(float(((one.state()[name] - context[name]) ** 2).sum()) for name in names)
    x, y = batch().x.double(), batch().y
    found = one.losses(one.nets, Batch(x, y), context)
    assert found["proximal"].item() == pytest.approx(expected, rel=1e-12)
    logits = one.nets["model"](x).logits
    cross_entropy = (logits.exp().sum(1).log() - logits[range(len(y)), y]).mean()
    torch.testing.assert_close(found["model"], cross_entropy, rtol=1e-9, atol=0)


def test_its_gradient_is_mu_times_the_distance_and_the_anchor_stays():
    one = client(mu=0.7)
    context = moved(one)
    anchor = {name: tensor.clone() for name, tensor in context.items()}
    one.losses(one.nets, batch(), context)["proximal"].backward()
    for name, parameter in one.nets["model"].named_parameters():
        expected = 0.7 * (parameter.detach() - context[f"model.{name}"])
        assert expected.abs().max() > 0
        torch.testing.assert_close(parameter.grad, expected)
    assert same_state(context, anchor)
    assert not any(tensor.requires_grad for tensor in context.values())


def test_batch_norm_that_stays_local_is_not_pulled():
    one = client(local_bn=True, mu=0.7)
    one.losses(one.nets, batch(), moved(one))["proximal"].backward()
    pulled = {name for name, parameter in one.nets["model"].named_parameters() if parameter.grad is not None}
    assert pulled == {"conv.weight", "conv.bias", "fc.weight", "fc.bias", "head.weight", "head.bias"}


@pytest.mark.parametrize("local_bn", [False, True])
def test_without_the_term_it_is_fedavg(local_bn):
    plain = make_federation(FedAvg, task=make_task(local_bn=local_bn))
    prox = make_federation(FedProx, task=make_task(local_bn=local_bn), params={"mu": 0.0})
    plain.run()
    prox.run()
    assert same_state(plain.save().tensors, prox.save().tensors)


def test_by_default_it_is_not_fedavg():
    plain, prox = make_federation(FedAvg), make_federation(FedProx)
    plain.run()
    prox.run()
    assert not same_state(dict(plain.server.weights), dict(prox.server.weights))
    assert {field.name for field in fields(FedProxParams)} == {"mu"}


def test_a_larger_mu_keeps_clients_nearer():
    def distance(mu):
        federation = make_federation(FedProx, rounds=1, join_ratio=1, params={"mu": mu})
        before = dict(federation.server.weights)
        federation.run()
        names = (name for name in before if "running" not in name)
        return float(sum((federation.server.weights[name] - before[name]).square().sum() for name in names))

    assert distance(0.0) > distance(1.0) > distance(10.0) > 0


def test_it_sends_what_fedavg_sends():
    bytes_sent = []
    for algorithm in (FedAvg, FedProx):
        recorder = Recorder()
        make_federation(algorithm).run([recorder])
        bytes_sent.append([(record.bytes_up, record.bytes_down) for record in recorder.records])
    assert bytes_sent[0] == bytes_sent[1]


def test_it_learns_also_with_a_client_of_one_window():
    recorder = Recorder()
    federation = make_federation(FedProx, make_data((40, 1, 65, 20)), rounds=15)
    federation.run([recorder])
    assert not any(record.rejected for record in recorder.records)
    assert recorder.records[-1].metrics["served"].accuracy > 2 / CLASSES
