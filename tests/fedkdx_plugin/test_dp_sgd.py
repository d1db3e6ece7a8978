"""DP-SGD: gradients window by window, lots, noise, and what of a client's windows can reach anybody else."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from fedkdx_plugin.engine import dp_sgd
from fedkdx_plugin.engine.backends.sequential import Sequential
from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.dp_sgd import Gradients, WindowPrivacy, lots, norms_of
from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.engine.training import windows_of
from registry import catalog
from registry.errors import UserError
from registry.interface import Batch, Message, Round, Task
from tests.conftest import Recorder, make_data, make_federation, make_task, same_state

NAMES = list(catalog.BUILT_IN["algorithms"])
COVERED_WITH = {  # hyper-parameters without which the windows of a batch meet
    "FedKDX": {"use": ("kd", "nkd")},
    "FedKDX+": {"use": ("kd", "nkd"), "serve": "teacher"},
}
MEETING = {"FedDBE", "FedKD", "FedKD+", "FedFTL"}  # in the losses; the others read their windows beside them
CLIP = 0.5


def algorithm(name: str):
    return catalog.load("algorithms", name)


def reason(name: str, **params) -> str:
    """Return why an algorithm is refused; '' if it is not."""
    server = algorithm(name)
    try:
        dp_sgd.check({name: (server, server.Params(**params))})
    except UserError as error:
        return str(error)
    return ""


# of the others, Centralised pools the data and FedBN cannot do without batch norm
COVERED = [name for name in NAMES if not reason(name, **COVERED_WITH.get(name, {})) and name != "FedBN"]
REFUSED = [name for name in NAMES if name not in COVERED and name not in ("Centralised", "FedBN")]


def task(name: str = "FedAvg") -> Task:
    return dataclasses.replace(make_task(), norm="group")


def federation(name: str, data: DeviceData | None = None, rounds: int = 2, **settings) -> Federation:
    settings = {"dp_sgd": WindowPrivacy(CLIP, 1.0), "backend": "sequential"} | settings
    return make_federation(algorithm(name), data, task(), rounds=rounds, params=COVERED_WITH.get(name, {}), **settings)


def run(made: Federation, done: int = 0) -> Recorder:
    recorder = Recorder()
    made.run([recorder], done)
    return recorder


def at_work(name: str, id: int = 0, rounds: int = 1, **settings):
    """Return a client that has trained before and received a message, and its context."""
    made = federation(name, dp_sgd=None, **settings)
    run(made)
    round = Round(made.schedule.rounds, made.schedule.rounds)
    backend = made.backend
    assert isinstance(backend, Sequential)
    client = backend.begin(id, made.server.messages([id], round)[id], round)
    return client, dict(client.context())


def moving(client) -> dict[str, nn.Parameter]:
    nets = {name: net for name, net in client.nets.items() if name not in client.frozen}
    return {f"{net}.{n}": p for net, module in nets.items() for n, p in module.named_parameters() if p.requires_grad}


def alone(client, context, window: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and its gradients as training takes them."""
    named = moving(client)
    loss = sum(client.losses(client.nets, window, context).values())
    slopes = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return loss.detach(), dict(zip(named, slopes, strict=True))


def few(client, count: int = 6) -> Batch:
    return windows_of(client).rows(slice(count))


# Gradients


