"""FedDyn: Algorithm 1 against plain loops in float64, the limit of a small α, what travels and what stays."""

from __future__ import annotations

import pytest
import torch

from baselines.fedavg import FedAvg
from baselines.feddyn import DRIFT, FedDyn
from registry.interface import Message, Round
from tests.baselines.checks import goes_on_identically
from tests.baselines.reference import RATE, assert_same, descend, full_batch, is_parameter, mean
from tests.conftest import Recorder, make_data, make_federation, make_task, same_state

SIZES = (20, 30, 10)


def expected(data, theta, selected, alpha):
    """Algorithm 1 in the paper's variables λ_k and h, with clients that count by their samples."""
    zero = {name: torch.zeros_like(own) for name, own in theta.items() if is_parameter(name)}
    slope = dict.fromkeys(range(3), zero)
    heard: set[int] = set()
    for chosen in selected:
        ends = []
        for k in chosen:
            end = descend(
                theta,
                data.train_x[k],
                data.train_y[k],
                lambda n, w, g, k=k: w - RATE * (g - slope[k][n] + alpha * (w - theta[n])),  # noqa: B023
            )
            ends.append(end)
            slope[k] = {name: own - alpha * (end[name] - theta[name]) for name, own in slope[k].items()}
        heard |= set(chosen)
        h = mean([slope[k] for k in sorted(heard)], [SIZES[k] for k in sorted(heard)])
        average = mean(ends, [SIZES[k] for k in chosen])
        theta = {name: own - h[name] / alpha if name in h else own for name, own in average.items()}
    return theta, slope


@pytest.mark.parametrize("alpha", [0.1, 2.0])
def test_rounds_are_algorithm_1(alpha, double):
    """Client 1 is first heard of in round 2; h is then the mean of all λ_k, those that did not train too."""
    selected, data = [[0, 2], [0, 1, 2], [0, 1]], make_data(SIZES)
    federation = full_batch(FedDyn, data, params={"alpha": alpha})
    federation._select = lambda round: selected[round.index - 1]
    start = dict(federation.server.weights)
    federation.run()
    theta, slope = expected(data, start, selected, alpha)
    assert_same(federation.server.weights, theta)
    for client in federation.workspace.clients:
        found = {name.removeprefix(DRIFT): -alpha * own for name, own in client.memory.items()}
        assert_same(found, slope[client.id])


def test_as_alpha_vanishes_clients_train_as_fedavgs_and_the_sum_of_updates_stays(double):
    """Of a first round with everybody: θ = W + 2 (W̄ − W), with FedAvg's W̄."""
    plain, regular = full_batch(FedAvg, rounds=1), full_batch(FedDyn, rounds=1, params={"alpha": 1e-12})
    start = dict(plain.server.weights)
    plain.run()
    regular.run()
    for name, own in plain.server.weights.items():
        right = 2 * own - start[name] if is_parameter(name) else own
        torch.testing.assert_close(regular.server.weights[name], right, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("local_bn", [False, True])
def test_it_sends_what_fedavg_sends_and_keeps_its_slope(local_bn):
    bytes_sent = []
    for algorithm in (FedAvg, FedDyn):
        recorder = Recorder()
        federation = make_federation(algorithm, task=make_task(local_bn=local_bn), join_ratio=1)
        federation.run([recorder])
        bytes_sent.append([(record.bytes_up, record.bytes_down) for record in recorder.records])
    assert bytes_sent[0] == bytes_sent[1]
    names = {DRIFT + name for name in federation.server.weights if is_parameter(name)}
    assert all(set(client.memory) == names for client in federation.workspace.clients)


def test_huge_updates_leave_a_finite_sum():
    server = make_federation(FedDyn).server
    server.aggregate(
        {0: Message({n: torch.full_like(t, 1e30) for n, t in server.weights.items()}, {"samples": 10**12})}, Round(1, 1)
    )
    assert all(tensor.isfinite().all() for tensor in server.save().tensors.values())


def test_a_saved_server_goes_on_identically():
    assert goes_on_identically(lambda: make_federation(FedDyn, rounds=4))


def test_by_default_it_is_not_fedavg():
    plain, regular = make_federation(FedAvg), make_federation(FedDyn)
    plain.run()
    regular.run()
    assert not same_state(dict(plain.server.weights), dict(regular.server.weights))
