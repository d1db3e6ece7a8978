"""FedFomo: first-order weights on held-out windows, the server's choice of models, and Local without others' models."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from baselines.fedfomo import START, FedFomo, FedFomoClient, FedFomoParams
from baselines.local import Local, LocalClient
from fedkdx_plugin.engine.training import hold_out
from registry.aggregation import labelled
from registry.interface import BadMessage, Batch, Message, Round, float_state
from tests.conftest import CLASSES, Recorder, make_data, make_federation, make_task, same_state


def state(seed: int) -> dict[str, Tensor]:
    """Return a different model for every seed."""
    torch.manual_seed(seed)
    made = {name: tensor.clone() for name, tensor in float_state(FedFomoClient.build(make_task())).items()}
    return {name: tensor + 0.2 * torch.rand(tensor.shape) for name, tensor in made.items()}


def client(own: dict[str, Tensor], start: dict[str, Tensor] | None = None, id: int = 2) -> FedFomoClient:
    one = FedFomoClient(id, make_task(), FedFomoParams(), 24)
    one.nets = FedFomoClient.build(one.task)
    one.load(own)
    data = make_data(sizes=(24,))
    one.validation = Batch(data.train_x[0], data.train_y[0])
    one.memory = {START + name: tensor for name, tensor in (start or {}).items()}
    return one


def loss(model: dict[str, Tensor]) -> float:
    """Cross-entropy on the client's held-out windows, float64."""
    one = client(model)
    with torch.no_grad():
        logits = one.nets["model"].double().eval()(one.validation.x.double()).logits
    return float((logits.exp().sum(1).log() - logits[range(24), one.validation.y]).mean())


def is_parameter(name: str) -> bool:
    return "running" not in name


def test_the_mix_is_the_papers_in_float64_with_its_own_model_among_them(double):
    best, good, start, bad, worst = sorted((state(seed) for seed in range(5)), key=loss)
    models = {0: worst, 1: best, 2: good, 3: bad}
    one = client(models[2], start)
    one.receive(Message(labelled(dict(enumerate(models[id] for id in (3, 0, 1))))))

    gains = {}
    for id, model in models.items():
        squares = sum(float(((model[n].double() - start[n].double()) ** 2).sum()) for n in start if is_parameter(n))
        gains[id] = (loss(start) - loss(model)) / squares**0.5
    useful = {id: max(gain, 0) for id, gain in gains.items()}
    assert [gain > 0 for gain in gains.values()] == [False, True, True, False]
    for name, tensor in one.state().items():
        step = sum(useful[id] * (models[id][name].double() - start[name].double()) for id in models)
        expected = start[name].double() + step / sum(useful.values())
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-9, atol=1e-9)
    assert one.gains == pytest.approx([gains[id] for id in (3, 0, 1)], rel=1e-9)
    assert same_state({START + name: tensor for name, tensor in one.state().items()}, one.memory)


def test_where_no_model_helps_the_client_goes_on_from_its_own():
    models = sorted((state(seed) for seed in range(6)), key=loss)
    one = client(models[3], start=models[0])
    one.receive(Message(labelled({0: models[4], 1: models[5]})))
    assert same_state(one.state(), models[3])
    assert len(one.gains) == 2 and all(gain < 0 for gain in one.gains)


def test_own_training_weighs_as_others_do():
    """A better own model is not thrown away when another one comes that does not help."""
    models = sorted((state(seed) for seed in range(6)), key=loss)
    one = client(models[0], start=models[2])
    one.receive(Message(labelled({0: models[5]})))
    assert same_state(one.state(), models[0])


def test_a_diverged_model_is_ignored():
    bad = {name: tensor * 1e30 for name, tensor in state(5).items()}
    one = client(state(1), state(0))
    one.receive(Message(labelled({0: bad, 1: state(2)})))
    assert one.gains[0] == 0
    assert all(tensor.isfinite().all() for tensor in one.state().values())


def test_weighing_leaves_no_graph_and_no_gradient():
    one, recorded = client(state(1), state(0)), []
    losses = one.losses
    one.losses = lambda *given: recorded.append(losses(*given)["model"]) or {"model": recorded[-1]}
    one.receive(Message(labelled({0: state(2)})))
    assert len(recorded) == 3 and not any(value.requires_grad for value in recorded)
    assert not any(tensor.requires_grad for tensor in one.memory.values())
    assert all(parameter.grad is None and parameter.is_leaf for parameter in one.nets["model"].parameters())


