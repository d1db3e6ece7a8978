"""SCAFFOLD: option II against plain loops in float64, FedAvg in the first round, what travels and what stays."""

from __future__ import annotations

import pytest
import torch

from baselines.fedavg import FedAvg
from baselines.scaffold import CONTROL, SCAFFOLD
from fedkdx_plugin.engine.faults import Faults
from registry.interface import Message, Round
from tests.baselines.checks import goes_on_identically
from tests.baselines.reference import RATE, STEPS, assert_same, descend, full_batch, is_parameter, mean, slopes
from tests.conftest import make_data, make_federation, make_task, same_state

SIZES = (20, 30, 10)


def expected(data, start, selected, server_rate):
    """Algorithm 1 with option II, written out: the model and c after rounds of these clients."""
    x = dict(start)
    c_of: dict[int, dict] = {}
    c = {name: torch.zeros_like(own) for name, own in x.items() if is_parameter(name)}
    for chosen in selected:
        replies = []
        new = dict(c_of)
        for i in chosen:
            c_i = c_of.get(i, c)
            y = descend(
                x,
                data.train_x[i],
                data.train_y[i],
                lambda n, w, g, c_i=c_i: w - RATE * (g - c_i[n] + c[n]),  # noqa: B023
            )
            new[i] = {name: c_i[name] - c[name] + (x[name] - y[name]) / (STEPS * RATE) for name in c}
            replies.append(y)
        average = mean(replies, [SIZES[i] for i in chosen])
        x = {n: x[n] + server_rate * (own - x[n]) if is_parameter(n) else own for n, own in average.items()}
        c_of = new
        c = mean(list(c_of.values()), [SIZES[i] for i in c_of])
    return x, c


@pytest.mark.parametrize("server_rate", [1.0, 0.6])
def test_rounds_are_algorithm_1_with_option_2(server_rate, double):
    """Client 1 is first heard of in round 2, and client 0 then again in round 3."""
    selected, data = [[0, 2], [0, 1, 2], [0, 1]], make_data(SIZES)
    federation = full_batch(SCAFFOLD, data, params={"server_rate": server_rate})
    federation._select = lambda round: selected[round.index - 1]
    start = dict(federation.server.weights)
    federation.run()
    x, c = expected(data, start, selected, server_rate)
    assert_same(federation.server.weights, x)
    assert_same(federation.server.control(), {CONTROL + name: own for name, own in c.items()})


def test_the_first_round_is_fedavgs_and_the_second_is_not():
    def weights(algorithm, rounds):
        one = make_federation(algorithm, rounds=rounds, join_ratio=1)
        one.run()
        return dict(one.server.weights)

    assert same_state(weights(FedAvg, 1), weights(SCAFFOLD, 1))
    assert not same_state(weights(FedAvg, 2), weights(SCAFFOLD, 2))


def test_clients_that_are_alike_have_no_correction(double):
    """With the same windows everywhere c_i = c, up to rounding: FedAvg."""
    data = make_data(SIZES)
    data.train_x[1:], data.train_y[1:] = data.train_x[:1] * 2, data.train_y[:1] * 2
    plain, corrected = full_batch(FedAvg, data), full_batch(SCAFFOLD, data)
    plain.run()
    corrected.run()
    assert_same(corrected.server.weights, dict(plain.server.weights))


def test_c_is_the_mean_of_the_clients_control_variates(double):
    """Also after stragglers, whose fewer steps count as such."""
    data = make_data(SIZES)
    federation = full_batch(SCAFFOLD, data, rounds=4, join_ratio=0.6, faults=Faults(stragglers=0.5))
    federation.run()
    heard = [client for client in federation.workspace.clients if client.memory]
    assert {client.id: client.samples for client in heard} == federation.server.heard
    c = mean([dict(client.memory) for client in heard], [client.samples for client in heard])
    assert_same(federation.server.control(), c)


def test_a_straggler_divides_by_its_own_steps(double):
    """Take one step in the first round, and c_i is the gradient at the start, however many were planned."""
    data = make_data(SIZES)
    federation = full_batch(SCAFFOLD, data, rounds=1, local_epochs=2, seed=1, faults=Faults(stragglers=0.6))
    start = dict(federation.server.weights)
    slow = [id for id in range(3) if federation.settings.epochs(Round(1, 1), id) == 1]
    assert 0 < len(slow) < 3
    federation.run()
    for id in range(3):
        gradient, _ = slopes(start, data.train_x[id], data.train_y[id])
        memory = federation.workspace.clients[id].memory
        assert all(torch.allclose(memory[CONTROL + n], own) for n, own in gradient.items()) is (id in slow)


@pytest.mark.parametrize("local_bn", [False, True])
def test_only_shared_parameters_have_control_variates(local_bn):
    federation = make_federation(SCAFFOLD, task=make_task(local_bn=local_bn), rounds=2, join_ratio=1)
    federation.run()
    names = {name for name in federation.server.weights if is_parameter(name)}
    assert any(".bn." in name for name in names) is not local_bn
    assert federation.server.control().keys() == {CONTROL + name for name in names}
    assert set(federation.workspace.clients[0].memory) == set(federation.server.total)


def test_huge_changes_leave_a_finite_sum():
    server = make_federation(SCAFFOLD).server
    like = {name: torch.full_like(own, 3e38) for name, own in server.control().items()}
    server.aggregate({0: Message(dict(server.weights) | like, {"samples": 10**12})}, Round(1, 1))
    assert all(tensor.isfinite().all() for tensor in (*server.save().tensors.values(), *server.control().values()))


def test_a_saved_server_goes_on_identically():
    assert goes_on_identically(lambda: make_federation(SCAFFOLD, rounds=4))
