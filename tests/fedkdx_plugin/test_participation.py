"""Clients that never take part, that join late, that are rarely reached; and what is measured of them."""

from __future__ import annotations

import math
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch

from baselines.centralised import Centralised
from baselines.fedavg import FedAvg
from baselines.fedfomo import FedFomo
from baselines.fedftl import FedFTL
from baselines.local import Local
from fedkdx_plugin.algorithm.fedkdx import FedKDX
from fedkdx_plugin.engine.evaluation import SERVED
from fedkdx_plugin.engine.participation import LATE, RARE, UNSEEN, Participation
from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.engine.schedule import Schedule
from fedkdx_plugin.engine.training import Settings
from fedkdx_plugin.results.records import csv_row, write_results
from registry.errors import UserError
from tests.conftest import Recorder, enter, make_data, make_federation, make_task, same_state

SIZES = (40, 7, 65, 20, 30, 12)


def federation(algorithm, participation: Participation, rounds: int = 3, join_ratio: float = 1.0, data=None, task=None):
    settings = Settings(batch_size=16, local_epochs=2, learning_rate=0.05)
    schedule = Schedule(rounds, join_ratio, participation=participation)
    data, task = data or make_data(SIZES), task or make_task()
    return Federation(algorithm, task, algorithm.Params(), data, settings, schedule)


def run(one):
    recorder = Recorder()
    one.run([recorder])
    return recorder.records


@pytest.mark.parametrize(("unseen", "count"), [(6, 6), (1, 1), (0.2, 6), (0.01, 1), (29, 29), (0.5, 15)])
def test_as_many_are_left_out_as_asked(unseen, count):
    (ids,) = Participation(unseen).groups(30, seed=1).values()
    assert len(set(ids)) == count and ids == sorted(ids) and set(ids) <= set(range(30))


def test_groups_depend_on_the_seed_and_not_on_each_other():
    late, rare = (0.3, 5), (0.3, 0.1)
    both = Participation(late=late, rare=rare).groups(30, 0)
    assert both[LATE] == Participation(late=late).groups(30, 0)[LATE]
    assert both[RARE] == Participation(rare=rare).groups(30, 0)[RARE]
    assert both[LATE] != both[RARE] and len(both[LATE]) == len(both[RARE]) == 9
    assert both != Participation(late=late, rare=rare).groups(30, 1)
    unseen = Participation(6, late, rare).groups(30, 0)
    assert not set(unseen[UNSEEN]) & (set(unseen[LATE]) | set(unseen[RARE]))


def test_late_clients_can_be_selected_from_their_round_on():
    p = Participation(2, late=(0.5, 4))
    groups = p.groups(10, 0)
    for t in range(1, 8):
        away = set(groups[UNSEEN]) | (set(groups[LATE]) if t < 4 else set())
        assert p.reachable(groups, 10, t, 0) == [id for id in range(10) if id not in away]


def test_rare_clients_are_reached_with_their_probability():
    p = Participation(rare=(0.5, 0.2))
    groups = p.groups(10, 0)
    counts = np.bincount([id for t in range(2000) for id in p.reachable(groups, 10, t, 0)], minlength=10)
    for id, count in enumerate(counts):
        expected = 400 if id in groups[RARE] else 2000
        assert abs(count - expected) <= (5 * math.sqrt(2000 * 0.2 * 0.8) if id in groups[RARE] else 0)


@pytest.mark.parametrize("algorithm", [FedAvg, FedKDX])
def test_the_same_clients_are_selected_for_every_algorithm(algorithm):
    p = Participation(1, late=(0.4, 3), rare=(0.4, 0.5))
    expected = [record.selected for record in run(federation(FedFomo, p, rounds=5, join_ratio=0.5))]
    assert [record.selected for record in run(federation(algorithm, p, rounds=5, join_ratio=0.5))] == expected


