"""Which of teacher and student predicts, and where a teacher starts; the same for FedKDX+ and FedKD+."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from baselines.fedkd import FedKD
from baselines.fedkd_plus import FedKDPlus
from fedkdx_plugin.algorithm.additions import OFF, student_share
from fedkdx_plugin.algorithm.fedkdx import FedKDX
from fedkdx_plugin.algorithm.fedkdx_plus import FedKDXPlus
from fedkdx_plugin.algorithm.pull import own_progress
from fedkdx_plugin.engine.evaluation import SERVED
from registry.errors import UserError
from registry.interface import Round, mixture
from tests.baselines import reference
from tests.baselines.checks import overheard, travels
from tests.bounds import assert_within, gamma
from tests.conftest import Recorder, TinierNet, TinyNet, enter, make_federation, make_task, same_state

MOVED = 2 * 10 * 1e-9 * 10  # by two rounds' training at a rate of 1e-9: 10 steps each at most, gradients of norm 10
PLUS = [FedKDXPlus, FedKDPlus]


def metrics(federation):
    recorder = Recorder()
    federation.run([recorder])
    return recorder.records[-1].metrics


def logits(federation, net: str, id: int, x):
    """Return the predictions of a client's network now, computed by the engine."""
    enter(federation, id, federation.server.networks())
    with torch.no_grad():
        return federation.workspace.nets[net].eval()(x).logits.double()


def test_a_mixture_is_the_mean_of_probabilities():
    torch.manual_seed(0)
    found = {"a": 5 * torch.randn(50, 4), "b": 5 * torch.randn(50, 4)}
    expected = 0.25 * found["a"].double().softmax(1) + 0.75 * found["b"].double().softmax(1)
    largest = max(float(logits.abs().max()) for logits in found.values())
    # a log p is a difference of numbers as large as two logits, rounded a few times: so far is p off, of itself
    allowed = gamma(8) * (2 * largest + 1) * expected
    assert_within(mixture(found, {"a": 0.25, "b": 0.75}).double().softmax(1), expected, allowed)
    assert mixture(found, "b") is found["b"]


def test_a_mixture_stays_finite_where_both_are_sure():
    sure = {"a": torch.tensor([[400.0, 0.0, -300.0]]), "b": torch.tensor([[0.0, 400.0, -300.0]])}
    mixed = mixture(sure, {"a": 0.5, "b": 0.5})
    assert mixed.isfinite().all()
    torch.testing.assert_close(mixed.softmax(1), torch.tensor([[0.5, 0.5, 0.0]]))


@pytest.mark.parametrize("algorithm", [FedKDX, FedKD])
@pytest.mark.parametrize("serve", ["teacher", "student"])
def test_one_of_the_two_is_served(algorithm, serve):
    views = metrics(make_federation(algorithm, join_ratio=1, params={"serve": serve}))
    assert (views[SERVED].client_loss == views[serve].client_loss).all()
    assert (views["teacher"].client_loss != views["student"].client_loss).all()


@pytest.mark.parametrize("algorithm", PLUS)
def test_both_are_served_the_student_as_far_as_it_explains_the_training_windows(algorithm, double):
    """(p_T + w p_S) / (1 + w), w = exp(-4 L) of the student that the client was sent, in float64."""
    federation = make_federation(algorithm, rounds=8, join_ratio=1, params=OFF | {"serve": "both"})
    for t in range(1, 8):
        federation.round(Round(t, 8))
    sent = {name: tensor.clone() for name, tensor in federation.server.networks().items()}
    served = federation.round(Round(8, 8)).metrics[SERVED]
    data, weights = federation.data, []
    for id, place in enumerate(data.test_slices):
        enter(federation, id, sent)
        with torch.no_grad():
            before = federation.workspace.nets["student"].eval()(data.train_x[id]).logits.double().log_softmax(1)
        own = data.train_y[id]
        weights.append(math.exp(4 * float(before[range(len(own)), own].mean())))
        teacher, student = (
            logits(federation, net, id, data.test_x[place]).softmax(1) for net in ("teacher", "student")
        )
        p, y = (teacher + weights[-1] * student) / (1 + weights[-1]), data.test_y[place]
        assert served.client_accuracy[id] == pytest.approx(float((p.argmax(1) == y).double().mean()))
        assert served.client_loss[id] == pytest.approx(float(-p[range(len(y)), y].log().mean()), rel=1e-9)
        one_hot = torch.nn.functional.one_hot(y, 4)
        assert served.client_auc[id] == pytest.approx(roc_auc_score(one_hot.flatten(), p.flatten()), abs=1e-6)
    assert 0.1 < min(weights) < max(weights) < 0.9  # else this test would say little


def test_a_student_counts_as_much_as_the_teacher_or_hardly_at_all():
    shares = [float(student_share(torch.tensor(loss).double())) for loss in (0.0, 0.5, 100.0)]
    assert shares == pytest.approx([1 / 2, 1 / (1 + math.exp(2)), 1e-6])


