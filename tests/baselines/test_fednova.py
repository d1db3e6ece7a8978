"""FedNova: normalised averaging by hand and in float64, FedAvg for equal steps, stragglers, lies about steps."""

from __future__ import annotations

import pytest
import torch

from baselines.fedavg import FedAvg
from baselines.fednova import FedNova
from fedkdx_plugin.engine.faults import Faults
from registry.interface import BadMessage, Message, Round
from tests.baselines.reference import RATE, assert_same, descend, full_batch, is_parameter
from tests.conftest import Recorder, make_data, make_federation, make_task, same_state

NAME = "model.head.bias"


def test_a_round_by_hand():
    """Of p = (3/4, 1/4), τ = (2, 6), τ_eff = 3: 1 + 3 (3/4 · 2/2 + 1/4 · 12/6) = 4.75."""
    server = FedNova(make_task(), FedNova.Params(), {NAME: torch.ones(4)})
    replies = {
        0: Message({NAME: torch.full((4,), 3.0)}, {"samples": 30, "steps": 2}),
        1: Message({NAME: torch.full((4,), 13.0)}, {"samples": 10, "steps": 6}),
    }
    server.aggregate(replies, Round(1, 1))
    assert server.weights[NAME].tolist() == [4.75] * 4


def test_with_equal_steps_it_is_fedavg(double):
    plain, nova = (full_batch(algorithm, rounds=4) for algorithm in (FedAvg, FedNova))
    plain.run()
    nova.run()
    assert_same(nova.server.weights, dict(plain.server.weights))


def test_unequal_clients_are_normalised_averaging_in_float64(double):
    sizes = (20, 30, 10)
    federation = full_batch(FedNova, make_data(sizes), rounds=1, faults=Faults(stragglers=0.9))
    start = dict(federation.server.weights)
    steps = [federation.settings.epochs(Round(1, 1), id) for id in range(3)]
    assert len(set(steps)) > 1
    federation.run()
    data = make_data(sizes)
    ends = [descend(start, data.train_x[i], data.train_y[i], lambda n, w, g: w - RATE * g, steps[i]) for i in range(3)]
    p = [size / sum(sizes) for size in sizes]
    effective = sum(p[i] * steps[i] for i in range(3))
    expected = {}
    for name, own in start.items():
        per_step = sum(p[i] * (own - ends[i][name]) / (RATE * steps[i]) for i in range(3))  # Σ p_i d_i
        mean = sum(p[i] * ends[i][name] for i in range(3))
        expected[name] = own - effective * RATE * per_step if is_parameter(name) else mean
    assert_same(federation.server.weights, expected)


def test_stragglers_count_and_it_differs_from_fedavg():
    results = []
    for algorithm in (FedAvg, FedNova):
        recorder = Recorder()
        federation = make_federation(algorithm, join_ratio=1, faults=Faults(stragglers=0.5), rounds=3)
        federation.run([recorder])
        results.append((federation, recorder.records))
    (plain, lost), (nova, kept) = results
    assert any(record.lost for record in lost) and not any(record.lost for record in kept)
    assert not same_state(dict(plain.server.weights), dict(nova.server.weights))


@pytest.mark.parametrize("steps", [0, -1, True, 1.5, None, "7", [1], 10**12])
def test_absurd_numbers_of_steps_are_refused(steps):
    server = FedNova(make_task(), FedNova.Params(), {NAME: torch.ones(4)})
    with pytest.raises(BadMessage, match="'steps' must be"):
        server.check_reply(0, Message({NAME: torch.ones(4)}, {"samples": 3, "steps": steps}))