def test_a_round_that_reaches_nobody_passes():
    records = run(federation(FedAvg, Participation(rare=(1.0, 1e-9)), rounds=2))
    assert [record.selected for record in records] == [[], []]
    assert math.isnan(records[0].train_loss) and math.isfinite(records[0].metrics[SERVED].accuracy)


def test_by_default_nothing_changes():
    plain, same = make_federation(FedAvg, make_data(SIZES)), federation(FedAvg, Participation(), join_ratio=0.5)
    plain.run()
    same.run()
    assert same_state(plain.save().tensors, same.save().tensors)


@pytest.mark.parametrize("algorithm", [FedAvg, FedKDX, Local, Centralised])
def test_nothing_is_learnt_from_unseen_clients(algorithm):
    """With other windows at the unseen clients the training ends the same, bit for bit."""
    data, other = make_data(SIZES), make_data(SIZES)
    p = Participation(2)
    ids = p.groups(len(SIZES), 0)[UNSEEN]
    for id in ids:
        other.train_x[id].add_(1)
    one, two = federation(algorithm, p, data=data), federation(algorithm, p, data=other)
    records = run(one), run(two)
    assert same_state(one.save().tensors, two.save().tensors)
    seen = [record[-1].metrics[SERVED].client_loss for record in records]
    np.testing.assert_array_equal(*seen)
    changed = federation(algorithm, p, data=replace(data, train_x=[x + 1 for x in data.train_x]))
    changed.run()
    assert not same_state(one.save().tensors, changed.save().tensors)


def test_figures_of_seen_and_unseen_clients_are_apart():
    p = Participation(2)
    one = federation(FedAvg, p)
    metrics, data = run(one)[-1].metrics, make_data(SIZES)
    assert list(metrics) == one.views == [SERVED, UNSEEN]
    ids = one.groups[UNSEEN]
    enter(one, 0, one.server.networks())
    net = one.workspace.nets["model"].eval()

    def right(x, y):
        with torch.no_grad():
            return (net(x).logits.argmax(1) == y).double()

    places = dict(enumerate(data.test_slices))
    tests = {id: right(data.test_x[place], data.test_y[place]) for id, place in places.items()}
    trains = {id: right(data.train_x[id], data.train_y[id]) for id in ids}
    seen = torch.cat([tests[id] for id in places if id not in ids])
    apart = torch.cat([torch.cat([tests[id], trains[id]]) for id in ids])
    assert metrics[SERVED].accuracy == pytest.approx(float(seen.mean()))
    assert metrics[UNSEEN].accuracy == pytest.approx(float(apart.mean()))
    assert metrics[UNSEEN].client_samples.tolist() == [12 + n if id in ids else 0 for id, n in enumerate(SIZES)]
    assert metrics[SERVED].client_samples.tolist() == [0 if id in ids else 12 for id in range(len(SIZES))]
    assert np.isnan(metrics[SERVED].client_accuracy[ids]).all()
    assert all(math.isfinite(getattr(metrics[UNSEEN], name)) for name in ("auc", "f1", "recall"))


def test_a_newcomer_gets_the_student_of_fedkdx_and_the_common_model_of_fedftl(double):
    for algorithm, net in ((FedKDX, "student"), (FedFTL, "model")):
        one = federation(algorithm, Participation(2))
        metrics = run(one)[-1].metrics[UNSEEN]
        enter(one, one.groups[UNSEEN][0], one.server.networks())
        start = one.data.seen_windows
        with torch.no_grad():
            logits = one.workspace.nets[net].eval()(one.data.test_x[start:]).logits
        loss = torch.nn.functional.cross_entropy(logits, one.data.test_y[start:])
        assert metrics.loss == pytest.approx(float(loss), rel=1e-9)


@pytest.mark.parametrize("algorithm", [Local, FedFomo])
def test_without_a_common_predictor_there_are_no_unseen_figures(algorithm):
    assert UNSEEN not in run(federation(algorithm, Participation(2)))[-1].metrics


