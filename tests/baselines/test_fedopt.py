"""FedAvgM, FedAdam and FedYogi: the server's steps in float64, batch-norm statistics, and FedAvg without momentum."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from baselines.fedadam import FedAdam
from baselines.fedavg import FedAvg
from baselines.fedavgm import FedAvgM
from baselines.fedopt import AdaptiveParams
from baselines.fedyogi import FedYogi
from registry.interface import Message, Round
from tests.baselines.checks import goes_on_identically
from tests.conftest import make_federation, make_task

SAMPLES = (30, 10)
NAMES = {"model.head.bias": (4,), "model.fc.weight": (16, 48), "model.bn.running_var": (8,)}


def drawn(rng, scale=1.0) -> dict[str, np.ndarray]:
    return {name: scale * (1 + rng.random(shape)) for name, shape in NAMES.items()}


def as_message(state: dict[str, np.ndarray], samples: int) -> Message:
    return Message({name: torch.from_numpy(values) for name, values in state.items()}, {"samples": samples})


def expected(algorithm, params, w, m, v, delta):
    """One step of the papers' formulas: the new W, m, v."""
    if algorithm is FedAvgM:
        m = params.momentum * m + delta
        return w + params.server_rate * m, m, v
    m = params.beta1 * m + (1 - params.beta1) * delta
    if algorithm is FedAdam:
        v = params.beta2 * v + (1 - params.beta2) * delta**2
    else:
        v = v - (1 - params.beta2) * delta**2 * np.sign(v - delta**2)
    return w + params.server_rate * m / (np.sqrt(v) + params.tau), m, v


@pytest.mark.parametrize("algorithm", [FedAvgM, FedAdam, FedYogi])
def test_three_rounds_are_the_papers_formulas_in_float64(algorithm):
    rng = np.random.default_rng(0)
    values = {"server_rate": 0.3}
    params = algorithm.Params(**values if algorithm is FedAvgM else {**values, "tau": 0.5, "beta2": 0.7})
    w = drawn(rng)
    server = algorithm(make_task(), params, {name: torch.from_numpy(own.copy()) for name, own in w.items()})
    m = {name: np.zeros(shape) for name, shape in NAMES.items()}
    v = {name: np.full(shape, 0.5**2) for name, shape in NAMES.items()}
    signs = set()
    for index in range(1, 4):
        states = [drawn(rng, scale=(3.0, 0.2, 1.0)[index - 1]) for _ in SAMPLES]
        server.aggregate({id: as_message(own, SAMPLES[id]) for id, own in enumerate(states)}, Round(index, 3))
        for name in NAMES:
            mean = sum(n / sum(SAMPLES) * own[name] for n, own in zip(SAMPLES, states, strict=True))
            if "running" in name:
                w[name] = mean
            else:
                delta = mean - w[name]
                signs |= set(np.sign(v[name] - delta**2).ravel())
                w[name], m[name], v[name] = expected(algorithm, params, w[name], m[name], v[name], delta)
            np.testing.assert_allclose(server.weights[name].numpy(), w[name], rtol=1e-12, atol=1e-12)
    assert {-1.0, 1.0} <= signs  # both branches of Yogi were met


def test_without_momentum_fedavgm_is_fedavg(double):
    plain = make_federation(FedAvg, rounds=4)
    other = make_federation(FedAvgM, rounds=4, params={"momentum": 0.0})
    plain.run()
    other.run()
    for name, tensor in plain.server.weights.items():
        torch.testing.assert_close(other.server.weights[name], tensor, rtol=1e-10, atol=1e-12)


def test_with_momentum_the_first_round_alone_is_fedavgs(double):
    runs = [[make_federation(algorithm, rounds=rounds) for algorithm in (FedAvg, FedAvgM)] for rounds in (1, 2)]
    alike = []
    for pair in runs:
        for one in pair:
            one.run()
        alike.append(all(torch.allclose(t, pair[1].server.weights[n]) for n, t in pair[0].server.weights.items()))
    assert alike == [True, False]


@pytest.mark.parametrize("algorithm", [FedAdam, FedYogi])
def test_large_updates_leave_finite_moments(algorithm):
    """The square of 1e30 is no float32."""
    server = algorithm(make_task(), AdaptiveParams(), {"model.head.bias": torch.zeros(4)})
    server.aggregate({0: Message({"model.head.bias": torch.full((4,), 1e30)}, {"samples": 1})}, Round(1, 1))
    assert all(tensor.isfinite().all() for tensor in server.save().tensors.values())
    m, v = 0.1 * 1e30, 0.99 * 1e-6 + 0.01 * 1e60 if algorithm is FedAdam else 1e-6 + 0.01 * 1e60
    np.testing.assert_allclose(server.weights["model.head.bias"], 0.01 * m / (v**0.5 + 1e-3), rtol=1e-6)


@pytest.mark.parametrize("local_bn", [False, True])
@pytest.mark.parametrize("algorithm", [FedAvgM, FedAdam, FedYogi])
def test_statistics_are_averaged_and_local_ones_unknown(algorithm, local_bn):
    federation = make_federation(algorithm, task=make_task(local_bn=local_bn), rounds=2)
    federation.run()
    assert not any("running" in name for name in federation.server.moments)
    assert any(".bn." in name for name in federation.server.moments) is not local_bn


@pytest.mark.parametrize("algorithm", [FedAvgM, FedAdam, FedYogi])
def test_a_saved_server_goes_on_identically(algorithm):
    assert goes_on_identically(lambda: make_federation(algorithm, rounds=4))
