"""FedKD: its losses as the paper prints them, what weighs them, what travels, what it reduces to."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch

from baselines import fedkd
from baselines.fedavg import FedAvg
from baselines.fedkd import FedKD, FedKDClient, FedKDParams
from baselines.local import Local
from registry.interface import Batch
from tests.baselines.checks import awkward_data, goes_on_identically, overheard, run, travels
from tests.conftest import (
    CLASSES,
    SHAPE,
    Recorder,
    TinierNet,
    TinyNet,
    make_data,
    make_federation,
    make_task,
    same_state,
)


def batch(count: int = 24) -> Batch:
    data = make_data(sizes=(count,))
    return Batch(data.train_x[0], data.train_y[0])


def client(student: type = TinierNet) -> FedKDClient:
    torch.manual_seed(0)
    one = FedKDClient(0, make_task(student), FedKDParams(), 24)
    one.nets = FedKDClient.build(one.task)
    return one


def gradients(one: FedKDClient, loss: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    found = {}
    for name, net in one.nets.items():
        parameters = list(net.parameters())
        grads = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        found[name] = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads, strict=True)]
    return found


def parts(one: FedKDClient, data: Batch) -> dict[str, torch.Tensor]:
    """Eq. 1 to 4 and the hidden loss, straight from the formulas, in evaluation mode."""
    y = data.y
    teacher, student = one.nets["teacher"](data.x), one.nets["student"](data.x)
    p_t, p_s = teacher.logits.softmax(1), student.logits.softmax(1)
    mapped = student.features @ one.nets["projection"].weight.T
    return {
        "task_t": -p_t[range(len(y)), y].log().mean(),
        "task_s": -p_s[range(len(y)), y].log().mean(),
        "kl_t": (p_s.detach() * (p_s.detach() / p_t).log()).sum(1).mean(),  # KL(y_s, y_t)
        "kl_s": (p_t.detach() * (p_t.detach() / p_s).log()).sum(1).mean(),
        "hidden_t": ((teacher.features - mapped.detach()) ** 2).mean(),
        "hidden_s": ((teacher.features.detach() - mapped) ** 2).mean(),
    }


def in_float64(one: FedKDClient) -> Batch:
    for net in one.nets.values():
        net.double().eval()
    data = batch()
    return Batch(data.x.double(), data.y)


@pytest.mark.parametrize("student", [TinyNet, TinierNet])
def test_losses_are_the_papers(student):
    one = client(student)
    data = in_float64(one)
    p = parts(one, data)
    both = p["task_t"] + p["task_s"]
    found = one.losses(one.nets, data, {})
    torch.testing.assert_close(found["teacher"], p["task_t"] + p["kl_t"] / both + p["hidden_t"] / both)
    torch.testing.assert_close(found["student"], p["task_s"] + p["kl_s"] / both + p["hidden_s"] / both)


def test_the_task_losses_in_the_denominator_are_weights_without_gradient():
    one = client()
    data = in_float64(one)
    p = parts(one, data)
    both = (p["task_t"] + p["task_s"]).item()
    found = one.losses(one.nets, data, {})
    for side, net in (("t", "teacher"), ("s", "student")):
        expected = gradients(one, p[f"task_{side}"] + p[f"kl_{side}"] / both + p[f"hidden_{side}"] / both)[net]
        for mine, theirs in zip(gradients(one, found[net])[net], expected, strict=True):
            torch.testing.assert_close(mine, theirs)


def test_each_network_feels_its_own_loss_alone_and_the_map_the_students():
    one = client()
    found = one.losses(one.nets, batch(), {})
    for loss, felt in (("teacher", {"teacher"}), ("student", {"student", "projection"})):
        for name, grads in gradients(one, found[loss]).items():
            assert any(grad.any() for grad in grads) == (name in felt), (loss, name)


def test_the_map_goes_from_the_students_features_to_the_teachers():
    one = client()
    assert one.nets["projection"].weight.shape == (TinyNet.width * 2, TinierNet.width * 2)
    assert "projection" in client(TinyNet).nets  # learnt even where the sizes agree


def test_two_networks_without_any_task_loss_give_finite_gradients():
    one, data = client(), batch(1)
    for name in ("teacher", "student"):
        one.nets[name].head.bias.data[data.y] = 1e4
    found = one.losses({name: net.eval() for name, net in one.nets.items()}, data, {})
    assert all(loss.isfinite() for loss in found.values())
    assert all(g.isfinite().all() for grads in gradients(one, found["student"]).values() for g in grads)


def test_padding_rows_change_nothing(double):
    one, data = client(), batch(10)
    for net in one.nets.values():
        net.eval()
    rows = torch.cat([data.x, 100 * torch.ones(3, *SHAPE)])
    padded = Batch(rows, torch.cat([data.y, data.y[:3]]), torch.arange(13) < 10)
    plain = one.losses(one.nets, data, {})
    for name, value in one.losses(one.nets, padded, {}).items():
        torch.testing.assert_close(value, plain[name])


def test_without_distillation_teachers_are_local_and_the_student_is_fedavg(monkeypatch, double):
    """An infinite denominator switches both terms off; ε = 1 compresses nothing."""
    monkeypatch.setattr(fedkd, "SMALLEST_TASK_LOSS", float("inf"))
    lossless = {"epsilon_start": 1.0, "epsilon_end": 1.0}
    alone, average = make_federation(Local, join_ratio=1), make_federation(FedAvg, join_ratio=1)
    both = make_federation(FedKD, join_ratio=1, params=lossless)
    for name, tensor in average.server.weights.items():
        both.server.weights[name.replace("model.", "student.")] = tensor.clone()
    for federation in (alone, average, both):
        federation.run()
    for mine, theirs in zip(alone.workspace.kept, both.workspace.kept, strict=True):
        assert all(torch.equal(tensor, theirs[name.replace("model.", "teacher.")]) for name, tensor in mine.items())
    for name, tensor in average.server.weights.items():
        found = both.server.weights[name.replace("model.", "student.")]
        torch.testing.assert_close(found, tensor, rtol=1e-9, atol=1e-9)


def test_the_defaults_are_the_papers():
    assert (FedKDParams().epsilon_start, FedKDParams().epsilon_end) == (0.95, 0.98)


CHANGES = {"epsilon_start": 0.5, "epsilon_end": 0.5, "weights": "uniform", "serve": "student"}


@pytest.mark.parametrize("name", [field.name for field in fields(FedKDParams)])
def test_every_hyper_parameter_changes_the_outcome(name):
    default, changed = make_federation(FedKD), make_federation(FedKD, params={name: CHANGES[name]})
    recorders = Recorder(), Recorder()
    default.run([recorders[0]])
    changed.run([recorders[1]])
    if name == "serve":  # changes who predicts, and nothing else
        one, other = (recorder.records[-1].metrics["served"].loss for recorder in recorders)
        assert one != other
    else:
        assert not same_state(default.save().tensors, changed.save().tensors)


def test_teachers_and_maps_never_travel():
    federation = make_federation(FedKD, task=make_task(TinierNet), join_ratio=1)
    seen = overheard(federation)
    run(federation)
    for kept in federation.workspace.kept:
        for name, tensor in kept.items():
            if name.startswith(("teacher.", "projection.")) and tensor.unique().numel() > 1:
                assert not travels(tensor, seen), name
    assert not any(name.startswith(("teacher", "projection")) for name in federation.server.weights)


def test_a_saved_server_goes_on_identically():
    assert goes_on_identically(lambda: make_federation(FedKD, task=make_task(TinierNet), rounds=4))


@pytest.mark.parametrize("local_bn", [False, True])
def test_awkward_and_late_clients(local_bn):
    """One window, one class, a class missing; client 3 is first seen in the last round."""
    federation = make_federation(FedKD, awkward_data(), task=make_task(TinierNet, local_bn), rounds=6)
    run(federation, [(0, 1, 2)] * 4 + [(1, 2), (0, 3)])
    assert federation.workspace.enter(3).serves() == "teacher"


def test_an_untrained_client_is_served_by_the_student():
    federation = make_federation(FedKD, rounds=1)
    views = run(federation, [(1,)])[0].metrics
    assert views["served"].client_loss[0] == views["student"].client_loss[0] != views["teacher"].client_loss[0]
    assert views["served"].client_loss[1] == views["teacher"].client_loss[1]


def test_it_learns():
    metrics = run(make_federation(FedKD, task=make_task(TinierNet), rounds=15, join_ratio=1))[-1].metrics
    assert metrics["teacher"].accuracy > 0.8
    assert metrics["student"].accuracy > 2 / CLASSES
