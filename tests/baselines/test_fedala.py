"""FedALA: the learnt mix against plain loops in float64, FedAvgFT with weights of 1, what stays, newcomers."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from baselines.fedala import WEIGHT, FedALA, FedALAClient, FedALAParams
from baselines.fedavg import FedAvg
from baselines.fedavgft import FedAvgFT
from registry.interface import Batch, Message, float_state
from tests.conftest import CLASSES, SHAPE, Recorder, TinyNet, make_data, make_federation, make_task, same_state


def client(count: int = 40, **params) -> FedALAClient:
    """With an own model that differs from what it is sent."""
    torch.manual_seed(0)
    one = FedALAClient(0, make_task(), FedALAParams(**params), count)
    one.nets, one.trained = FedALAClient.build(one.task), 1
    data = make_data(sizes=(count,))
    one.data = Batch(data.train_x[0], data.train_y[0])
    for name, own in one.state().items():
        own.add_(torch.rand(own.shape) * (0.3 if name.startswith("personal.") else 0.1))
    return one


@pytest.mark.parametrize("layers", [1, 2])
def test_a_pass_is_the_papers(layers, double):
    one = client(layers=layers, share=1.0, weight_rate=30.0)
    mixed = {1: ("head.weight", "head.bias"), 2: ("fc.weight", "fc.bias", "head.weight", "head.bias")}[layers]
    weights = {name: torch.rand(one.nets["model"].get_parameter(name).shape) for name in mixed}
    one.memory = {WEIGHT + name: own for name, own in weights.items()}  # so that one pass is made
    sent = {name: own.clone() for name, own in one.state().items() if name.startswith("model.")}
    own = {name: one.state()[f"personal.{name}"].clone() for name in mixed}
    order = list(next(one._passes()))
    one.receive(Message(sent))
    for batch in order:
        net = TinyNet(SHAPE, CLASSES).eval()
        net.load_state_dict({name.removeprefix("model."): t for name, t in sent.items()}, strict=False)
        for name in mixed:
            local, wide = own[name], sent[f"model.{name}"]
            net.get_parameter(name).data.copy_(local + (wide - local) * weights[name])
        F.cross_entropy(net(batch.x).logits, batch.y).backward()
        for name in mixed:
            slope, way = net.get_parameter(name).grad, sent[f"model.{name}"] - own[name]
            weights[name] = (weights[name] - 30.0 * slope * way).clip(0, 1)
    assert len(order) == 2 and any((w == 0).any() or (w == 1).any() for w in weights.values())
    for name, tensor in one.state().items():
        short = name.removeprefix("model.")
        if short in mixed:
            expected = own[short] + (sent[name] - own[short]) * weights[short]
            torch.testing.assert_close(tensor, expected, rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(one.memory[WEIGHT + short], weights[short], rtol=1e-9, atol=1e-12)
        elif name in sent:
            assert torch.equal(tensor, sent[name])


def test_the_mix_fits_better_than_the_mean_and_the_first_time_takes_more_passes():
    one = client(share=1.0)
    sent = {name: own.clone() for name, own in one.state().items() if name.startswith("model.")}
    before = one.loss_on(one.data, sent)
    one.receive(Message(sent))
    first = {name: own.clone() for name, own in one.memory.items()}
    after = one.loss_on(one.data, {})
    assert after < before
    again = client(share=1.0)
    again.memory = {name: torch.ones_like(own) for name, own in first.items()}
    again.receive(Message(sent))
    moved = [sum(float((1 - own).sum()) for own in memory.values()) for memory in (first, again.memory)]
    assert moved[0] > moved[1] > 0


def test_a_part_of_the_windows_is_drawn_by_seed_client_and_round():
    one = client(count=50, share=0.5)
    parts = next(one._passes())
    assert [len(part.y) for part in parts] == [25]
    assert torch.equal(next(one._passes())[0].x, parts[0].x)
    one.trained = 2
    assert not torch.equal(next(one._passes())[0].x, parts[0].x)


@pytest.mark.parametrize("local_bn", [False, True])
def test_with_weights_of_1_it_is_fedavgft(local_bn, double):
    task = make_task(local_bn=local_bn)
    plain, one = make_federation(FedAvgFT, task=task), make_federation(FedALA, task=task, params={"weight_rate": 0.0})
    plain.run()
    one.run()
    states = [(plain.server.weights, one.server.weights), *zip(plain.workspace.kept, one.workspace.kept, strict=True)]
    for expected, found in states:
        assert expected.keys() <= found.keys()
        for name, own in expected.items():
            torch.testing.assert_close(found[name], own, rtol=1e-9, atol=1e-12)
    assert any(kept for kept, _ in states[1:])


def test_it_sends_what_fedavg_sends_and_the_own_model_predicts():
    bytes_sent, recorders = [], []
    for algorithm in (FedAvg, FedALA):
        recorder, federation = Recorder(), make_federation(algorithm, rounds=4)
        federation.run([recorder])
        recorders.append(recorder)
        bytes_sent.append([(record.bytes_up, record.bytes_down) for record in recorder.records])
    assert bytes_sent[0] == bytes_sent[1]
    assert all(name.startswith("model.") for name in federation.server.networks())
    trained = [one for one in federation.workspace.clients if one.trained]
    assert all(one.serves() == "personal" for one in trained)
    state = float_state(federation.workspace.nets)
    for one in trained:
        assert (
            {f"personal.{n.partition('.')[2]}" for n in federation.server.weights}
            == set(federation.workspace.kept[one.id])
            <= set(state)
        )
    assert not same_state(*(dict(kept) for kept in federation.workspace.kept[:2]))
