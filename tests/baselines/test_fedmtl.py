"""FedMTL: the relationship penalty, the matrix it is learnt with, and Local without it."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from baselines.fedmtl import SHRINKAGE, FedMTL, FedMTLClient, FedMTLParams, relationships
from baselines.local import Local
from registry.interface import Batch, Message, Round
from tests.bounds import assert_within, gamma
from tests.conftest import CLASSES, Recorder, make_data, make_federation, make_task, same_state


def batch(count: int = 24) -> Batch:
    data = make_data(sizes=(count,))
    return Batch(data.train_x[0], data.train_y[0])


def client(id: int, **params) -> FedMTLClient:
    """Every id has a model of its own."""
    torch.manual_seed(id)
    one = FedMTLClient(id, make_task(), FedMTLParams(**params), 24)
    one.nets = FedMTLClient.build(one.task)
    return one


def server_of(clients: list[FedMTLClient]) -> FedMTL:
    made = FedMTL(make_task(), clients[0].params, {})
    made.aggregate({one.id: Message.from_bytes(one.reply().to_bytes()) for one in clients}, Round(1, 2))
    return made


def columns(clients: list[FedMTLClient]) -> Tensor:
    """W in float64: a column a client."""
    models = [one.nets["model"].parameters() for one in clients]
    return torch.stack([torch.cat([p.detach().double().flatten() for p in model]) for model in models], 1)


def trace_term(w: Tensor, omega: Tensor) -> Tensor:
    """tr(W Ω⁻¹ Wᵀ)."""
    return (w @ torch.linalg.inv(omega) * w).sum()


def test_relationships_are_the_root_over_its_trace_shrunk():
    models = [{"a": torch.randn(3, 4), "b": torch.randn(5)} for _ in range(4)]
    w = torch.stack([torch.cat([m["a"].flatten(), m["b"]]).double() for m in models], 1)
    root = torch.linalg.svd(w, full_matrices=False)
    root = root.Vh.T @ torch.diag(root.S) @ root.Vh  # (WᵀW)^{1/2} without its square
    expected = (1 - SHRINKAGE) * root / root.trace() + SHRINKAGE * torch.eye(4) / 4
    torch.testing.assert_close(relationships(models), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_relationships_of_equal_models_can_be_inverted(count):
    omega = relationships([{"a": torch.ones(6)}] * count)
    assert torch.linalg.eigvalsh(omega).min() >= SHRINKAGE / count - 1e-12
    assert torch.linalg.inv(omega).isfinite().all()


def test_they_are_positive_definite_symmetric_and_of_trace_1_in_every_round():
    federation = make_federation(FedMTL, rounds=6, params={"lam": 0.1})
    for t in range(1, 7):
        federation.round(Round(t, 6))
        omega = federation.server.omega
        assert len(omega) == len(federation.server.models)
        assert torch.linalg.eigvalsh(omega).min() > 0
        assert float(omega.trace()) == pytest.approx(1)
        torch.testing.assert_close(omega, omega.T)


@pytest.mark.parametrize("k", [0, 1, 2])
def test_the_penalty_differs_from_the_trace_term_by_a_constant_and_its_gradient_is_that_terms(k, double):
    """Against λ tr(W Ω⁻¹ Wᵀ) in float64, as printed; a detached penalty, the usual trap, would be local training."""
    clients = [client(id, lam=0.3) for id in range(3)]
    made, one, w = server_of(clients), clients[k], columns(clients)
    w.requires_grad_()
    (0.3 * trace_term(w, made.omega)).backward()
    one.receive(Message.from_bytes(made.message(k, Round(2, 2)).to_bytes()))
    context = one.context()
    penalty = one.losses(one.nets, batch(), context)["relations"]
    penalty.backward()
    found = torch.cat([p.grad.flatten() for p in one.nets["model"].parameters()]).double()
    assert found.norm() > 0.1
    # the stiffness alone travels in float32
    assert_within(found, w.grad[:, k], gamma(2) * w.grad[:, k].abs() + 1e-9)

    with torch.no_grad():
        for p in one.nets["model"].parameters():
            p.add_(0.1 * torch.randn_like(p))
        change = one.losses(one.nets, batch(), context)["relations"] - penalty
        expected = 0.3 * (trace_term(columns(clients), made.omega) - trace_term(w, made.omega))
    assert change.item() == pytest.approx(expected.item(), rel=gamma(2))


def test_related_clients_attract_each_other():
    """The inverse matters: tr(W Ω Wᵀ) itself would drive apart what is alike."""
    clients = [client(0), client(1)]
    clients[1].load({name: tensor + 0.05 for name, tensor in clients[0].state().items()})
    made = server_of(clients)
    assert made.omega[0, 1] > 0
    centre = made.message(0, Round(2, 2)).tensors["centre/model.fc.weight"].double()
    other = made.models[1]["model.fc.weight"].double()
    # what float32 turns a direction by is felt in the square
    assert torch.cosine_similarity(centre.flatten(), other.flatten(), dim=0) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("local_bn", [False, True])
def test_without_the_penalty_it_is_local(local_bn):
    alone = make_federation(Local, rounds=4, task=make_task(local_bn=local_bn), params={"local_rounds": "selected"})
    tasks = make_federation(FedMTL, rounds=4, task=make_task(local_bn=local_bn), params={"lam": 0.0})
    records = []
    for federation in (alone, tasks):
        records.append(Recorder())
        federation.run([records[-1]])
    assert all(same_state(*pair) for pair in zip(alone.workspace.kept, tasks.workspace.kept, strict=True))
    losses = [record.records[-1].metrics["served"].client_loss for record in records]
    assert (losses[0] == losses[1]).all()


def test_by_default_it_is_not_local():
    alone, tasks = make_federation(Local, join_ratio=1), make_federation(FedMTL, join_ratio=1)
    alone.run()
    tasks.run()
    assert not any(same_state(*pair) for pair in zip(alone.workspace.kept, tasks.workspace.kept, strict=True))
    assert {field.name for field in fields(FedMTLParams)} == {"lam"}


def test_the_penalty_draws_clients_together():
    def spread(lam):
        federation = make_federation(FedMTL, rounds=5, join_ratio=1, params={"lam": lam})
        federation.run()
        heads = torch.stack([kept["model.fc.weight"] for kept in federation.workspace.kept])
        return float((heads - heads.mean(0)).norm())

    assert spread(0.1) < 0.7 * spread(0.0)


@pytest.mark.parametrize("local_bn", [False, True])
def test_only_shared_parameters_travel_and_a_message_is_as_large_as_one_model(local_bn):
    federation = make_federation(FedMTL, rounds=5, join_ratio=1, task=make_task(local_bn=local_bn))
    federation.run()
    parameters = {f"model.{name}" for name, _ in federation.workspace.nets["model"].named_parameters()}
    if local_bn:
        parameters -= {"model.bn.weight", "model.bn.bias"}
    told = federation.server.message(1, Round(6, 9)).tensors
    assert told.keys() == {f"centre/{name}" for name in parameters} | {"stiffness"}
    private = [kept[name] for kept in federation.workspace.kept for name in kept.keys() - parameters]
    sent = [*told.values(), *(t for model in federation.server.models.values() for t in model.values())]
    for id, model in federation.server.models.items():
        assert model.keys() == parameters
        assert all(torch.equal(tensor, federation.workspace.kept[id][name]) for name, tensor in model.items())
    assert not any(a.shape == b.shape and torch.equal(a, b) for a in sent for b in private)


def test_a_client_first_seen_late_trains_alone_once_and_then_is_related():
    federation = make_federation(FedMTL, rounds=400, join_ratio=0.25)
    for t in range(1, 7):
        federation.round(Round(t, 400))
    late = next(id for id in range(4) if id not in federation.server.models)
    assert not federation.server.message(late, Round(400, 400)).tensors
    trained = federation.backend.train({late: Message()}, Round(400, 400))[late]
    federation.server.aggregate({late: trained.reply}, Round(400, 400))
    assert list(federation.server.models) == sorted(federation.server.models)
    assert len(federation.server.omega) == len(federation.server.models)
    assert federation.server.message(late, Round(400, 400)).tensors
    assert not federation.server.networks()


def test_clients_keep_nothing_but_their_model():
    federation = make_federation(FedMTL, join_ratio=1)
    federation.run()
    assert not any(one.memory or one.received for one in federation.workspace.clients)


def test_a_saved_server_goes_on_as_if_nothing_had_happened():
    federation = make_federation(FedMTL, make_data((9,) * 12), rounds=6)
    new = FedMTL(federation.server.task, federation.server.params, {})
    new.restore(Message.from_bytes(federation.server.save().to_bytes()))  # nobody was seen yet
    assert not new.message(0, Round(1, 6)).tensors
    for t in (1, 2, 3, 4):
        federation.round(Round(t, 6))
    old = federation.server
    new.restore(Message.from_bytes(old.save().to_bytes()))
    for id in range(12):
        assert new.message(id, Round(5, 9)).to_bytes() == old.message(id, Round(5, 9)).to_bytes()
    assert new.save().to_bytes() == old.save().to_bytes()


def test_it_learns_also_with_a_client_of_one_window():
    recorder = Recorder()
    make_federation(FedMTL, make_data((40, 1, 65, 20)), rounds=15).run([recorder])
    assert not any(record.rejected for record in recorder.records)
    assert recorder.records[-1].metrics["served"].accuracy > 2 / CLASSES
