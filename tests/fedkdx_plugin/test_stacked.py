"""Clients trained together come out as each does alone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import nn

from baselines.fedavg import FedAvg, FedAvgClient
from fedkdx_plugin.algorithm import compression
from fedkdx_plugin.algorithm.downlink import Differences
from fedkdx_plugin.engine import backends, stacked, together
from fedkdx_plugin.engine.evaluation import Prediction
from fedkdx_plugin.engine.faults import Faults
from fedkdx_plugin.engine.sequential import Sequential
from fedkdx_plugin.engine.training import ClientError
from fedkdx_plugin.models.cnn import CNNSmall
from fedkdx_plugin.models.cnn_lstm import CNNLSTM
from registry import catalog
from registry.errors import UserError
from registry.interface import Batch, NonFinite, Round, Task
from tests.conftest import CLASSES, SHAPE, Recorder, TinierNet, TinyNet, make_data, make_federation, same_state

NAMES = list(catalog.BUILT_IN["algorithms"])
SIZES = (40, 7, 65, 20, 33)  # whole batches, less than one, and one window left over (65 = 4 · 16 + 1)


@pytest.fixture
def double() -> Iterator[None]:
    """Networks in float64: what is left of a difference between backends is the order of sums."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def windows(sizes=SIZES):
    """`make_data` in the default type."""
    data = make_data(sizes)
    own = [x.to(torch.get_default_dtype()) for x in data.train_x]
    return replace(data, train_x=own, test_x=data.test_x.to(torch.get_default_dtype()))


TASK = Task(SHAPE, CLASSES, TinyNet, TinierNet)


def run(algorithm, backend="stacked", task=TASK, data=None, **options):
    """A federation of unequal clients after all its rounds, and its records."""
    options = {"rounds": 2, "join_ratio": 0.8} | options
    done, recorder = make_federation(algorithm, data or windows(), task, backend=backend, **options), Recorder()
    assert done.backend.name == backend
    done.run([recorder])
    return done, recorder.records


def both(algorithm, **options):
    """The same by the reference and stacked."""
    return run(algorithm, "sequential", **options), run(algorithm, "stacked", **options)


def assert_alike(one, other, tolerance, bytes=0):
    """Two runs: all state, of servers and clients, and every figure."""
    states = one[0].save(), other[0].save()
    assert states[0].tensors.keys() == states[1].tensors.keys()
    for name, tensor in states[0].tensors.items():
        torch.testing.assert_close(states[1].tensors[name], tensor, rtol=tolerance, atol=tolerance, msg=name)
    for a, b in zip(one[1], other[1], strict=True):
        assert (a.selected, a.rejected, a.bytes_down) == (b.selected, b.rejected, b.bytes_down)
        assert b.bytes_up == pytest.approx(a.bytes_up, abs=bytes)
        assert b.train_loss == pytest.approx(a.train_loss, rel=tolerance)
        assert a.metrics.keys() == b.metrics.keys()
        for view, figures in a.metrics.items():
            assert b.metrics[view].loss == pytest.approx(figures.loss, rel=tolerance)


@pytest.mark.parametrize("model", [TinyNet, CNNSmall, CNNLSTM])
@pytest.mark.parametrize("name", NAMES)
def test_every_algorithm_and_model_as_the_reference(name, model, double):
    algorithm = catalog.load("algorithms", name)
    one, two = (
        run(algorithm, backend, Task(SHAPE, CLASSES, model, TinierNet)) for backend in ("sequential", "stacked")
    )
    assert all(reason == "" for reason in two[0].backend._reasons.values())
    assert two[0].backend._reasons
    # FedFomo's gains travel as text, where a last digit may be missing
    assert_alike(one, two, 1e-9, bytes=200 if name == "FedFomo" else 0)


@pytest.mark.parametrize("name", ["FedKDX", "FedFomo", "FedMAT", "MOON"])
def test_repeats_its_own_bits(name):
    one, two = (run(catalog.load("algorithms", name)) for _ in range(2))
    assert same_state(one[0].save().tensors, two[0].save().tensors)
    assert [r.train_loss for r in one[1]] == [r.train_loss for r in two[1]]


@pytest.mark.parametrize("name", ["FedKDX", "FedFTL", "MOON"])
def test_in_float32_within_rounding(name):
    """One round: later ones amplify what rounding there was."""
    assert_alike(*both(catalog.load("algorithms", name), rounds=1), 1e-4)


