"""The round loop, local training and the wire, on made data."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from baselines.fedavg import FedAvg, FedAvgClient
from baselines.local import Local
from fedkdx_plugin.algorithm.fedkdx import FedKDX
from fedkdx_plugin.engine.randomness import derive, sample_clients, seeded
from fedkdx_plugin.engine.training import Settings, batches, hold_out
from fedkdx_plugin.engine.transport import Transport
from registry.interface import Batch, Message, NonFinite, Round, float_state
from tests.bounds import assert_within, gamma
from tests.conftest import Recorder, TinyNet, make_data, make_federation, make_task, same_state


def run(federation):
    recorder = Recorder()
    federation.run([recorder])
    return recorder.records


def test_streams_are_independent_of_each_other_and_of_the_global_generator():
    assert derive(0, "a", 1) == derive(0, "a", 1)
    assert len({derive(0, "a", 1), derive(0, "a", 2), derive(1, "a", 1), derive(0, "b", 1), derive(0, "a", "1")}) == 5
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with seeded(0, "x"):
        first = torch.rand(5)
    assert torch.equal(torch.rand(2), expected)
    with seeded(0, "x"):
        assert torch.equal(torch.rand(5), first)


@pytest.mark.parametrize(
    ("clients", "ratio", "count"), [(15, 0.4, 6), (9, 0.4, 3), (30, 0.4, 12), (100, 0.29, 29), (3, 0.1, 1), (5, 1, 5)]
)
def test_a_round_selects_the_floor_of_the_ratio_and_at_least_one(clients, ratio, count):
    chosen = sample_clients(0, 7, clients, ratio)
    assert len(chosen) == count == len(set(chosen))
    assert chosen == sorted(chosen)
    assert set(chosen) <= set(range(clients))


def test_every_client_is_selected_about_equally_often():
    counts = np.bincount([k for t in range(2000) for k in sample_clients(1, t, 10, 0.3)], minlength=10)
    assert counts.sum() == 6000
    assert (abs(counts - 600) < 5 * math.sqrt(2000 * 0.3 * 0.7)).all()


def test_an_epoch_visits_every_window_once():
    settings = Settings(batch_size=16, local_epochs=3)
    order = list(batches(40, Round(1, 2), 5, settings, torch.device("cpu")))
    assert [len(batch) for batch in order] == [16, 16, 8] * 3
    epochs = [torch.cat(order[i : i + 3]) for i in (0, 3, 6)]
    for epoch in epochs:
        assert torch.equal(epoch.sort().values, torch.arange(40))
    assert not torch.equal(epochs[0], epochs[1])


def test_one_client_with_all_data_is_plain_sgd(double):
    """FedAvg over one client against a loop in float64 written from the definition of SGD."""
    data = make_data(sizes=(50,))
    federation = make_federation(FedAvg, data, join_ratio=1, rounds=2, local_epochs=1, decay=0.9, clip_norm=0.5)
    net = TinyNet((3, 1, 16), 4).double()
    net.load_state_dict(
        {n.removeprefix("model."): t.double() for n, t in federation.workspace.initial.items()}, strict=False
    )
    federation.run()

    clipped = 0
    for t, rate in ((1, 0.05), (2, 0.045)):
        for index in batches(50, Round(t, 2), 0, federation.settings, torch.device("cpu")):
            net.zero_grad()
            F.cross_entropy(net(data.train_x[0][index].double()).logits, data.train_y[0][index]).backward()
            norm = math.sqrt(sum(float((p.grad**2).sum()) for p in net.parameters()))
            clipped += norm > 0.5
            with torch.no_grad():
                for p in net.parameters():
                    p -= rate * p.grad * min(1, 0.5 / (norm + 1e-6))  # as clip_grad_norm_
    assert clipped > 0
    for name, tensor in float_state({"model": net}).items():
        torch.testing.assert_close(federation.server.weights[name].double(), tensor, rtol=1e-9, atol=1e-9)


def test_fedavg_is_the_mean_weighted_by_samples_running_statistics_included():
    federation = make_federation(FedAvg, rounds=1, join_ratio=1)
    sent = {}
    original = federation.server.aggregate

    def spy(replies, round):
        sent.update(replies)
        original(replies, round)

    federation.server.aggregate = spy
    federation.run()
    counts = np.array([reply.meta["samples"] for reply in sent.values()], dtype=np.float64)
    assert list(counts) == [40, 7, 65, 20]
    assert "model.bn.running_mean" in federation.server.weights
    for name, tensor in federation.server.weights.items():
        stack = np.stack([reply.tensors[name].numpy().astype(np.float64) for reply in sent.values()])
        shares = counts / counts.sum()
        expected, terms = (torch.from_numpy(np.tensordot(shares, part, axes=1)) for part in (stack, abs(stack)))
        assert_within(tensor, expected, gamma(len(counts) + 1) * terms)  # and a rounding of each share


def test_a_client_sends_the_same_whoever_trains_beside_it():
    def replies(ids):
        federation = make_federation(FedAvg)
        messages = {id: federation.server.message(id, Round(1, 3)) for id in ids}
        return {id: result.reply.tensors for id, result in federation.backend.train(messages, Round(1, 3)).items()}

    together = replies([0, 1, 2, 3])
    backwards = replies([3, 2, 1, 0])
    for id in range(4):
        assert same_state(together[id], replies([id])[id])
        assert same_state(together[id], backwards[id])
    assert not same_state(together[0], together[1])


def test_batch_norm_without_momentum_counts_each_clients_own_batches():
    """Its running mean is the mean over batches: of a single batch, that batch's, whoever trained before."""

    class Cumulative(TinyNet):
        def __init__(self, shape, classes):
            super().__init__(shape, classes)
            self.bn = nn.BatchNorm2d(self.width, momentum=None)

    task = replace(make_task(), model_class=Cumulative)
    federation = make_federation(FedAvg, task=task, backend="sequential", batch_size=100, local_epochs=1)
    message, net = federation.server.message(0, Round(1, 3)), federation.workspace.nets["model"]
    convolution = {n.removeprefix("model.conv."): t for n, t in message.tensors.items() if n.startswith("model.conv.")}
    for ids in ([0, 1, 2, 3], [3, 2, 1, 0]):
        results = federation.backend.train(dict.fromkeys(ids, message), Round(1, 3))
        for id, result in results.items():
            maps = F.conv2d(federation.data.train_x[id], **convolution, stride=net.conv.stride)
            torch.testing.assert_close(result.reply.tensors["model.bn.running_mean"], maps.mean((0, 2, 3)))


