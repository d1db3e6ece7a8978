"""APFL: the three models and α against plain loops in float64, FedAvg and Local at its ends, what stays."""

from __future__ import annotations

import pytest
import torch

from baselines.apfl import ALPHA, APFL
from baselines.fedavg import FedAvg
from baselines.local import Local
from tests.baselines.checks import overheard, travels
from tests.baselines.reference import RATE, STEPS, assert_same, full_batch, is_parameter, mean, slopes
from tests.conftest import Recorder, make_data, make_federation, make_task

SIZES = (20, 30, 10)


def expected(data, w, rounds, alpha, adaptive):
    """Algorithm 1 with batches of all windows: w of the server, and each client's v̄, v and α."""
    own = {k: (dict(w), dict(w), alpha) for k in range(3)}  # v, statistics of v̄, α
    mixes = {}
    for _ in range(rounds):
        ends = []
        for k in range(3):
            x, y = data.train_x[k], data.train_y[k]
            local, (v, statistics, a) = dict(w), own[k]
            for step in range(STEPS):
                mix = {n: a * v[n] + (1 - a) * local[n] if is_parameter(n) else statistics[n] for n in v}
                at_w, after_w = slopes(local, x, y)
                at_mix, after_mix = slopes(mix, x, y)
                inner = sum(float(((v[n] - local[n]) * g).sum()) for n, g in at_mix.items())
                v = {n: v[n] - RATE * a * at_mix[n] if n in at_mix else v[n] for n in v}
                local = {n: local[n] - RATE * at_w[n] for n in at_w} | after_w
                statistics = statistics | after_mix
                if adaptive and step == 0:
                    a = min(max(a - RATE * inner, 0.0), 1.0)
            mixes[k] = {n: a * v[n] + (1 - a) * local[n] if is_parameter(n) else statistics[n] for n in v}
            own[k] = v, statistics, a
            ends.append(local)
        w = mean(ends, list(SIZES))
    return w, mixes, own


@pytest.mark.parametrize("adaptive", [False, True])
def test_rounds_are_algorithm_1(adaptive, double):
    data = make_data(SIZES)
    federation = full_batch(APFL, data, rounds=3, params={"alpha": 0.3, "adaptive": adaptive})
    start = dict(federation.server.weights)
    federation.run()
    w, mixes, own = expected(data, start, 3, 0.3, adaptive)
    assert_same(federation.server.weights, w)
    for k, kept in enumerate(federation.workspace.kept):
        assert_same({n.replace("personal.", "model.", 1): t for n, t in kept.items() if "personal." in n}, mixes[k])
        v = {n.replace("own.0.", "model.", 1): t for n, t in kept.items() if n.startswith("own.") and is_parameter(n)}
        assert_same(v, {n: t for n, t in own[k][0].items() if is_parameter(n)})
        assert float(kept[ALPHA]) == pytest.approx(own[k][2], rel=1e-9)
    assert (len({float(kept[ALPHA]) for kept in federation.workspace.kept}) > 1) is adaptive


@pytest.mark.parametrize("local_bn", [False, True])
def test_the_shared_model_is_fedavgs_whatever_alpha_is(local_bn, double):
    task = make_task(local_bn=local_bn)
    plain, one = make_federation(FedAvg, task=task), make_federation(APFL, task=task)
    plain.run()
    one.run()
    assert_same(one.server.weights, dict(plain.server.weights))


@pytest.mark.parametrize(("alpha", "like"), [(0.0, FedAvg), (1.0, Local)])
def test_at_its_ends_the_mix_is_the_shared_or_the_own_model(alpha, like, double):
    one = make_federation(APFL, params={"alpha": alpha, "adaptive": False}, join_ratio=1)
    other, trained = make_federation(like, join_ratio=1), {}
    keep = other.workspace.keep

    def listen(client):
        trained[client.id] = {name: own.clone() for name, own in client.state().items()}
        keep(client)

    other.workspace.keep = listen
    one.run()
    other.run()
    assert len(trained) == 4
    for id, state in trained.items():
        kept = one.workspace.kept[id]
        found = {n.replace("personal.", "model.", 1): t for n, t in kept.items() if n.startswith("personal.")}
        names = [name for name in state if like is Local or is_parameter(name)]  # its statistics are its own
        assert_same({name: found[name] for name in names}, {name: state[name] for name in names})


def test_alpha_stays_a_share(double):
    federation = make_federation(APFL, rounds=6, join_ratio=1, learning_rate=20.0, clip_norm=1.0)
    federation.run()
    found = torch.cat([kept[ALPHA] for kept in federation.workspace.kept])
    assert ((found >= 0) & (found <= 1)).all() and (found != 0.5).all()


def test_own_model_mix_and_alpha_stay_and_the_mix_predicts():
    federation = make_federation(APFL, join_ratio=1)
    seen, recorder = overheard(federation), Recorder()
    federation.run([recorder])
    moving = (ALPHA, *(f"{net}.{part}.weight" for net in ("own.0", "personal") for part in ("conv", "fc", "head")))
    private = [one[name] for one in federation.workspace.kept for name in moving]
    assert not any(travels(own, seen) for own in private)
    metrics = recorder.records[-1].metrics
    assert metrics["served"].loss == metrics["personal"].loss != metrics["model"].loss
    assert federation.views == ["served", "model", "personal"]
