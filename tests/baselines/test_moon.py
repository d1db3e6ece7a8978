"""MOON: the model-contrastive term, its two fixed networks, and FedAvg without it."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from baselines.fedavg import FedAvg
from baselines.moon import MOON, MOONClient, MOONParams, contrastive
from registry.interface import Batch, Message, Round, float_state
from tests.conftest import CLASSES, SHAPE, Recorder, make_data, make_federation, make_task, same_state
from tests.fedkdx_plugin.stacked_runs import assert_alike, both


def batch(count: int = 24) -> Batch:
    data = make_data(sizes=(count,))
    return Batch(data.train_x[0], data.train_y[0])


def client(**params) -> MOONClient:
    """With three different networks."""
    torch.manual_seed(0)
    one = MOONClient(0, make_task(), MOONParams(**params), 24)
    one.nets = MOONClient.build(replace(one.task, params=one.params))
    for name, net in one.nets.items():
        net.train(name == "model")
        for tensor in float_state({name: net}).values():
            tensor.add_(torch.rand(tensor.shape) / 5)
    return one


def part(federation, id: int, net: str) -> dict[str, torch.Tensor]:
    """Return a client's network after it has received the server's message of now."""
    one = federation.workspace.enter(id)
    one.receive(Message.from_bytes(federation.server.message(id, Round(1, 1)).to_bytes()))
    return {name: tensor.clone() for name, tensor in float_state({"model": one.nets[net]}).items()}


def test_the_losses_are_equations_3_and_4_in_float64():
    one = client(mu=3.0, tau=0.4)
    for net in one.nets.values():
        net.double().eval()
    x, y = batch().x.double(), batch().y
    z, z_global, z_previous = (one.nets[name](x).features for name in ("model", "global", "previous"))

    def sim(a, b):
        return torch.exp((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)) / 0.4)

    expected = 3.0 * -torch.log(sim(z, z_global) / (sim(z, z_global) + sim(z, z_previous))).mean()
    found = one.losses(one.nets, Batch(x, y), {})
    torch.testing.assert_close(found["contrast"], expected, rtol=1e-9, atol=0)
    logits = one.nets["model"](x).logits
    cross_entropy = (logits.exp().sum(1).log() - logits[range(len(y)), y]).mean()
    torch.testing.assert_close(found["model"], cross_entropy, rtol=1e-9, atol=0)


def test_only_the_models_features_feel_the_term():
    one = client()
    one.losses(one.nets, batch(), {})["contrast"].backward()
    gradients = {name: p.grad for name, p in one.nets["model"].named_parameters()}
    assert all(gradients[name].abs().sum() > 0 for name in ("conv.weight", "bn.weight", "fc.weight"))
    assert gradients["head.weight"] is None
    assert all(p.grad is None for name in ("global", "previous") for p in one.nets[name].parameters())


def test_the_term_draws_towards_the_global_and_off_the_previous_features():
    z, z_global, z_previous = torch.eye(3)[:, None]
    z = (z + z_global + z_previous).requires_grad_()
    contrastive(z, z_global, z_previous, 0.5).sum().backward()
    step = -z.grad
    assert (step * z_global).sum() > 0 > (step * z_previous).sum()


def test_dead_features_have_no_direction_and_no_gradient():
    z = torch.zeros(2, 5, requires_grad=True)
    value = contrastive(z, torch.rand(2, 5), torch.zeros(2, 5), 0.5)
    value.sum().backward()
    torch.testing.assert_close(value.detach(), torch.full((2,), 2.0).log())
    assert (z.grad == 0).all()


def test_padding_rows_change_nothing(double):
    one, data = client(), batch(10)
    one.nets["model"].eval()
    rows = torch.cat([data.x, 100 * torch.ones(3, *SHAPE)])
    padded = one.losses(one.nets, Batch(rows, torch.cat([data.y, data.y[:3]]), torch.arange(13) < 10), {})
    for name, value in one.losses(one.nets, data, {}).items():
        torch.testing.assert_close(padded[name], value)


@pytest.mark.parametrize("local_bn", [False, True])
def test_without_the_term_it_is_fedavg(local_bn):
    plain = make_federation(FedAvg, task=make_task(local_bn=local_bn), rounds=4)
    moon = make_federation(MOON, task=make_task(local_bn=local_bn), rounds=4, params={"mu": 0.0})
    plain.run()
    moon.run()
    assert same_state(dict(plain.server.weights), dict(moon.server.weights))
    for mine, theirs in zip(plain.workspace.kept, moon.workspace.kept, strict=True):
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def test_a_clients_first_round_is_fedavg_since_there_is_nothing_to_contrast():
    plain = make_federation(FedAvg, rounds=1, join_ratio=1)
    moon = make_federation(MOON, rounds=1, join_ratio=1, params={"mu": 5.0})
    plain.run()
    moon.run()
    assert same_state(dict(plain.server.weights), dict(moon.server.weights))


@pytest.mark.parametrize("local_bn", [False, True])
def test_the_previous_model_is_the_one_the_client_trained_last(local_bn):
    federation = make_federation(MOON, rounds=400, join_ratio=0.25, task=make_task(local_bn=local_bn))
    trained: dict[int, dict] = {}
    keep = federation.workspace.keep

    def listen(one):
        trained[one.id] = {n: t.clone() for n, t in float_state({"model": one.nets["model"]}).items()}
        keep(one)

    federation.workspace.keep = listen
    for t in range(1, 5):
        federation.round(Round(t, 400))
        for id in range(4):
            sent = federation.server.weights
            assert all(
                torch.equal(tensor, sent[n]) for n, tensor in part(federation, id, "global").items() if n in sent
            )
            assert same_state(part(federation, id, "model"), part(federation, id, "global"))
            expected = trained.get(id) or part(federation, id, "global")
            assert same_state(part(federation, id, "previous"), expected)
    assert 0 < len(trained) < 4  # both cases were met


def test_by_default_it_is_not_fedavg():
    """From a client's second round on; so the two agree in the first alone."""
    plain, moon = make_federation(FedAvg, join_ratio=1, rounds=2), make_federation(MOON, join_ratio=1, rounds=2)
    plain.run()
    moon.run()
    assert not same_state(dict(plain.server.weights), dict(moon.server.weights))