@pytest.mark.parametrize("name", ["FedAvg", "FedKDX", "MOON", "Ditto", "SCAFFOLD", "FedMAT"])
def test_gradients_by_window_are_those_of_windows_alone(name, double):
    client, context = at_work(name)
    batch = few(client)
    gradients, losses = Gradients(client, client.nets, context).of(moving(client), batch)
    for place in range(len(batch.y)):
        loss, slopes = alone(client, context, batch.rows(slice(place, place + 1)))
        torch.testing.assert_close(losses[place], loss, rtol=1e-10, atol=1e-12)
        for parameter, slope in slopes.items():
            torch.testing.assert_close(gradients[parameter][place], slope, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("model", sorted(catalog.BUILT_IN["models"]))
def test_gradients_of_all_models(model, double):
    made = catalog.load("models", model)
    shape = (3, 1, 24)
    server = algorithm("FedAvg")
    own = Task(shape, 4, made, made, norm="group")
    client = server.Client(0, own, None, 3)
    client.nets = client.build(own)
    for net in client.nets.values():
        net.train()
        for part in net.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0  # draws differ between windows together and alone
    dp_sgd.check_networks(client.nets)
    batch = Batch(torch.randn(3, *shape), torch.tensor([0, 3, 1]))
    gradients, _ = Gradients(client, client.nets, {}).of(moving(client), batch)
    for place in range(3):
        _, slopes = alone(client, {}, batch.rows(slice(place, place + 1)))
        for name, slope in slopes.items():
            torch.testing.assert_close(gradients[name][place], slope, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_the_sum_is_of_gradients_no_longer_than_the_bound(at_once, double, monkeypatch):
    client, context = at_work("FedAvg")
    batch, named = few(client, 5), moving(client)
    monkeypatch.setattr(dp_sgd, "MOST_VALUES", at_once * sum(p.numel() for p in named.values()))
    gradients = Gradients(client, client.nets, context)
    each, _ = gradients.of(named, batch)
    norms = [math.sqrt(sum(float(g[place].square().sum()) for g in each.values())) for place in range(5)]
    clip = sorted(norms)[2]  # some are longer, some shorter
    assert norms_of(each).tolist() == pytest.approx(norms)
    expected = {
        name: sum(g[place] * min(1, clip / norm) for place, norm in enumerate(norms)) for name, g in each.items()
    }
    found, losses = gradients.clipped_sum(named, batch, clip)
    assert len(losses) == 5
    for name, right in expected.items():
        torch.testing.assert_close(found[name], right, rtol=1e-9, atol=1e-12)
    for place in range(5):  # one window more or less moves the sum by no more than the bound
        others = batch.rows(torch.tensor([other for other in range(5) if other != place]))
        less, _ = gradients.clipped_sum(named, others, clip)
        moved = math.sqrt(sum(float((found[name] - less[name]).square().sum()) for name in found))
        assert moved <= clip * (1 + 1e-9)


def test_a_window_whose_gradient_is_not_finite_counts_as_nothing():
    client, context = at_work("FedAvg")
    batch, named = few(client, 4), moving(client)
    gradients = Gradients(client, client.nets, context)
    right, _ = gradients.clipped_sum(named, batch.rows(slice(1, 4)), CLIP)
    for bad in (math.nan, math.inf):
        broken = Batch(batch.x.clone(), batch.y)
        broken.x[0] = bad
        found, _ = gradients.clipped_sum(named, broken, CLIP)
        for name in right:
            torch.testing.assert_close(found[name], right[name])


# Lots and noise


def test_lots_hold_each_window_with_its_probability():
    drawn = lots(200, 25, 400, seed=1, round=2, client=3)
    counts = torch.bincount(torch.cat(drawn), minlength=200).double()
    assert all(bool((lot.diff() > 0).all()) for lot in drawn)
    p, n = 25 / 200, 400
    assert float((counts / n - p).abs().max()) < 6 * math.sqrt(p * (1 - p) / n)
    sizes = torch.tensor([float(len(lot)) for lot in drawn], dtype=torch.float64)
    assert abs(float(sizes.mean()) - 25) < 6 * math.sqrt(200 * p * (1 - p) / n)
    assert abs(float(sizes.var()) / (200 * p * (1 - p)) - 1) < 6 * math.sqrt(2 / n)  # independent: binomial sizes
    assert [len(lot) for lot in lots(20, 25, 3, 0, 1, 0)] == [20, 20, 20]  # no more windows than a batch


def test_lots_depend_on_seed_round_and_client():
    def draw(seed: int, round: int, client: int) -> list[list[int]]:
        return [lot.tolist() for lot in lots(50, 10, 4, seed, round, client)]

    assert draw(1, 2, 3) == draw(1, 2, 3)
    assert draw(1, 2, 3) not in (draw(0, 2, 3), draw(1, 1, 3), draw(1, 2, 2))
    assert len({str(lot) for lot in draw(1, 2, 3)}) == 4


def moved(made: Federation, id: int = 1, round: int = 1) -> dict[str, Tensor]:
    """Return how far a client has moved after a round, by parameter."""
    at = Round(round, 2)
    message = made.server.messages([id], at)[id]
    result = made.backend.train({id: message}, at)[id]
    return {name: result.reply.tensors[name] - t for name, t in message.tensors.items() if name in result.reply.tensors}


def test_the_noise_has_its_variance():
    """With a bound of almost 0, the steps are the noise alone: 4 of them, N(0, (η z C / B)²) each."""
    clip, noise = 1e-9, 1e9
    made = federation("FedAvg", make_data((40, 64)), clip_norm=0, dp_sgd=WindowPrivacy(clip, noise), batch_size=32)
    first, later = moved(made), moved(made, round=2)
    values = torch.cat([t.flatten().double() for t in first.values()])
    size = len(values)
    expected = 4 * (0.05 * clip * noise / 32) ** 2
    assert abs(float(values.square().mean()) / expected - 1) < 6 * math.sqrt(2 / size)
    assert abs(float(values.mean())) < 6 * math.sqrt(expected / size)
    other = torch.cat([t.flatten().double() for t in later.values()])
    assert abs(float(torch.corrcoef(torch.stack([values, other]))[0, 1])) < 6 / math.sqrt(size)


def test_without_noise_and_bound_whole_lots_are_plain_gradient_descent(double):
    data = make_data((30, 12))
    plain = federation("FedProx", data, dp_sgd=None, batch_size=64, join_ratio=1.0)
    private = federation("FedProx", data, dp_sgd=WindowPrivacy(1e9, 0.0), batch_size=64, join_ratio=1.0)
    one, other = run(plain).records, run(private).records
    for name, tensor in plain.server.weights.items():
        torch.testing.assert_close(private.server.weights[name], tensor, rtol=1e-9, atol=1e-12)
    assert [r.train_loss for r in one] == pytest.approx([r.train_loss for r in other])


@pytest.mark.parametrize("optimizer", ["momentum", "adam", "adamw"])
def test_optimizers_move_by_noisy_gradients(optimizer, double):
    data = make_data((30, 12))
    settings = {"batch_size": 64, "join_ratio": 1.0, "optimizer": optimizer}
    plain, private = (federation("FedAvg", data, dp_sgd=p, **settings) for p in (None, WindowPrivacy(1e9, 0.0)))
    run(plain), run(private)
    for name, tensor in plain.server.weights.items():
        torch.testing.assert_close(private.server.weights[name], tensor, rtol=1e-7, atol=1e-9)


def test_only_parameters_of_the_epoch_are_in_the_gradient(double):
    """FedRep trains head and body in turn: without a bound each phase goes as without DP-SGD."""
    data = make_data((30, 12))
    plain, private = (
        federation("FedRep", data, dp_sgd=p, batch_size=64, join_ratio=1.0) for p in (None, WindowPrivacy(1e9, 0.0))
    )
    run(plain), run(private)
    assert all(map(torch.allclose, private.server.weights.values(), plain.server.weights.values()))


# What can reach anybody else


def other_windows(data: DeviceData) -> DeviceData:
    """Return data of as many windows of each client, all of them others, with other labels."""
    x = [torch.randn_like(own) for own in data.train_x]
    return dataclasses.replace(data, train_x=x, train_y=[(y + 1) % 3 for y in data.train_y])


def state(made: Federation) -> dict[str, Tensor]:
    """Return all that server and clients hold."""
    return dict(made.save().tensors)


@pytest.mark.parametrize("name", COVERED)
def test_nothing_but_the_noisy_gradients_knows_the_windows(name):
    """With a bound of almost 0 the windows no longer count, whatever the algorithm does with them."""
    data = make_data((12, 5))
    settings = {"dp_sgd": WindowPrivacy(1e-9, 1e8), "batch_size": 8, "local_epochs": 2, "join_ratio": 1.0}
    one, other = (federation(name, own, rounds=2, **settings) for own in (data, other_windows(data)))
    first, second = run(one).records, run(other).records
    assert not any(record.rejected for record in (*first, *second))
    ours, theirs = state(one), state(other)
    assert ours.keys() == theirs.keys()
    for key, tensor in ours.items():
        torch.testing.assert_close(theirs[key], tensor, rtol=1e-3, atol=1e-4, msg=key)
    assert one.save().meta == other.save().meta
    assert any(not torch.equal(t, one.workspace.initial.get(key.partition("/")[2], t * 0)) for key, t in ours.items())


@pytest.mark.parametrize("name", COVERED)
def test_covered_losses_are_means_over_windows(name, double):
    client, context = at_work(name)
    batch = few(client)
    whole, slopes = alone(client, context, batch)
    parts = [alone(client, context, batch.rows(slice(place, place + 1))) for place in range(len(batch.y))]
    torch.testing.assert_close(whole, torch.stack([loss for loss, _ in parts]).mean())
    for parameter, slope in slopes.items():
        torch.testing.assert_close(slope, torch.stack([own[parameter] for _, own in parts]).mean(0))


@pytest.mark.parametrize("name", [*REFUSED, "FedKDX", "FedKDX+"])
def test_what_is_refused_has_a_reason(name, double):
    """Either the losses of windows meet, or the client reads its windows beside the losses."""
    server = algorithm(name)
    assert f"--dp example: not with {name}, which " in reason(name)
    made = make_federation(
        server, None, task(), rounds=2, backend="sequential", dp_sgd=WindowPrivacy(CLIP, 1.0), join_ratio=1.0
    )
    if name in MEETING or name == "FedKDX":
        made = make_federation(server, None, task(), rounds=1, backend="sequential", join_ratio=1.0)
        run(made)
        backend, round = made.backend, Round(2, 2)
        assert isinstance(backend, Sequential)
        client = backend.begin(0, made.server.messages([0], round)[0], round)
        context, batch = client.context(), few(client)
        whole, _ = alone(client, context, batch)
        parts = [alone(client, context, batch.rows(slice(place, place + 1)))[0] for place in range(6)]
        assert abs(float(whole - torch.stack(parts).mean())) > 1e-9  # rounding is 1e-15
    else:
        with pytest.raises(UserError, match=r"reads its windows beside the losses|holds windows out"):
            run(made)


def test_every_algorithm_is_either():
    assert sorted([*COVERED, *REFUSED, "Centralised", "FedBN"]) == sorted(NAMES)
    assert len(COVERED) >= 26
    assert "uploads the windows" in reason("Centralised")


def test_a_subclass_with_methods_declares_anew():
    class Plain(algorithm("FedAvg").Client):
        private = ("model.head.*",)

    class Peeping(Plain):
        def reply(self) -> Message:
            return Message(self.shared(), {"samples": self.samples, "mean": float(self.data.x.mean())})

    for client, expected in ((Plain, ""), (Peeping, "Peeping has reply, and no windows_meet")):
        server = type("Mine", (algorithm("FedAvg"),), {"Client": client})
        if not expected:
            dp_sgd.check({"Mine": (server, server.Params())})
            continue
        with pytest.raises(UserError, match=expected):
            dp_sgd.check({"Mine": (server, server.Params())})
        made = make_federation(server, None, task(), backend="sequential", dp_sgd=WindowPrivacy(CLIP, 1.0))
        with pytest.raises(UserError, match="Peeping reads its windows"):
            run(made)


def test_windows_held_out_are_not_in_the_account():
    class Holding(algorithm("FedAvg").Client):
        windows_meet = ""

        def holdout(self) -> float:
            return 0.2

    server = type("Mine", (algorithm("FedAvg"),), {"Client": Holding})
    made = make_federation(server, None, task(), backend="sequential", dp_sgd=WindowPrivacy(CLIP, 1.0))
    with pytest.raises(UserError, match="Holding holds windows out"):
        run(made)


@pytest.mark.parametrize(
    ("part", "words"), [(nn.BatchNorm1d(3), "is batch norm.*--norm group"), (nn.GRU(3, 3), "is GRU of a form")]
)
def test_networks_that_do_not_fit(part, words):
    with pytest.raises(UserError, match=words):
        dp_sgd.check_networks({"model": nn.Sequential(nn.Linear(3, 3), part)})


# In a run


def test_the_same_seed_and_a_resumed_run_give_the_same_bits():
    whole, begun, resumed = (federation("FedKDX", make_data((20, 7, 24)), rounds=3) for _ in range(3))
    run(whole)
    for index in (1, 2):
        begun.round(Round(index, 3, begun.schedule.join_ratio))
    resumed.restore(Message.from_bytes(begun.save().to_bytes()))
    run(resumed, done=2)
    run(begun, done=2)
    assert same_state(state(whole), state(resumed))
    assert same_state(state(whole), state(begun))


def test_processes_give_the_same():
    torch.set_num_threads(2)
    data = make_data((20, 7, 24))
    one, other = (
        federation("FedKDX", data, rounds=1, backend=own, join_ratio=1.0) for own in ("sequential", "parallel")
    )
    try:
        run(one), run(other)
        for key, tensor in state(one).items():
            torch.testing.assert_close(state(other)[key], tensor, rtol=1e-4, atol=1e-5)
    finally:
        other.close()


def test_clients_are_not_stacked():
    with pytest.raises(UserError, match="--backend stacked: --dp example: gradients are taken window by window"):
        federation("FedAvg", backend="stacked")


def test_a_round_without_any_window_has_no_loss():
    made = federation("FedAvg", make_data((60, 60)), batch_size=1, local_epochs=1, join_ratio=1.0)
    client = made.workspace.clients[0]
    steps = made.backend.begin(0, made.server.messages([0], Round(1, 2))[0], Round(1, 2))
    assert steps is client
    private = dp_sgd.PrivateSteps(
        client, client.nets, {}, 0.0, "sgd", WindowPrivacy(CLIP, 0.0), 1, (3, 1, 16), torch.Generator()
    )
    before = {name: tensor.clone() for name, tensor in client.state().items()}
    assert float(private.take(windows_of(client).rows(slice(0)))) == 0
    assert same_state(before, client.state())
    assert math.isnan(made._train_loss({0: torch.tensor(math.nan)}))
    assert made._train_loss({0: torch.tensor(math.nan), 1: torch.tensor(2.0)}) == 2


@pytest.mark.parametrize("augment", [("jitter", "scale"), ("permute",)])
def test_augmented_lots(augment):
    from fedkdx_plugin.engine.augmentation import Augment

    made = federation("FedAvg", augment=Augment(augment), batch_size=2)
    assert all(math.isfinite(record.train_loss) for record in run(made).records)