@pytest.mark.parametrize("algorithm", [FedAvg, Local])
def test_same_seed_same_bits_other_seed_other_bits(algorithm):
    runs = [make_federation(algorithm, seed=seed) for seed in (0, 0, 1)]
    records = [run(federation) for federation in runs]
    states = [federation.save().tensors for federation in runs]
    assert same_state(states[0], states[1])
    assert not same_state(states[0], states[2])
    for one, two in zip(records[0], records[1], strict=True):
        assert one.train_loss == two.train_loss
        assert one.metrics["served"].accuracy == two.metrics["served"].accuracy


def test_running_something_else_before_changes_nothing():
    alone = make_federation(FedAvg)
    alone.run()
    torch.rand(17)
    make_federation(Local, seed=5).run()
    after = make_federation(FedAvg)
    after.run()
    assert same_state(alone.save().tensors, after.save().tensors)


def test_all_algorithms_meet_the_same_clients():
    selected = [[record.selected for record in run(make_federation(algorithm))] for algorithm in (FedAvg, FedKDX)]
    assert selected[0] == selected[1]


def test_local_sends_nothing_and_keeps_everything():
    federation = make_federation(Local, join_ratio=1)
    records = run(federation)
    assert federation.server.networks() == {}
    assert all(record.bytes_up < 4 * 200 for record in records)  # headers alone
    heads = [kept["model.head.weight"] for kept in federation.workspace.kept]
    assert not torch.equal(heads[0], heads[1])


def test_bytes_are_those_of_the_serialised_messages():
    federation = make_federation(FedAvg, rounds=2, join_ratio=1)
    weights = sum(tensor.numel() for tensor in federation.server.weights.values()) * 4
    for record in run(federation):
        message = Message(federation.server.weights, {})
        assert record.bytes_down == 4 * len(message.to_bytes())
        assert 4 * weights < record.bytes_up < 4 * (weights + 2000)


def test_local_batch_norm_stays_with_the_client():
    federation = make_federation(FedAvg, task=make_task(local_bn=True), join_ratio=1)
    federation.run()
    assert not any(".bn." in name for name in federation.server.weights)
    means = [kept["model.bn.running_mean"] for kept in federation.workspace.kept]
    assert not torch.equal(means[0], means[1])


def test_evaluation_uses_the_shared_model_and_changes_nothing():
    federation = make_federation(FedAvg, join_ratio=1, rounds=2)
    records = run(federation)
    before = federation.save().tensors
    net = TinyNet((3, 1, 16), 4)
    net.load_state_dict({n.removeprefix("model."): t for n, t in federation.server.weights.items()}, strict=False)
    net.eval()
    right = (net(federation.data.test_x).logits.argmax(1) == federation.data.test_y).double()
    metrics = records[-1].metrics["served"]
    assert metrics.accuracy == pytest.approx(float(right.mean()))
    for client, place in enumerate(federation.data.test_slices):
        assert metrics.client_accuracy[client] == pytest.approx(float(right[place].mean()))
    assert same_state(before, federation.save().tensors)


def test_logits_are_those_of_the_state_asked_about_whatever_was_asked_in_between():
    """A server may have a state of some client's own in one round, and the very tensors of before in the next."""
    federation = make_federation(FedAvg)
    common = federation.workspace.initial
    own = common | {f"0/{name}": torch.zeros_like(tensor) for name, tensor in common.items()}
    for first, second in ((common, own), (own, common)):
        federation = make_federation(FedAvg)
        one, other, again = (federation.evaluate(state)["served"] for state in (first, second, first))
        assert one.client_loss[0] != other.client_loss[0]
        np.testing.assert_array_equal(one.client_loss, again.client_loss)