CHANGES = {"mu": 5.0, "tau": 2.0, "projection": 5}


@pytest.mark.parametrize("name", CHANGES)
def test_every_hyper_parameter_changes_the_outcome(name):
    assert CHANGES.keys() == {field.name for field in fields(MOONParams)}
    default = make_federation(MOON, rounds=2, join_ratio=1)
    changed = make_federation(MOON, rounds=2, join_ratio=1, params={name: CHANGES[name]})
    default.run()
    changed.run()
    assert not same_state(dict(default.server.weights), dict(changed.server.weights))


def test_it_sends_what_fedavg_sends_and_keeps_one_model_a_client():
    bytes_sent = []
    for algorithm in (FedAvg, MOON):
        recorder, federation = Recorder(), make_federation(algorithm)
        federation.run([recorder])
        bytes_sent.append([(record.bytes_up, record.bytes_down) for record in recorder.records])
    assert bytes_sent[0] == bytes_sent[1]
    names = set(federation.server.weights)
    assert all(kept.keys() <= names for kept in federation.workspace.kept)
    assert not any(one.memory for one in federation.workspace.clients)
    assert federation.views == ["served"]


def test_a_saved_server_goes_on_as_if_nothing_had_happened():
    federation = make_federation(MOON)
    federation.run()
    new = MOON(federation.server.task, federation.server.params, {})
    new.restore(Message.from_bytes(federation.server.save().to_bytes()))
    assert new.message(0, Round(4, 6)).to_bytes() == federation.server.message(0, Round(4, 6)).to_bytes()


def test_it_learns_also_with_a_client_of_one_window():
    recorder = Recorder()
    make_federation(MOON, make_data((40, 1, 65, 20)), rounds=15).run([recorder])
    assert not any(record.rejected for record in recorder.records)
    assert recorder.records[-1].metrics["served"].accuracy > 2 / CLASSES


def test_the_projection_head_is_two_layers_before_a_new_output_layer(double):
    """The paper's (section 3.2): features, a hidden layer of as many, 5 outputs of any sign, the output layer."""
    one = client(projection=5)
    model = one.nets["model"].double().eval()
    assert [tuple(p.shape) for p in model.projection.parameters()] == [(16, 16), (16,), (5, 16), (5,)]
    assert tuple(model.head.weight.shape) == (CLASSES, 5) and model.feature_size == 5
    x = batch().x.double()
    first, _, second = model.projection
    hidden = (model.network.features(x) @ first.weight.T + first.bias).clamp(min=0)
    z = hidden @ second.weight.T + second.bias
    torch.testing.assert_close(model(x).features, z, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model(x).logits, z @ model.head.weight.T + model.head.bias, rtol=1e-12, atol=1e-12)
    assert not any("network.head" in name for name in model.state_dict())


def test_with_the_projection_head_it_runs_on_every_backend(double):
    one, other = both(MOON, params={"projection": 5})
    assert_alike(one, other, 1e-9)