@pytest.mark.parametrize("settings", [{"clip_norm": 0.0}, {"clip_norm": 0.05}, {"decay": 0.5}, {"batch_size": 100}])
def test_clipping_rates_and_whole_batches_as_the_reference(settings, double):
    """With rates that differ: in round 2 some clients have trained and others have not."""
    algorithm = catalog.load("algorithms", "FedKDX")
    runs = both(algorithm, join_ratio=0.6, rounds=3, **settings)
    assert len({client.trained for client in runs[0][0].workspace.clients}) > 1
    assert_alike(*runs, 1e-9)


@pytest.mark.parametrize(("name", "model"), [("FedAvg", CNNLSTM), *((name, CNNSmall) for name in NAMES)])
def test_nothing_is_fetched_from_the_device_or_left_on_another(name, model):
    """On PyTorch's "meta" device tensors have no values to fetch, and refuse to meet those of a CPU."""
    algorithm, task = catalog.load("algorithms", name), Task(SHAPE, CLASSES, model, TinierNet)
    federation, _ = run(algorithm, task=task, data=windows((16, 7)), rounds=1, join_ratio=1, local_epochs=1)
    messages = {id: federation.server.message(id, Round(2, 2)) for id in range(1 if name == "Centralised" else 2)}
    ready = [on_meta(federation.backend._begin(id, message, Round(2, 2))) for id, message in messages.items()]
    ready.sort(key=lambda one: -together.steps(one, Round(2, 2), federation.settings))
    nets = {net: copy.deepcopy(module).to("meta") for net, module in federation.workspace.nets.items()}
    stack, losses = together.train(together.Together(ready[0].client, nets), ready, Round(2, 2), federation.settings)
    assert losses.shape == (len(messages),)
    assert {tensor.device.type for tensor in (losses, *stack.state(0).values())} == {"meta"}


def on_meta(one: together.Ready) -> together.Ready:
    one.client.data = Batch(one.client.data.x.to("meta"), one.client.data.y.to("meta"))
    parts = ({name: tensor.to("meta") for name, tensor in part.items()} for part in (one.context, one.state))
    return together.Ready(one.client, *parts)


def test_stragglers_make_the_epochs_they_have_time_for(double):
    algorithm, faults = catalog.load("algorithms", "FedProx"), Faults(stragglers=0.6)
    one, two = both(algorithm, rounds=3, local_epochs=4, faults=faults)
    planned = [one[0].settings.epochs(Round(t, 3), id) for t in (1, 2, 3) for id in range(5)]
    assert len(set(planned)) > 2
    assert_alike(one, two, 1e-9)


@pytest.mark.parametrize(("name", "params"), [("FedKDX", {"serve": "both"}), ("FedFomo", {}), ("FedMAT", {})])
def test_local_batch_norm_and_held_out_windows_as_the_reference(name, params, double):
    algorithm, task = catalog.load("algorithms", name), Task(SHAPE, CLASSES, TinyNet, TinierNet, local_bn=True)
    assert_alike(*both(algorithm, task=task, params=params), 1e-9)


@pytest.mark.parametrize("downlink", ["broadcast", "differences"])
@pytest.mark.parametrize("name", ["FedKDX", "FedKD"])
def test_compressed_together_as_in_the_reference(name, downlink, double):
    params = {"downlink": downlink, "error_feedback": True, "quantise": True, "epsilon_end": 0.95}
    task = Task(SHAPE, CLASSES, CNNSmall, CNNSmall)
    assert_alike(*both(catalog.load("algorithms", name), task=task, rounds=3, params=params), 1e-9)


def test_matrices_of_all_clients_are_decomposed_in_one_call(monkeypatch):
    """Up and down: as many calls as there are shapes, whatever the number of clients."""
    calls = []

    def first(matrices):
        calls.append((len(matrices), tuple(matrices.shape[1:])))
        return compression._by_eigh(matrices)

    monkeypatch.setattr(compression, "METHODS", (first, *compression.METHODS[1:]))
    task, algorithm = Task(SHAPE, CLASSES, CNNSmall, CNNSmall), catalog.load("algorithms", "FedKDX")
    federation = make_federation(algorithm, windows(), task, rounds=3, join_ratio=1, backend="stacked")
    federation.server.downlink = Differences(federation.server.params, federation.server.weights)
    federation.round(Round(1, 3))  # nothing lies between the students yet
    calls.clear()
    federation.round(Round(2, 3))
    shapes = {shape for _, shape in calls}
    assert len(shapes) > 1 and len(calls) == 2 * len(shapes)
    assert all(count % len(SIZES) == 0 for count, _ in calls)


