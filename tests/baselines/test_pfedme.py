"""pFedMe: inner and outer steps against plain loops in float64, without a pull, what travels and what stays."""

from __future__ import annotations

import pytest
import torch

from baselines.pfedme import PFedMe
from tests.baselines.checks import overheard, travels
from tests.baselines.reference import RATE, STEPS, assert_same, full_batch, is_parameter, mean, slopes
from tests.conftest import Recorder, make_data, make_federation, make_task

SIZES = (20, 30, 10)
MOVING = ("personal.conv.weight", "personal.fc.weight", "personal.head.weight")


def expected(data, w, rounds, lam, inner):
    """Algorithm 1 with batches of all windows, once each in statistics: w of the server, and each client's θ."""
    thetas = {}
    for _ in range(rounds):
        ends = []
        for k in range(3):
            x, y = data.train_x[k], data.train_y[k]
            own, theta = dict(w), dict(w)
            for _ in range(STEPS):
                _, once = slopes(theta, x, y)  # a batch counts once in running statistics, at its first step
                own = own | slopes(own, x, y)[1]
                for _ in range(inner):
                    gradient, _ = slopes(theta, x, y)
                    theta = {n: theta[n] - RATE * (g + lam * (theta[n] - own[n])) for n, g in gradient.items()} | once
                own = {n: o - RATE * lam * (o - theta[n]) if is_parameter(n) else o for n, o in own.items()}
            ends.append(own)
            thetas[k] = theta
        w = mean(ends, list(SIZES))
    return w, thetas


@pytest.mark.parametrize(("lam", "inner"), [(4.0, 1), (8.0, 3)])
def test_rounds_are_algorithm_1(lam, inner, double):
    data = make_data(SIZES)
    federation = full_batch(PFedMe, data, rounds=2, params={"lam": lam, "inner_steps": inner})
    start = dict(federation.server.weights)
    federation.run()
    w, thetas = expected(data, start, 2, lam, inner)
    assert_same(federation.server.weights, w)
    for k, theta in thetas.items():
        found = {name.replace("personal.", "model.", 1): own for name, own in federation.workspace.kept[k].items()}
        assert_same(found, theta)


def test_without_a_pull_the_shared_model_never_moves():
    federation = make_federation(PFedMe, params={"lam": 0.0})
    start = dict(federation.server.weights)
    federation.run()
    for name, own in federation.server.weights.items():
        if is_parameter(name):
            torch.testing.assert_close(own, start[name], rtol=1e-6, atol=1e-7)  # the mean of what is alike


@pytest.mark.parametrize("local_bn", [False, True])
def test_the_personal_model_stays_and_predicts(local_bn):
    federation = make_federation(PFedMe, task=make_task(local_bn=local_bn), join_ratio=1)
    seen, recorder = overheard(federation), Recorder()
    federation.run([recorder])
    assert all(name.startswith("model.") for name in federation.server.weights)
    kept = [own for one in federation.workspace.kept for name, own in one.items() if name in MOVING]
    assert kept and not any(travels(own, seen) for own in kept)
    metrics = recorder.records[-1].metrics
    assert metrics["served"].loss == metrics["personal"].loss != metrics["model"].loss