def test_an_untrained_client_is_served_by_the_student():
    federation = make_federation(FedKDXPlus, rounds=1, join_ratio=0.25, params=OFF | {"serve": "both"})
    record = federation.round(Round(1, 1))
    untrained = [id for id in range(4) if id not in record.selected]
    served, student = (record.metrics[view].client_loss for view in (SERVED, "student"))
    assert (served[untrained] == student[untrained]).all()


def test_the_share_survives_a_restart():
    def federation():
        return make_federation(FedKDXPlus, rounds=4, join_ratio=0.5, params=OFF | {"serve": "both"})

    whole, first, second = federation(), federation(), federation()
    for t in (1, 2):
        whole.round(Round(t, 4))
        first.round(Round(t, 4))
    second.restore(first.save())
    for t in (3, 4):
        one, two = (run.round(Round(t, 4)).metrics[SERVED] for run in (whole, second))
        assert (one.client_loss == two.client_loss).all()
    assert same_state(whole.save().tensors, second.save().tensors)


@pytest.mark.parametrize("algorithm", PLUS)
def test_a_warm_teacher_starts_from_the_student_it_is_sent_and_goes_on_from_itself(algorithm, double):
    federation = make_federation(
        algorithm, rounds=2, join_ratio=1, learning_rate=1e-9, params=OFF | {"teacher_init": "student"}
    )
    start = {name: tensor + 0.5 for name, tensor in federation.server.weights.items()}
    federation.server.weights = dict(start)
    federation.round(Round(1, 2))
    for kept in federation.workspace.kept:  # the rate is tiny: where it ends is where it began
        for name, tensor in start.items():
            if ".running_" not in name:
                torch.testing.assert_close(kept[name.replace("student.", "teacher.")], tensor, rtol=0, atol=MOVED)
    federation.server.weights = {name: tensor + 3 for name, tensor in start.items()}
    federation.server.downlink.synced.clear()  # so that the whole student is sent again
    federation.round(Round(2, 2))
    head = federation.workspace.kept[0]["teacher.head.weight"]
    torch.testing.assert_close(head, start["student.head.weight"], rtol=0, atol=MOVED)


@pytest.mark.parametrize("algorithm", PLUS)
@pytest.mark.parametrize(("start", "end"), [(0.25, 0.25), (1.0, 1.0), (0.8, 0.0)])
def test_a_teacher_is_pulled_towards_every_student_it_is_sent(algorithm, start, end, double):
    params = OFF | {"pull_start": start, "pull_end": end}
    federation = make_federation(algorithm, rounds=2, join_ratio=1, learning_rate=1e-9, params=params)
    for t in (1, 2):  # the rate is tiny: where training ends is where it began
        pull = start + (end - start) * t / 2  # in a straight line, as ε in eq. 10
        before = [dict(kept) or dict(federation.workspace.initial) for kept in federation.workspace.kept]
        federation.server.weights = {name: tensor + t for name, tensor in federation.server.weights.items()}
        federation.server.downlink.synced.clear()  # so that the whole student is sent
        sent = {name: tensor.clone() for name, tensor in federation.server.weights.items()}
        federation.round(Round(t, 2))
        for own, kept in zip(before, federation.workspace.kept, strict=True):
            for name, student in sent.items():
                if ".running_" not in name:
                    teacher = name.replace("student.", "teacher.")
                    expected = (1 - pull) * own[teacher].double() + pull * student.double()
                    torch.testing.assert_close(kept[teacher].double(), expected, rtol=0, atol=MOVED)


@pytest.mark.parametrize("algorithm", PLUS)
def test_a_client_that_is_rarely_reached_stays_longer_with_the_student(algorithm, double):
    params = OFF | {"pull_start": 1.0, "pull_end": 0.0}
    federation = make_federation(algorithm, rounds=10, join_ratio=1, learning_rate=1e-9, params=params)
    start = dict(federation.workspace.initial)
    moved = {name: tensor + 1 for name, tensor in federation.server.weights.items()}
    pulls = []
    for trained in (0, 2, 3, 9):
        federation.workspace.clients[0].trained, federation.workspace.kept[0] = trained, {}
        federation.server.weights = dict(moved)
        federation.server.downlink.synced.clear()
        federation.backend.train({0: federation.server.message(0, Round(8, 20, 0.5))}, Round(8, 20, 0.5))
        name = "student.head.weight"
        own, student = start[name.replace("student", "teacher")].double(), moved[name].double()
        there = federation.workspace.kept[0][name.replace("student", "teacher")].double()
        pulls.append(float(((there - own) / (student - own)).mean()))
    # of 10 rounds to be expected, half are 5: it is in its 1st, 3rd, 4th; never further than the round, 8 of 20
    assert pulls == pytest.approx([1 - 1 / 5, 1 - 8 / 20, 1 - 8 / 20, 1 - 8 / 20], abs=1e-4)