def test_evaluation_is_due_every_gap_and_at_the_end():
    federation = make_federation(FedAvg, rounds=5)
    federation.schedule = replace(federation.schedule, eval_gap=2)
    assert [bool(record.metrics) for record in run(federation)] == [False, True, False, True, True]


class Poisoned(FedAvgClient):
    """Client 1 ends its second round with NaN."""

    def reply(self):
        if self.id == 1 and self.trained == 1:
            self.nets["model"].head.bias.data[0] = float("nan")
        return super().reply()


class PoisonedFedAvg(FedAvg):
    Client = Poisoned


def test_a_reply_that_is_not_finite_is_dropped_by_name_and_the_round_goes_on():
    federation = make_federation(PoisonedFedAvg, join_ratio=1)
    records = run(federation)
    assert [sorted(record.rejected) for record in records] == [[], [1], [1]]
    assert "client 1" in records[1].rejected[1]
    assert "model.head.bias" in records[1].rejected[1]
    assert all(tensor.isfinite().all() for tensor in federation.server.weights.values())
    assert math.isfinite(records[-1].metrics["served"].accuracy)


def test_a_client_whose_training_diverges_stays_as_it_was():
    data = make_data()
    data.train_x[2][5, 0, 0, 3] = float("inf")
    federation = make_federation(Local, data, join_ratio=1, rounds=2)
    records = run(federation)
    assert [sorted(record.rejected) for record in records] == [[2], [2]]
    assert federation.workspace.kept[2] == {}
    assert federation.workspace.clients[2].trained == 0
    assert math.isfinite(records[-1].train_loss)


class HoldingOut(FedAvgClient):
    def holdout(self) -> float:
        return 0.1


class FedAvgHoldingOut(FedAvg):
    Client = HoldingOut


def test_held_out_windows_are_not_trained_on():
    """NaN in them spoils nothing; NaN in one that is trained on does."""
    data = make_data()
    _, held = hold_out(Batch(data.train_x[2], torch.arange(65)), 0.1, 2, 0)
    data.train_x[2][held.y] = math.nan
    assert not run(make_federation(FedAvgHoldingOut, data, join_ratio=1, rounds=1))[0].rejected
    assert list(run(make_federation(FedAvg, data, join_ratio=1, rounds=1))[0].rejected) == [2]


def test_when_all_are_dropped_the_model_stays_and_the_run_ends():
    federation = make_federation(FedAvg, join_ratio=1, learning_rate=1e30, clip_norm=0)
    before = {name: tensor.clone() for name, tensor in federation.server.weights.items()}
    records = run(federation)
    assert all(len(record.rejected) == 4 for record in records)
    assert same_state(before, federation.server.weights)
    assert math.isnan(records[0].train_loss)


class Leaky(FedAvgClient):
    private = ("model.head.*",)

    def reply(self):
        return Message(self.state(), {"samples": self.samples})


class LeakyFedAvg(FedAvg):
    Client = Leaky


def test_private_state_in_a_message_is_stopped():
    with pytest.raises(RuntimeError, match=r"private state in a message: model\.head\.bias"):
        make_federation(LeakyFedAvg).run()


def test_a_message_to_many_is_counted_every_time():
    transport = Transport(torch.device("cpu"), frozenset())
    transport.start_round()
    weights = {"w": torch.randn(10)}
    for _ in range(3):
        arrived = transport.send_down(Message(weights))
        assert torch.equal(arrived.tensors["w"], weights["w"])
        assert arrived.tensors["w"].data_ptr() != weights["w"].data_ptr()
    assert transport.down == 3 * len(Message(weights).to_bytes())
    assert transport.send_down(Message({"w": weights["w"] + 1})).tensors["w"][0] == weights["w"][0] + 1


def test_integers_are_finite_and_infinity_is_not():
    transport = Transport(torch.device("cpu"), frozenset())
    transport.send_up(0, Message({"count": torch.tensor([3])}))
    with pytest.raises(NonFinite, match="client 4: b"):
        transport.send_up(4, Message({"a": torch.ones(2), "b": torch.tensor([1.0, -math.inf])}))


class WithDropout(TinyNet):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(self.feature_size, classes))


def test_dropout_repeats_itself_and_is_off_in_evaluation():
    def once():
        task = replace(make_task(), model_class=WithDropout)
        federation = make_federation(FedAvg, task=task)
        return run(federation)[-1], federation.save().tensors

    (one, state), (two, again) = once(), once()
    assert same_state(state, again)
    assert one.metrics["served"].loss == two.metrics["served"].loss


def test_a_client_of_one_window_trains():
    federation = make_federation(FedAvg, make_data(sizes=(1, 30)), join_ratio=1)
    records = run(federation)
    assert not any(record.rejected for record in records)


def test_learning_beats_chance():
    federation = make_federation(FedAvg, rounds=15, join_ratio=1, local_epochs=4)
    assert run(federation)[-1].metrics["served"].accuracy > 0.6
