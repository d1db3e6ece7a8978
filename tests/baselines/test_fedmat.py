"""FedMAT: two attentions over any model, and which part of them is shared."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from baselines.fedavg import FedAvg, FedAvgClient
from baselines.fedmat import FedMAT, FedMATClient, FedMATParams, HierarchicalAttention
from fedkdx_plugin.models.cnn import CNN
from fedkdx_plugin.models.cnn_lstm import CNNLSTM
from registry.aggregation import sample_weights, weighted_sum
from registry.interface import Batch, Task, private_names
from tests.baselines.checks import awkward_data, goes_on_identically, overheard, run, travels
from tests.conftest import CLASSES, SHAPE, TinyNet, make_federation, same_state


def task(model: type = TinyNet, shape: tuple[int, int, int] = SHAPE, local_bn: bool = False) -> Task:
    return Task(shape, CLASSES, model, model, local_bn)


def network(model: type = TinyNet, shape: tuple[int, int, int] = SHAPE) -> HierarchicalAttention:
    torch.manual_seed(0)
    net = HierarchicalAttention(task(model, shape), 4)
    nn.init.normal_(net.attention.weight)
    return net


@pytest.mark.parametrize("model", [TinyNet, CNN, CNNLSTM])
@pytest.mark.parametrize("shape", [(3, 1, 16), (2, 1, 19), (3, 1, 128), (1, 1, 100), (3, 1, 9)])
def test_output_is_both_attentions_as_written(model, shape):
    """Sample by sample, in float64; samples that fill no segment are left out."""
    net = network(model, shape).double().eval()
    x = torch.randn(5, *shape, dtype=torch.float64)
    segments, length = net.segments, shape[2] // net.segments
    weight = net.attention.weight[:, :, 0, 0]
    for window, features, logits in zip(x, *net(x), strict=True):
        attended = torch.stack([(weight @ v).softmax(0) * shape[0] * v for v in window[:, 0].T], dim=1)
        parts = [attended[None, :, None, s * length : (s + 1) * length] for s in range(segments)]
        h = torch.cat([net.network.features(part) for part in parts])
        beta = torch.tanh(net.temporal.weight @ h.flatten() + net.temporal.bias).softmax(0)
        torch.testing.assert_close(features, sum(b * row for b, row in zip(beta, h, strict=True)))
        torch.testing.assert_close(logits, net.head.weight @ features + net.head.bias)


@pytest.mark.parametrize(("time", "segments"), [(128, 4), (100, 4), (32, 4), (31, 3), (16, 2), (15, 1), (5, 1)])
def test_the_number_of_segments_leaves_each_long_enough(time, segments):
    assert network(CNN, (3, 1, time)).segments == segments


def test_at_first_no_channel_is_preferred_and_the_attention_learns():
    torch.manual_seed(0)
    net = HierarchicalAttention(task(), 2)
    x = torch.randn(4, *SHAPE)
    torch.testing.assert_close(net._attend(x), x)
    net(x).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for n, p in net.named_parameters() if not n.startswith("network."))


def test_what_is_shared_and_what_is_private():
    one = {"model": network()}
    private = private_names(FedMATClient, task(), one)
    assert private == {"model.attention.weight", "model.head.weight", "model.head.bias"}
    shared = {n.split(".")[1] for n in one["model"].state_dict(prefix="model.")} - {n.split(".")[1] for n in private}
    assert shared == {"network", "temporal"}
    assert not any("network.head" in name for name in one["model"].state_dict())


def test_the_server_averages_the_shared_part():
    federation = make_federation(FedMAT, task=task(), rounds=1, join_ratio=1)
    seen = {}
    aggregate = federation.server.aggregate
    federation.server.aggregate = lambda replies, round: seen.update(replies) or aggregate(replies, round)
    run(federation)
    expected = weighted_sum([reply.tensors for reply in seen.values()], sample_weights(seen))
    assert same_state(expected, dict(federation.server.weights))
    assert any(name.startswith("model.temporal") for name in expected)


class AllShared(FedMATClient):
    private = ()


class Plain(FedAvgClient):
    @classmethod
    def build(cls, task):
        return {"model": HierarchicalAttention(task, FedMATParams().segments)}


def test_with_nothing_private_it_is_fedavg_of_the_same_network():
    one = make_federation(type("Shared", (FedMAT,), {"Client": AllShared}), task=task())
    other = make_federation(type("Average", (FedAvg,), {"Client": Plain}), task=task())
    mat = make_federation(FedMAT, task=task())
    for federation in (one, other, mat):
        federation.run()
    assert same_state(dict(one.server.weights), dict(other.server.weights))
    shared = {name: one.server.weights[name] for name in mat.server.weights}
    assert not same_state(shared, dict(mat.server.weights))


def test_attention_over_channels_and_classifier_never_travel():
    federation = make_federation(FedMAT, task=task(), join_ratio=1)
    seen = overheard(federation)
    run(federation)
    kept = [tensor for state in federation.workspace.kept for tensor in state.values()]
    assert len(kept) == 3 * 4 and not any(travels(tensor, seen) for tensor in kept)
    first, second = federation.workspace.kept[:2]
    assert not same_state(first, second)


def test_padding_rows_change_nothing(double):
    net = network().eval()
    one = FedMATClient(0, task(), None, 10)
    x, y = torch.randn(13, *SHAPE), torch.randint(CLASSES, (13,))
    padded = one.losses({"model": net}, Batch(x, y, torch.arange(13) < 10), {})["model"]
    torch.testing.assert_close(padded, one.losses({"model": net}, Batch(x[:10], y[:10]), {})["model"])


def test_a_saved_server_goes_on_identically():
    assert goes_on_identically(lambda: make_federation(FedMAT, task=task(), rounds=4))


@pytest.mark.parametrize("local_bn", [False, True])
def test_awkward_and_late_clients(local_bn):
    """One window, one class, a class missing; client 3 is first seen in the last round."""
    federation = make_federation(FedMAT, awkward_data(), task=task(local_bn=local_bn), rounds=6)
    run(federation, [(0, 1, 2)] * 4 + [(1, 2), (0, 3)])
    assert any(".bn." in name for name in federation.workspace.kept[3]) == local_bn


def test_it_learns():
    """Four classes; half of the network is each client's own, and some have few windows to teach it."""
    records = run(make_federation(FedMAT, task=task(), rounds=30, join_ratio=1))
    assert records[-1].metrics["served"].accuracy > 0.7