class HeldOut(Local):
    """Local on the windows that FedFomo trains on."""

    class Client(LocalClient):
        def holdout(self) -> float:
            return 0.2


@pytest.mark.parametrize("local_bn", [False, True])
def test_without_others_models_it_is_local(local_bn):
    alone = make_federation(HeldOut, rounds=4, task=make_task(local_bn=local_bn), params={"local_rounds": "selected"})
    fomo = make_federation(FedFomo, rounds=4, task=make_task(local_bn=local_bn), params={"models": 0})
    records = []
    for federation in (alone, fomo):
        records.append(Recorder())
        federation.run([records[-1]])
    assert all(same_state(*pair) for pair in zip(alone.workspace.kept, fomo.workspace.kept, strict=True))
    losses = [record.records[-1].metrics["served"].client_loss for record in records]
    assert (losses[0] == losses[1]).all()


def server(clients: int, **params) -> FedFomo:
    made = FedFomo(make_task(), FedFomoParams(**params), {})
    made._store({id: {"model.w": torch.full((2,), float(id))} for id in range(clients)})
    return made


def test_the_server_sends_the_models_of_largest_affinity_and_never_ones_own():
    made = server(8, models=3, epsilon=0.0)
    made.affinity = {2: {0: 0.1, 1: -5.0, 2: 100.0, 3: 7.0, 4: -1.0, 5: 0.2, 6: -2.0, 7: -3.0}}
    assert sorted(made.choose(2, Round(9, 10))) == [0, 3, 5]
    message = made.message(2, Round(9, 10))
    assert set(message.tensors) == {"0/model.w", "1/model.w", "2/model.w"}
    assert {float(tensor[0]) for tensor in message.tensors.values()} == {0.0, 3.0, 5.0}
    for client in range(12):
        chosen = made.choose(client, Round(1, 10))
        assert len(set(chosen)) == 3 and client not in chosen


def test_exploration_fades_and_is_drawn_from_round_and_client():
    made = server(30, models=2, epsilon=0.5, epsilon_decay=0.1)
    made.affinity = {id: {3: 2.0, 4: 1.0} for id in range(10, 30)}

    def explored(t):
        return sum(set(made.choose(id, Round(t, 500))) != {3, 4} for id in range(10, 30))

    assert explored(1) > explored(5) >= explored(6) == explored(400) == 0
    assert made.choose(10, Round(1, 500)) == made.choose(10, Round(1, 500))


def test_ties_are_broken_at_random():
    made = server(30, models=2, epsilon=0.0)
    assert len({tuple(made.choose(29, Round(t, 500))) for t in range(1, 20)}) > 10
    assert len({tuple(made.choose(id, Round(1, 500))) for id in range(40, 60)}) > 10


def test_the_affinity_adds_up_gains_of_either_sign():
    made, own = server(3, models=2), {"model.w": torch.full((2,), 9.0)}
    for gains in ({1: 0.5, 2: -3.0}, {1: 0.25, 2: 1.0}):
        order = made.choose(0, Round(1, 9))
        assert sorted(order) == [1, 2]
        made.aggregate({0: Message(own, {"gains": [gains[id] for id in order]})}, Round(1, 9))
    assert made.affinity == {0: {1: 0.75, 2: -2.0}}


def test_messages_do_not_say_whose_the_models_are():
    """A client that is sent all models is sent the same bytes when clients change their numbers."""
    models = [state(seed) for seed in range(6)]
    sent = []
    for order in ([0, 1, 2, 3, 4, 5], [0, 4, 2, 5, 1, 3]):  # client 0 keeps its number
        made = FedFomo(make_task(), FedFomoParams(models=5), {})
        made._store({id: models[which] for id, which in enumerate(order)})
        sent.append(made.message(0, Round(1, 9)).to_bytes())
    assert sent[0] == sent[1]


def test_gains_go_to_those_whose_models_were_sent_whatever_came_with_them():
    """Gains are of the models that the server had before the round."""
    federation = make_federation(FedFomo, rounds=3, join_ratio=1, params={"models": 2, "epsilon": 0.0})
    federation.round(Round(1, 3))
    made, told = federation.server, {}
    before = {id: made.choose(id, Round(2, 3)) for id in made.models}
    aggregate = made.aggregate
    made.aggregate = lambda replies, round: told.update(replies) or aggregate(replies, round)
    federation.round(Round(2, 3))
    for id, reply in told.items():
        assert made.affinity[id] == pytest.approx(dict(zip(before[id], reply.meta["gains"], strict=True)))