def test_a_client_is_as_far_as_the_round_or_as_its_own_rounds():
    assert [own_progress(0.9, trained, 40) for trained in (0, 5, 17, 39)] == [1 / 20, 6 / 20, 0.9, 0.9]
    assert own_progress(1.0, 0, 0.3) == 1.0  # of whom less than one round is to be expected


def test_a_pull_of_one_is_a_start_from_the_student():
    one, two = (
        make_federation(FedKDXPlus, rounds=1, params=OFF | p) for p in ({"teacher_init": "student"}, {"pull_end": 1.0})
    )
    one.run()
    two.run()
    assert same_state(one.save().tensors, two.save().tensors)


def test_a_warm_teacher_must_be_of_the_students_kind():
    def check(model, **params):
        FedKDXPlus.check(make_task(model), FedKDXPlus.Params(**OFF | params))

    with pytest.raises(UserError, match=r"pull_end=0.5: the student is a TinierNet.*or use --set pull_end=0.0"):
        check(TinierNet, pull_end=0.5)
    with pytest.raises(UserError, match="teacher_init=student: the student is a TinierNet, the teacher a TinyNet"):
        check(TinierNet, teacher_init="student")
    with pytest.raises(UserError, match=r"or use --set teacher_init=own --set pull_start=0\.0$"):
        FedKDXPlus.check(make_task(TinierNet), FedKDXPlus.Params())
    check(TinyNet, teacher_init="student")
    check(TinierNet)


@pytest.mark.parametrize("algorithm", PLUS)
@pytest.mark.parametrize("remembered", ["teacher", "student"])
def test_a_memory_is_of_the_teacher_as_trained_or_of_the_student_as_received(algorithm, remembered, double):
    """λ times the shares of the nearest own windows, plus 1 - λ times the network's own prediction, in float64."""
    plain, federation = (
        make_federation(algorithm, rounds=3, join_ratio=1, params=OFF | {"serve": serve})
        for serve in (remembered, f"{remembered}+memory")
    )
    for t in (1, 2):
        federation.round(Round(t, 3))
    sent = {name: tensor.clone() for name, tensor in federation.server.networks().items()}
    served = federation.round(Round(3, 3)).metrics[SERVED]
    plain.run()
    assert same_state(dict(plain.server.weights), dict(federation.server.weights))  # a memory changes no training
    data, shares = federation.data, []
    for id, place in enumerate(data.test_slices):
        enter(federation, id, sent)
        client = federation.workspace.clients[id]
        assert client.serves() == "memory"
        nets = federation.workspace.nets
        shares.append(float(nets["memory"].share))
        network = nets[remembered].eval()
        with torch.no_grad():
            own, test = network(data.train_x[id]), network(data.test_x[place])
        one_hot = torch.nn.functional.one_hot(data.train_y[id], 4).double().numpy()
        near = [reference.neighbours(h.numpy(), own.features.numpy(), one_hot) for h in test.features]
        p = shares[-1] * torch.from_numpy(np.array(near)) + (1 - shares[-1]) * test.logits.double().softmax(1)
        p, y = p.clamp(min=1e-6) / p.clamp(min=1e-6).sum(1, keepdim=True), data.test_y[place]
        assert served.client_accuracy[id] == pytest.approx(float((p.argmax(1) == y).double().mean()))
        assert served.client_loss[id] == pytest.approx(float(-p[range(len(y)), y].log().mean()), rel=1e-9)
    assert max(shares) > 0  # else this test would say nothing of memories


def test_a_memory_never_leaves_its_client_and_one_without_is_not_made():
    federation = make_federation(FedKDXPlus, rounds=1, params={"serve": "student+memory"})
    heard = overheard(federation)
    federation.round(Round(1, 1))
    kept = [kept for kept in federation.workspace.kept if kept]
    assert kept and not any(travels(own["memory.keys"], heard) for own in kept)
    assert not any(name.startswith("memory") for name in federation.server.networks())
    assert "memory" not in make_federation(FedKDXPlus).workspace.nets


def test_the_memory_of_a_student_of_another_kind_is_its_own():
    params = FedKDXPlus.Params(**OFF | {"serve": "student+memory"})
    nets = FedKDXPlus.Client.build(replace(make_task(TinierNet), params=params))
    assert type(nets["memory"].base) is TinierNet and type(nets["teacher"]) is TinyNet


@pytest.mark.parametrize(("serve", "how"), [("both", "weighs predictions by a loss"), ("student+memory", "remembers")])
def test_where_windows_meet_in_predictions_it_is_said(serve, how):
    params = FedKDXPlus.Params(serve=serve, use=("kd", "nkd"))
    assert FedKDXPlus.Client.meeting(params).startswith(how)
    assert not FedKDXPlus.Client.meeting(FedKDXPlus.Params(serve="student", use=("kd", "nkd")))