def test_portions_that_fit_into_memory_change_nothing(double, monkeypatch):
    whole = run(FedAvg)
    assert whole[0].backend._at_once > len(SIZES)
    monkeypatch.setattr(stacked, "CPU_MEMORY", 1)
    parts = run(FedAvg)
    assert parts[0].backend._at_once == parts[0].backend._rows_at_once == 1
    assert_alike(whole, parts, 1e-9)


def with_client(**members) -> type[FedAvg]:
    """FedAvg whose clients have other methods."""
    client = type("Client", (FedAvgClient,), members)
    return type("Changed", (FedAvg,), {"Client": client})


def losses(change):
    """FedAvg's losses, of which `change` makes others: (client, losses, batch) -> losses."""

    def changed(self, nets, batch, context):
        return change(self, FedAvgClient.losses(self, nets, batch, context), batch)

    return {"losses": changed}


def spoilt(ids, start=0):
    """`windows` of which some clients' are NaN, from the given place."""
    data = windows()
    for id in ids:
        data.train_x[id][start:] = torch.nan
    return data


@pytest.mark.parametrize("start", [0, 10])  # 10: where the trial of a few windows does not see it
@pytest.mark.parametrize("name", ["FedKDX", "FedFomo", "MOON"])
def test_a_client_with_nan_is_dropped_by_name_and_the_rest_go_on(name, start, double):
    one, two = both(catalog.load("algorithms", name), data=spoilt([2], start), join_ratio=1)
    assert_alike(one, two, 1e-9, bytes=200 if name == "FedFomo" else 0)
    for record in two[1]:
        assert list(record.rejected) == [2]
        assert "client 2" in record.rejected[2]
    assert [client.trained for client in two[0].workspace.clients] == [2, 2, 0, 2, 2]
    assert not two[0].workspace.clients[2].memory
    assert not two[0].workspace.kept[2]


def test_a_round_in_which_all_are_dropped_says_nothing_about_stacking(double):
    data = spoilt(range(5))
    one, two = both(catalog.load("algorithms", "FedKDX"), data=data, join_ratio=1)
    assert all(len(record.rejected) == 5 for record in two[1])
    assert [record.rejected for record in one[1]] == [record.rejected for record in two[1]]
    assert two[0].backend._reasons == {}


def test_a_message_that_holds_nan_drops_its_client(double):
    def receive(self, message):
        self.memory["seen"] = torch.ones(())
        if self.id == 3:
            raise NonFinite(f"client {self.id}: what the server sent holds NaN")
        FedAvgClient.receive(self, message)

    one, two = both(with_client(receive=receive), join_ratio=1)
    assert_alike(one, two, 1e-9)
    assert all(list(record.rejected) == [3] for record in two[1])
    assert "seen" not in two[0].workspace.clients[3].memory