def test_a_model_with_local_batch_norm_is_no_common_predictor():
    one = federation(FedAvg, Participation(2), task=make_task(local_bn=True))
    assert UNSEEN not in one.views


def test_validation_does_not_look_at_unseen_clients():
    data = replace(make_data(SIZES), evaluated_on="validation")
    one = federation(FedAvg, Participation(2), data=data)
    assert one.views == [SERVED]
    assert np.isnan(run(one)[-1].metrics[SERVED].client_accuracy[one.groups[UNSEEN]]).all()


def test_the_accuracy_of_late_and_rare_clients_is_recorded(tmp_path):
    p = Participation(1, late=(0.4, 3), rare=(0.4, 0.5))
    one = federation(FedAvg, p, data=make_data(SIZES, tests=9))
    records = run(one)
    served = records[-1].metrics[SERVED]
    row = csv_row(records[-1], one.groups)
    with h5py.File(tmp_path / "results.h5", "w") as file:
        write_results(file, records, dict.fromkeys(one.views, served.confusion), one.data, one.groups)
    with h5py.File(tmp_path / "results.h5") as file:
        assert file.attrs["evaluated_on"] == "test"
        for name in (LATE, RARE):
            expected = np.mean([served.client_accuracy[id] for id in one.groups[name]])  # all have nine windows
            assert row[f"{name}_accuracy"] == pytest.approx(expected)
            assert file[f"views/served/{name}_accuracy"][-1] == row[f"{name}_accuracy"]
        for name, ids in one.groups.items():
            assert file[f"groups/{name}"][:].tolist() == ids


def test_accuracy_of_some_clients_is_weighted_by_their_windows():
    metrics = run(federation(FedAvg, Participation(2)))[-1].metrics[UNSEEN]
    ids = np.flatnonzero(metrics.client_samples)
    assert metrics.accuracy_of(range(len(SIZES))) == pytest.approx(metrics.accuracy)
    assert metrics.accuracy_of(ids[:1]) == metrics.client_accuracy[ids[0]]
    assert math.isnan(metrics.accuracy_of([]))


@pytest.mark.parametrize(
    ("unseen", "late", "rare", "says"),
    [
        (2.5, None, None, "--unseen 2.5: neither a whole number of clients nor a share below 1"),
        (0, "0.3", None, "--late 0.3: write SHARE@ROUND"),
        (0, "a@b", None, "--late a@b: write SHARE@ROUND"),
        (0, "0.3@5@6", None, "write SHARE@ROUND"),
        (0, "0@5", None, "the share must be above 0"),
        (0, "1.5@5", None, "the share must be above 0 and at most 1"),
        (0, "0.3@1", None, "the round must be a whole number from 2 to 10"),
        (0, "0.3@11", None, "the round must be a whole number from 2 to 10"),
        (0, "0.3@2.5", None, "the round must be a whole number"),
        (0, None, "0.3@1", "--rare 0.3@1: the probability must be between 0 and 1"),
        (0, None, "0.3@0", "the probability must be"),
        (0, None, "nan@0.5", "the share must be"),
    ],
)
def test_what_cannot_be_is_refused(unseen, late, rare, says):
    with pytest.raises(UserError) as error:
        Participation.parse(unseen, late, rare, rounds=10)
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("participation", "says"),
    [
        (Participation(4), "--unseen 4: of 4 clients, one at least must train"),
        (Participation(0.9), "--unseen 0.9: of 4 clients"),
        (Participation(late=(0.9, 3)), "--late 0.9@3: all 4 clients would be late"),
    ],
)
def test_somebody_must_be_left_to_train(participation, says):
    with pytest.raises(UserError, match=says):
        participation.groups(4, 0)


def test_what_is_written_is_what_is_meant():
    assert Participation.parse(0.2, "0.3@5", "0.5@0.1", 10) == Participation(0.2, (0.3, 5), (0.5, 0.1))
    assert Participation.parse(0, None, None, 10) == Participation()