@pytest.mark.parametrize(
    "gains", [None, [], [0.1], [0.1, 0.2, 0.3], [0.1, float("nan")], [0.1, 1], [[0, 0.1], [1, 0.2]]]
)
def test_gains_that_are_not_of_the_models_sent_are_refused(gains):
    made = server(3, models=2)
    made.weights = {"model.w": torch.zeros(2)}
    reply = {"model.w": torch.ones(2)}
    made.check_reply(0, Message(reply, {"gains": [0.1, -0.2]}))
    with pytest.raises(BadMessage, match="'gains' must be"):
        made.check_reply(0, Message(reply, {} if gains is None else {"gains": gains}))


def test_candidates_are_all_clients_ever_seen_also_for_one_first_seen_late():
    federation = make_federation(FedFomo, rounds=400, join_ratio=0.25)
    seen = {id for t in range(1, 7) for id in federation.round(Round(t, 400)).selected}
    assert len(seen) > 1  # one client a round: of the last round alone there would be one
    late = next(id for id in range(4) if id not in seen)
    assert set(federation.server.choose(late, Round(400, 400))) == seen
    one = federation.workspace.enter(late)
    data = Batch(federation.data.train_x[late], federation.data.train_y[late])
    one.data, one.validation = hold_out(data, one.holdout(), late, 0)
    before = loss_of(one)
    one.receive(Message.from_bytes(federation.server.message(late, Round(400, 400)).to_bytes()))
    assert loss_of(one) < before  # it starts from others' experience


def loss_of(one: FedFomoClient) -> float:
    one.nets["model"].eval()
    return one.losses(one.nets, one.validation, {})["model"].item()


@pytest.mark.parametrize("local_bn", [False, True])
def test_the_server_holds_the_latest_model_of_each_client_and_no_local_batch_norm(local_bn):
    federation = make_federation(FedFomo, rounds=5, task=make_task(local_bn=local_bn))
    federation.run()
    for id, model in federation.server.models.items():
        kept = federation.workspace.kept[id]
        assert all(torch.equal(tensor, kept[name]) for name, tensor in model.items())
        private = [kept[name] for name in kept.keys() - model.keys()]
        assert len(private) == (4 if local_bn else 0)
        sent = [t for model in federation.server.models.values() for t in model.values()]
        assert not any(a.shape == b.shape and torch.equal(a, b) for a in sent for b in private)


def test_every_client_predicts_with_its_own_model():
    recorder = Recorder()
    federation = make_federation(FedFomo, rounds=3, join_ratio=1)
    federation.run([recorder])
    assert not federation.server.networks()
    kept = federation.workspace.kept
    assert not any(same_state(kept[0], other) for other in kept[1:])


CHANGES = {"models": 2, "validation": 0.4, "epsilon": 1.0, "epsilon_decay": 0.3}


@pytest.mark.parametrize("name", CHANGES)
def test_every_hyper_parameter_changes_the_outcome(name):
    assert CHANGES.keys() == {field.name for field in fields(FedFomoParams)}
    base = {"models": 1, "epsilon": 0.7}
    default = make_federation(FedFomo, rounds=5, join_ratio=1, params=base)
    changed = make_federation(FedFomo, rounds=5, join_ratio=1, params=base | {name: CHANGES[name]})
    default.run()
    changed.run()
    assert not same_state(default.save().tensors, changed.save().tensors)


def test_a_saved_server_goes_on_as_if_nothing_had_happened():
    federation = make_federation(FedFomo, make_data((9,) * 12), rounds=6, params={"models": 2})
    for t in (1, 2, 3, 4):
        federation.round(Round(t, 6))
    old, new = federation.server, FedFomo(federation.server.task, federation.server.params, {})
    new.restore(Message.from_bytes(old.save().to_bytes()))
    assert new.affinity == old.affinity and any(old.affinity.values())
    for t in range(5, 10):
        for id in range(12):
            assert new.message(id, Round(t, 9)).to_bytes() == old.message(id, Round(t, 9)).to_bytes()
    assert new.save().to_bytes() == old.save().to_bytes()


def test_it_learns_also_with_a_client_of_one_window():
    recorder = Recorder()
    make_federation(FedFomo, make_data((40, 1, 65, 20)), rounds=15).run([recorder])
    assert not any(record.rejected for record in recorder.records)
    assert recorder.records[-1].metrics["served"].accuracy > 2 / CLASSES