REFUSED = {
    "what a client alone has": (lambda self, losses, batch: losses | {"id": losses["model"] * self.id}, "'id'"),
    "a decision on values": (lambda self, losses, batch: losses if losses["model"] > 0 else {}, "control flow"),
    "a mean over all rows": (
        lambda self, losses, batch: losses | {"x": losses["model"] * batch.x.square().mean()},
        "its losses come out as",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_losses_that_cannot_be_stacked(what, double, capsys):
    """By name that is an error; else such clients are trained one by one, with the reference's very bits."""
    change, reason = REFUSED[what]
    algorithm = with_client(**losses(change))
    with pytest.raises(UserError, match=r"^--backend stacked: .*; auto takes what can run$") as caught:
        run(algorithm)
    assert reason in str(caught.value)
    reference = run(algorithm, "sequential")
    chosen = make_federation(algorithm, windows(), TASK, rounds=2, join_ratio=0.8, backend="sequential")
    chosen.backend = stacked.Stacked(chosen.workspace, chosen.data, chosen.settings)
    chosen.run()
    assert same_state(chosen.save().tensors, reference[0].save().tensors)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert reason in line
    assert line.endswith("such clients are trained one by one")


class Forgetful(TinyNet):
    """With a layer that draws random numbers."""

    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.fc = nn.Sequential(self.fc, nn.Dropout(0.5))


class Counting(TinyNet):
    """With state that no layer declares: how often it was asked."""

    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.register_buffer("asked", torch.zeros(()))

    def features(self, x):
        if self.training:
            self.asked += 1
        return super().features(x) * (1 + 0.1 * self.asked)


def test_a_model_that_cannot_be_stacked_is_named():
    task = Task(SHAPE, CLASSES, Forgetful, TinyNet)
    with pytest.raises(UserError, match=r"^--backend stacked: model\.fc\.1: Dropout draws random numbers"):
        run(FedAvg, task=task)


def test_state_that_a_model_changes_itself_comes_out_as_in_the_reference(double):
    assert_alike(*both(FedAvg, task=Task(SHAPE, CLASSES, Counting, TinyNet)), 1e-9)


@pytest.mark.parametrize(
    ("windows_left", "where"), [(7, "client 1, round 1, step 1"), (1, "client 2, round 1, step 5")]
)
def test_an_error_names_client_round_and_step(windows_left, where):
    """Also one that comes up in the stack, after the trial of a few windows."""

    def fail(self, losses, batch):
        if len(batch.y) == windows_left:
            raise ZeroDivisionError("mean of nothing")
        return losses

    for backend in ("sequential", "stacked"):
        with pytest.raises(ClientError, match=f"^{where}: ZeroDivisionError: mean of nothing$"):
            run(with_client(**losses(fail)), backend, join_ratio=1)


def test_an_error_that_only_a_stack_has_is_said_to_be_one(monkeypatch):
    def fail(*_):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(stacked.together, "train", fail)
    with pytest.raises(RuntimeError, match="round 1: fails in a stack of 4 clients alone"):
        run(FedAvg)


def test_too_little_memory_is_told_to_the_user(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB")

    monkeypatch.setattr(stacked.together, "train", fail)
    with pytest.raises(UserError, match=r"9 GiB; --backend sequential takes the least memory"):
        run(FedAvg)


def test_contexts_of_several_kinds_are_stacked_apart(double):
    """Clients whose contexts differ in shape; each is told apart and comes out as alone."""

    def context(self):
        return {"weight": torch.full((1 + self.id % 2,), 0.5)} if self.id else {}

    def own(self, nets, batch, context):
        factor = context["weight"].sum() if "weight" in context else 1
        return {"model": FedAvgClient.losses(self, nets, batch, context)["model"] * factor}

    one, two = both(with_client(context=context, losses=own), join_ratio=1)
    assert len(two[0].backend._reasons) == 3
    assert_alike(one, two, 1e-9)


def test_predicting_in_stacks_says_what_each_network_says_alone(double, monkeypatch):
    federation = make_federation(FedAvg, windows(), TASK, backend="stacked")
    initial = {name: t for name, t in federation.workspace.initial.items() if name.startswith("model.")}
    states = [{name: tensor + 0.1 * k for name, tensor in initial.items()} for k in range(5)]
    slices = [slice(0, 3), slice(3, 20), slice(20, 21), slice(None), slice(60, 60)]
    wanted = [Prediction(state, place) for state, place in zip(states, slices, strict=True)]
    alone = Sequential(federation.workspace, federation.data, federation.settings).predict("model", wanted)
    for at_once in (1000, 40, 1):
        federation.backend._rows_at_once = at_once
        torch.testing.assert_close(federation.backend.predict("model", wanted), alone, rtol=1e-12, atol=1e-12)


class OnGPU:
    """Stands for data on a GPU where one has to choose only."""

    test_x = torch.empty(0, device="meta")


def chosen(monkeypatch, name="auto", selected=2, model=TinyNet):
    """The name of the backend that would be made on an accelerator."""
    federation = make_federation(FedAvg, task=Task(SHAPE, CLASSES, model, TinyNet), backend="sequential")
    monkeypatch.setattr(stacked.Stacked, "__init__", lambda self, workspace, data, settings, demanded: None)
    return backends.make(name, federation.workspace, OnGPU, federation.settings, selected).name


def test_auto_stacks_on_an_accelerator_where_it_can(monkeypatch, capsys):
    assert chosen(monkeypatch) == chosen(monkeypatch, "stacked") == "stacked"
    assert chosen(monkeypatch, "sequential") == "sequential"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"selected": 1}, "one client is trained in a round"), ({"model": Forgetful}, "model.fc.1: Dropout draws")],
)
def test_auto_says_in_one_line_why_it_does_not_stack(options, reason, monkeypatch, capsys):
    assert chosen(monkeypatch, **options) == "sequential"
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"clients are trained one by one: {reason}")


def test_processes_are_for_cpus(monkeypatch):
    with pytest.raises(UserError, match=r"^--backend parallel: it is for CPUs, and the data are on meta"):
        chosen(monkeypatch, "parallel")
