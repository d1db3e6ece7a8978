"""Per-FedAvg: pairs of batches and the adaptation step against plain loops in float64, what travels and what stays."""

from __future__ import annotations

import copy

import pytest
from torch.nn import functional as F

from baselines.fedavg import FedAvg
from baselines.per_fedavg import PerFedAvg
from tests.baselines.checks import overheard, travels
from tests.baselines.reference import RATE, assert_same, full_batch, is_parameter, mean, slopes
from tests.conftest import CLASSES, SHAPE, Recorder, TinyNet, make_data, make_federation, make_task

SIZES, ALPHA = (20, 30, 10), 0.3
MOVING = ("personal.conv.weight", "personal.fc.weight", "personal.head.weight")


def trained(w, x, y, steps):
    """Pairs of steps on the same windows, and a plain one if a step is left over."""
    for _ in range(steps // 2):
        gradient, statistics = slopes(w, x, y)
        away = {name: w[name] - ALPHA * own for name, own in gradient.items()} | statistics
        gradient, statistics = slopes(away, x, y)
        w = {name: w[name] - RATE * own for name, own in gradient.items()} | statistics
    if steps % 2:
        gradient, statistics = slopes(w, x, y)
        w = {name: w[name] - RATE * own for name, own in gradient.items()} | statistics
    return w


def adapted(w, x, y):
    """One step on all windows by running statistics."""
    net = TinyNet(SHAPE, CLASSES).double()
    net.load_state_dict({name.removeprefix("model."): own for name, own in w.items()}, strict=False)
    F.cross_entropy(net.eval()(x).logits, y).backward()
    gradient = {f"model.{name}": own.grad for name, own in net.named_parameters()}
    return {name: own - ALPHA * gradient[name] if is_parameter(name) else own for name, own in w.items()}


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_rounds_are_algorithm_1_to_first_order(steps, double):
    data = make_data(SIZES)
    federation = full_batch(PerFedAvg, data, rounds=2, local_epochs=steps, params={"alpha": ALPHA})
    w = dict(federation.server.weights)
    federation.run()
    for _ in range(2):
        sent = w
        w = mean([trained(w, data.train_x[k], data.train_y[k], steps) for k in range(3)], list(SIZES))
    assert_same(federation.server.weights, w)
    for k, kept in enumerate(federation.workspace.kept):
        found = {name.replace("personal.", "model.", 1): own for name, own in kept.items()}
        assert_same(found, adapted(sent, data.train_x[k], data.train_y[k]))


def test_the_adaptation_is_over_all_windows_in_chunks(double):
    data = make_data((700,))
    federation = full_batch(PerFedAvg, data, rounds=1, local_epochs=1, params={"alpha": ALPHA})
    w = copy.deepcopy(dict(federation.server.weights))
    federation.run()
    found = {name.replace("personal.", "model.", 1): own for name, own in federation.workspace.kept[0].items()}
    assert_same(found, adapted(w, data.train_x[0], data.train_y[0]))


def test_a_single_step_a_round_is_fedavgs(double):
    plain, one = (full_batch(algorithm, local_epochs=1) for algorithm in (FedAvg, PerFedAvg))
    plain.run()
    one.run()
    assert_same(one.server.weights, dict(plain.server.weights))


@pytest.mark.parametrize("local_bn", [False, True])
def test_the_personal_model_stays_and_predicts(local_bn):
    federation = make_federation(PerFedAvg, task=make_task(local_bn=local_bn), join_ratio=1)
    seen, recorder = overheard(federation), Recorder()
    federation.run([recorder])
    kept = [own for one in federation.workspace.kept for name, own in one.items() if name in MOVING]
    assert kept and not any(travels(own, seen) for own in kept)
    metrics = recorder.records[-1].metrics
    assert metrics["served"].loss == metrics["personal"].loss != metrics["model"].loss
