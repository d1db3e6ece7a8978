"""Example-level privacy: the noise that fits all clients' budgets, what they have spent, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter

import pytest

from fedkdx_plugin.configuration.config import from_dict
from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.experiments import setting
from fedkdx_plugin.privacy.example import Ledger, Work, check_delta, costliest, noise_for
from fedkdx_plugin.privacy.options import EXAMPLE, Privacy
from registry import catalog
from registry.errors import UserError
from registry.interface import Message, Round
from tests.conftest import Recorder, make_data, make_federation, make_task, same_state

SIZES = (40, 12, 65, 20)
BUDGET = Privacy(EXAMPLE, 6.0, 1e-3, 1.0)
GIVEN = {"dp": "example", "epsilon": 6, "delta": 1e-3, "clip": "1", "norm": "group", "model": "cnn_small"}


def federation(rounds: int = 3, **settings) -> Federation:
    task = dataclasses.replace(make_task(), norm="group")
    algorithm = catalog.load("algorithms", settings.pop("algorithm", "FedAvg"))
    params = settings.pop("params", None)
    settings = {"privacy": BUDGET, "backend": "sequential", "batch_size": 8} | settings
    return make_federation(algorithm, make_data(SIZES), task, rounds=rounds, params=params, **settings)


def run(made: Federation, done: int = 0) -> Recorder:
    recorder = Recorder()
    made.run([recorder], done)
    return recorder


# Accounting


@pytest.mark.parametrize(("noise", "epochs", "published"), [(1.3, 15, 1.19), (1.1, 60, 3.01), (0.7, 45, 7.10)])
def test_the_published_values_of_dp_sgd_on_mnist(noise, epochs, published):
    """TensorFlow Privacy's tutorial states them by Rényi divergences and Mironov 2017; ours are tighter.

    With its library's divergences and that conversion they come out, so that noise, rate and steps mean the same.
    """
    import dp_accounting
    import dp_accounting.rdp

    steps = epochs * 60_000 // 256
    accountant = dp_accounting.rdp.RdpAccountant([1 + x / 10 for x in range(1, 100)] + list(range(12, 64)))
    accountant.compose(dp_accounting.PoissonSampledDpEvent(256 / 60_000, dp_accounting.GaussianDpEvent(noise)), steps)
    pairs = zip(accountant.orders, accountant.rdp, strict=True)
    assert min(own - math.log(1e-5) / (order - 1) for order, own in pairs) == pytest.approx(published, abs=0.005)
    assert 0.7 * published < Work(60_000, steps).spent(noise, 1e-5, 256) < published


def test_the_noise_is_the_least_with_which_no_client_spends_more():
    work = {0: Work(200, 90), 1: Work(60, 40), 2: Work(500, 300), 3: Work(30, 0)}
    noise = noise_for(work, 4.0, 1e-4, 16)
    spent = {id: one.spent(noise, 1e-4, 16) for id, one in work.items()}
    assert max(spent.values()) == pytest.approx(4.0, rel=2e-3)
    assert max(spent.values()) <= 4.0 and spent[3] == 0
    assert max(one.spent(0.999 * noise, 1e-4, 16) for one in work.values()) > 4.0


def test_only_what_may_cost_most_is_computed():
    few, more = Work(50, 10), Work(50, 20)
    assert costliest([few, more, Work(100, 20), Work(100, 21), Work(400, 5), Work(9, 0)]) == [more, Work(100, 21)]
    ledger = Ledger(1.5, 1e-3, 8, [50, 100, 400])
    assert ledger.most() == 0 and set(ledger.spent().values()) == {0.0}
    for client, steps in ((0, 10), (1, 30), (2, 5), (0, 2)):
        ledger.add(client, steps)
    assert ledger.work[0] == Work(50, 12)
    assert ledger.most() == max(ledger.spent().values()) > 0


def test_a_client_with_fewer_windows_than_a_batch_is_in_every_lot():
    """Without sampling it is the Gaussian mechanism: T steps with noise z are one with z/√T."""
    from fedkdx_plugin.privacy.accounting import gaussian

    assert Work(5, 16).spent(4.0, 1e-3, 8) == pytest.approx(gaussian(1.0, 1e-3))


def test_budgets_that_cannot_be():
    """Of ε ≈ 0, δ = 2 Φ(1/(2z)) - 1 ≈ 0.3989/z: with δ = 1e-3, one step takes z = 399, and T steps √T times that."""
    with pytest.raises(UserError, match=r"--delta 0.05: not below 1/20.*windows of client 3 would count as private"):
        check_delta({0: Work(40, 3), 1: Work(5, 0), 3: Work(20, 3)}, 0.05)
    with pytest.raises(UserError, match="too small for 1 training step of a client with 20 windows"):
        noise_for({0: Work(20, 4)}, 1e-9, 1e-6, 8)
    # every window is in every lot: 399 · √4 · √4 against 4 · 5 windows
    with pytest.raises(UserError, match="the noise would be 80 times all that the run's members can contribute"):
        noise_for({0: Work(5, 4)}, 1e-6, 1e-3, 8)


# A federation's budget


def test_a_run_spends_its_budget_and_no_more():
    made = federation()
    records = run(made).records
    spent = [record.server["privacy_epsilon"] for record in records]
    assert spent == sorted(spent) and spent[0] > 0
    assert 0.99 * BUDGET.epsilon < spent[-1] <= BUDGET.epsilon
    rounds = Counter(id for record in records for id in record.selected)
    assert made.budget is not None
    for row in made.budget.table()["clients"]:
        id, windows = row["client"], SIZES[row["client"]]
        steps = rounds[id] * 2 * math.ceil(windows / 8)  # two epochs
        assert (row["windows"], row["steps"]) == (windows, steps)
        assert row["sampling_rate"] == 8 / windows
        assert row["epsilon"] == Work(windows, steps).spent(made.budget.noise, BUDGET.delta, 8)
        assert row["epsilon"] <= BUDGET.epsilon
    json.dumps(made.budget.table())
    assert {record.server["privacy_noise"] for record in records} == {made.budget.noise}


def test_smaller_budgets_and_more_steps_take_more_noise():
    noise = federation().budget.noise
    assert federation(privacy=dataclasses.replace(BUDGET, epsilon=2.0)).budget.noise > noise
    assert federation(rounds=8).budget.noise > noise
    assert federation(algorithm="pFedMe", params={"inner_steps": 3}).budget.noise > noise  # three steps on each batch
    assert federation(algorithm="Local").budget.noise > noise  # trains everybody in each round


def test_who_drops_out_has_spent_nothing():
    from fedkdx_plugin.engine.faults import Faults

    made = federation(faults=Faults(dropout=0.5))
    records = run(made).records
    assert any(record.lost for record in records)
    trained = Counter(id for record in records for id in record.selected if id not in record.lost)
    steps = {id: work.steps for id, work in made.budget.ledger.work.items()}
    assert steps == {id: trained[id] * 2 * math.ceil(own / 8) for id, own in enumerate(SIZES)}
    assert made.budget.ledger.most() < BUDGET.epsilon


def test_a_resumed_run_goes_on_with_what_it_has_spent():
    whole, begun, resumed = (federation() for _ in range(3))
    records = run(whole).records
    for index in (1, 2):
        begun.round(Round(index, 3, begun.schedule.join_ratio))
    saved = Message.from_bytes(begun.save().to_bytes())
    resumed.restore(saved)
    assert resumed.figures()["privacy_epsilon"] == records[1].server["privacy_epsilon"]
    later = run(resumed, done=2).records
    assert [own.server for own in later] == [own.server for own in records[2:]]
    assert same_state(dict(whole.save().tensors), dict(resumed.save().tensors))
    with pytest.raises(UserError, match="-gr 6: with --dp the noise was measured for 3 rounds"):
        federation(rounds=6).restore(saved)


# What is refused


def test_nothing_is_trained_without_the_noise():
    made = federation()
    made.backend.settings = made.settings  # those that were asked for, as a site has them
    with pytest.raises(UserError, match="nobody has computed the noise"):
        made.round(Round(1, 3, 0.5))


def test_it_is_not_between_sites():
    from fedkdx_plugin.engine.schedule import Schedule
    from fedkdx_plugin.flower.coordinator import check_sampling

    with pytest.raises(UserError, match="--dp example: not with Flower: between sites"):
        check_sampling(BUDGET, Schedule(3))


def config(folder, **options):
    return from_dict({"data": str(folder), "algorithm": "FedAvg", **GIVEN, **options}, "test")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"algorithm": "FedKDX"}, r"not with FedKDX, which contrasts the windows of a batch \(ctl\); --set use=kd,nkd"),
        ({"algorithm": "FedKDX+", "set": {"use": ["kd"]}}, "not with FedKDX[+], which .* --set serve=teacher"),
        ({"algorithm": "FedAvg,FedProto"}, "not with FedProto, which sends the mean features of each class"),
        ({"clip": None}, "needs --clip NUMBER"),
        ({"clip": "auto"}, "needs --clip NUMBER"),
        ({"class_weights": "balanced"}, "--class-weights balanced: not with --dp example"),
        ({"dp_noise": "distributed"}, "--dp-noise distributed: not with --dp example"),
        ({"backend": "stacked"}, "--backend stacked: not with --dp example"),
        ({"engine": "flower"}, "--engine flower: not with --dp example"),
    ],
)
def test_options_that_do_not_go_together(options, words, shard_folder):
    with pytest.raises(UserError, match=words):
        setting.check(config(shard_folder, **options))


def on_data(folder, **options):
    asked = config(folder, **options)
    setting.check_on(setting.prepare_shards(asked), asked, setting.check(asked))


def test_data_and_models_that_do_not_go_together(shard_folder, federated_folder):
    on_data(shard_folder)
    with pytest.raises(UserError, match="--scale federated: not with --dp example"):
        on_data(federated_folder)
    with pytest.raises(UserError, match="is batch norm, in which the windows of a batch meet; --norm group"):
        on_data(shard_folder, norm="batch")
    with pytest.raises(UserError, match=r"--delta 0.2: not below 1/8"):
        on_data(shard_folder, delta=0.2)
