"""Clients trained together come out as each does alone."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from baselines.fedavg import FedAvg, FedAvgClient
from fedkdx_plugin.algorithm import compression
from fedkdx_plugin.algorithm.downlink import Differences
from fedkdx_plugin.engine import backends
from fedkdx_plugin.engine.evaluation import Prediction
from fedkdx_plugin.engine.faults import Faults
from fedkdx_plugin.engine.sequential import Sequential
from fedkdx_plugin.engine.stacked import agreement, layers, size
from fedkdx_plugin.engine.stacked import backend as stacked
from fedkdx_plugin.engine.stacked import losses as losses_module
from fedkdx_plugin.engine.stacked.losses import Losses
from fedkdx_plugin.engine.stacked.plan import Plan, Ready
from fedkdx_plugin.engine.stacked.state import State
from fedkdx_plugin.engine.stacked.step import COMPILED, EAGER, GRAPH, Step, _Counted
from fedkdx_plugin.engine.training import ClientError
from fedkdx_plugin.models.cnn import CNNSmall
from fedkdx_plugin.models.cnn_lstm import CNNLSTM
from registry import catalog, interface, tensors
from registry.errors import UserError
from registry.interface import Batch, NonFinite, Round, Task
from tests.conftest import CLASSES, SHAPE, Recorder, TinierNet, TinyNet, make_data, make_federation, same_state

NAMES = list(catalog.BUILT_IN["algorithms"])
SIZES = (40, 7, 65, 20, 33)  # whole batches, less than one, and one window left over (65 = 4 · 16 + 1)


def windows(sizes=SIZES):
    """`make_data` of unequal clients."""
    return make_data(sizes)


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
def test_in_float32_clients_move_as_the_reference_does(name):
    """After one round, by the norm of how far each tensor has moved.

    Rounding, 6e-8 an operation, may flip a decision of ReLU or pooling, which is a part of one window in twenty; what a
    mask leaves out wrongly would be whole ones.
    """
    one, two = both(catalog.load("algorithms", name), rounds=1)
    initial = one[0].workspace.initial
    for reference, found in zip(one[0].workspace.kept, two[0].workspace.kept, strict=True):
        assert reference.keys() == found.keys()
        for key, tensor in reference.items():
            moved, off = torch.linalg.vector_norm(tensor - initial[key]), torch.linalg.vector_norm(found[key] - tensor)
            assert off <= 0.02 * moved + 1e-6, key
    assert two[1][0].train_loss == pytest.approx(one[1][0].train_loss, rel=0.01)


@pytest.mark.parametrize("settings", [{"clip_norm": 0.0}, {"clip_norm": 0.05}, {"decay": 0.5}, {"batch_size": 100}])
def test_clipping_rates_and_whole_batches_as_the_reference(settings, double):
    """With rates that differ: in round 2 some clients have trained and others have not."""
    algorithm = catalog.load("algorithms", "FedKDX")
    runs = both(algorithm, join_ratio=0.6, rounds=3, **settings)
    assert len({client.trained for client in runs[0][0].workspace.clients}) > 1
    assert_alike(*runs, 1e-9)


class Refuse(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: what waits for the device, and shapes that depend on values."""

    WAITS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "bincount")

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        assert name not in self.WAITS, operation
        if name == "index":
            assert all(index is None or index.dtype == torch.int64 for index in args[1]), "chosen by a mask"
        return operation(*args, **(kwargs or {}))


def made_step(algorithm, model, place=lambda tensor: tensor, spare=0):
    """A step, with places to spare, two unequal clients to load into it, their plan and state."""
    task, last = Task(SHAPE, CLASSES, model, TinierNet), Round(2, 2)
    federation, _ = run(algorithm, task=task, data=windows((16, 7)), rounds=1, join_ratio=1, local_epochs=1)
    backend, ids = federation.backend, range(1 if algorithm.pools_data else 2)
    backend._kept.load(list(ids), backend._state)
    ready = []
    for id in ids:
        one = backend._begin(id, id, federation.server.message(id, last), last)
        client = copy.copy(one.client)
        client.data = Batch(place(client.data.x), place(client.data.y))
        ready.append(Ready(client, {name: place(tensor) for name, tensor in one.context.items()}, id))
    plan = Plan.of(ready, last, federation.settings)
    nets = copy.deepcopy(dict(federation.workspace.nets))
    losses = Losses(ready[0].client, {name: net.to(place(torch.empty(0)).device) for name, net in nets.items()})
    state = State(*(tuple(place(tensor) for tensor in part) for part in backend._state))
    return Step(losses, len(ids) + spare, 8, plan.index.shape[2], plan.masked, 64, ready[0], 10.0), ready, plan, state


@pytest.mark.parametrize(("name", "model"), [("FedAvg", CNNLSTM), *((name, CNNSmall) for name in NAMES)])
def test_nothing_is_fetched_from_the_device_or_left_on_another(name, model):
    """On PyTorch's "meta" device tensors have no values to fetch, and refuse to meet those of a CPU."""
    step, ready, plan, state = made_step(catalog.load("algorithms", name), model, lambda tensor: tensor.to("meta"))
    losses = step.train(ready, plan, state)
    assert losses.shape == (len(ready),)
    assert {tensor.device.type for tensor in (losses, *step.state.tensors)} == {"meta"}


@pytest.mark.parametrize("name", NAMES)
def test_a_step_waits_for_nothing_and_has_fixed_shapes(name):
    """So that it can be recorded as a CUDA graph; and it gives what it gives without being watched."""
    step, ready, plan, state = made_step(catalog.load("algorithms", name), CNNSmall)
    before = state.clone()
    expected = step.train(ready, plan, state)
    ended = state.clone()
    state.copy_(before)
    with Refuse():
        step.load(ready, plan, state, torch.arange(len(ready)))
        for _ in range(plan.rows.shape[1]):
            step.once()
    assert torch.equal(step.total / step.rows.sum(1), expected)
    assert all(torch.equal(one, other) for one, other in zip(step.state.tensors, ended.tensors, strict=True))


def test_the_watch_over_a_step_would_see_a_wait():
    for wait in (lambda: torch.ones(2).sum().item(), lambda: torch.ones(2)[torch.tensor([True, False])]):
        with pytest.raises(AssertionError), Refuse():
            wait()


@pytest.mark.parametrize("name", NAMES)
def test_places_to_spare_change_nothing(name, double):
    """A graph is made for all clients that a round can have, also where some drop out."""
    results = []
    for spare in (0, 3):
        step, ready, plan, state = made_step(catalog.load("algorithms", name), CNNSmall, spare=spare)
        for tensor in step.state.tensors:
            tensor[len(ready) :] = torch.nan  # whatever was there before
        results.append((step.train(ready, plan, state), *state.tensors))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_all_rounds_share_one_graph_whoever_drops_out(monkeypatch):
    monkeypatch.setattr(Step, "train", failing())
    federation = on_the_way(GRAPH)
    federation.settings = federation.backend.settings = replace(federation.settings, faults=Faults(dropout=0.5))
    federation.schedule = replace(federation.schedule, rounds=6)
    recorder = Recorder()
    federation.run([recorder])
    assert len({len(record.lost) for record in recorder.records}) > 1
    assert len(federation.backend._steps) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FedAvg", "FedProx", "MOON", "FedMTL", "FedFTL", "FedDistill", "FedKDX"])
def test_a_compiled_step_is_the_step(name):
    """The whole of it in one graph, by the CPU's compiler; one algorithm of each kind."""
    step, ready, plan, state = made_step(catalog.load("algorithms", name), CNNSmall)
    before = state.clone()
    expected, ended = step.train(ready, plan, state), state.clone()
    step._move = torch.compile(Step._moved, fullgraph=True, dynamic=False)
    torch.testing.assert_close(step.train(ready, plan, before), expected, rtol=1e-4, atol=1e-4)
    for one, other in zip(before.tensors, ended.tensors, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_round_asks_the_device_for_few_operations_beside_its_steps(monkeypatch):
    """Each costs a GPU more than what it does: what grows with clients and tensors is counted here.

    For four clients, a network of 18 tensors (twice in FedKDX), evaluation included. Copying, checking and sending each
    tensor by itself would come to 1,000 and 2,800.
    """
    monkeypatch.setattr(tensors, "_packed", lambda device: True)  # as on a GPU
    most = {"FedAvg": 400, "FedKDX": 1400}
    for name, limit in most.items():
        task = Task(SHAPE, CLASSES, CNNSmall, CNNSmall)
        federation = make_federation(
            catalog.load("algorithms", name), windows(), task, rounds=3, join_ratio=0.8, backend="stacked"
        )
        for index in (1, 2):
            federation.round(Round(index, 3))
        inside = []
        once = Step.once

        def counted(self, once=once, inside=inside):
            with _Counted() as step:
                once(self)
            inside.append(step.number)

        with pytest.MonkeyPatch.context() as patch, _Counted() as everything:
            patch.setattr(Step, "once", counted)
            federation.round(Round(3, 3))
        beside = everything.number - sum(inside)
        assert inside and 0 < beside < limit, (name, beside)


def test_networks_of_one_architecture_are_asked_in_one_pass(double, monkeypatch):
    """Teacher and student, where they are alike; the result is that of asking one after the other."""
    algorithm, asked = catalog.load("algorithms", "FedKDX"), []
    features = CNNSmall.features
    monkeypatch.setattr(CNNSmall, "features", lambda self, x: asked.append(1) or features(self, x))
    runs = {}
    task = Task(SHAPE, CLASSES, CNNSmall, CNNSmall)
    for together in (True, False):
        if not together:
            monkeypatch.setattr(
                interface.Networks, "outputs", lambda self, x, *names: [self[name](x) for name in names]
            )
            monkeypatch.setattr(losses_module._OnePass, "outputs", interface.Networks.outputs)
        federation = make_federation(algorithm, windows(), task, rounds=1, join_ratio=0.8, backend="stacked")
        assert len(federation.backend._losses.arrangement.groups) == 1
        asked.clear()
        federation.round(Round(1, 1))
        runs[together] = federation.save().tensors, len(asked)
    for name, tensor in runs[True][0].items():
        torch.testing.assert_close(runs[False][0][name], tensor, rtol=1e-9, atol=1e-9)
    assert runs[True][1] < runs[False][1]


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
    monkeypatch.setattr(size, "CPU_MEMORY", 1)
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
    with pytest.raises(UserError, match=r"^--backend stacked: .*; --backend auto takes what can run$") as caught:
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


def test_an_error_names_client_round_and_step():
    def fail(self, losses, batch):
        if len(batch.y) == 7:
            raise ZeroDivisionError("mean of nothing")
        return losses

    for backend in ("sequential", "stacked"):
        with pytest.raises(ClientError, match=r"^client 1, round 1, step 1: ZeroDivisionError: mean of nothing$"):
            run(with_client(**losses(fail)), backend, join_ratio=1)


def test_a_batch_of_one_value_a_channel_is_the_references_error():
    """In the last batch of 65 windows; a stack, whose batches are filled up, would not see it."""

    class Flat(TinyNet):
        def __init__(self, shape, classes):
            super().__init__(shape, classes)
            self.fc = nn.Sequential(self.fc, nn.BatchNorm1d(2 * self.width))

    for backend in ("sequential", "stacked"):
        with pytest.raises(ClientError, match=r"^client 2, round 1, step 5: ValueError: Expected more than 1 value"):
            run(FedAvg, backend, Task(SHAPE, CLASSES, Flat, TinyNet), join_ratio=1)


def failing(*ways):
    """`Step.train` that fails where a step is run in one of these ways; else it is run operation by operation."""
    train = Step.train

    def broken(self, ready, plan, state):
        if self.way in ways:
            raise RuntimeError("no kernel")
        self.way, way = EAGER, self.way
        try:
            return train(self, ready, plan, state)
        finally:
            self.way = way

    return broken


def on_the_way(way, demanded=False):
    """FedAvg's federation whose steps begin in this way, as on a GPU."""
    federation = make_federation(FedAvg, windows(), TASK, rounds=2, join_ratio=0.8, backend="sequential")
    federation.backend = stacked.Stacked(
        federation.workspace, federation.data, federation.settings, demanded=demanded, selected=4, way=way
    )
    federation.evaluate = federation.backend.evaluator()
    return federation


def test_what_cannot_be_run_is_stepped_down_from_with_a_line_each(monkeypatch, capsys):
    for left, ways in ((GRAPH, [COMPILED]), (EAGER, [COMPILED, GRAPH])):
        with monkeypatch.context() as patch:
            patch.setattr(Step, "train", failing(*ways))
            federation = on_the_way(COMPILED)
            federation.run()
        assert federation.backend.way == left
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == len(ways)
        assert all("RuntimeError: no kernel" in line and line.startswith("stacked: a step cannot") for line in lines)
        assert same_state(federation.save().tensors, run(FedAvg)[0].save().tensors)


def test_what_no_stack_can_run_is_trained_one_by_one(monkeypatch, capsys):
    monkeypatch.setattr(Step, "train", failing(COMPILED, GRAPH, EAGER))
    monkeypatch.setattr(agreement, "disagreement", lambda *_: "")
    monkeypatch.setattr(stacked, "disagreement", lambda *_: "")
    federation = on_the_way(GRAPH)
    federation.run()
    assert same_state(federation.save().tensors, run(FedAvg, "sequential")[0].save().tensors)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[1].endswith("such clients are trained one by one")
    with pytest.raises(UserError, match=r"^--backend stacked: .*no kernel; --backend auto takes what can run$"):
        on_the_way(GRAPH, demanded=True).run()


def test_half_as_many_clients_are_trained_where_memory_runs_out(monkeypatch, capsys):
    train = Step.train

    def full(self, ready, plan, state):
        if len(ready) > 2:
            raise torch.cuda.OutOfMemoryError("Tried to allocate 9 GiB")
        return train(self, ready, plan, state)

    whole = run(catalog.load("algorithms", "FedKDX"))
    with monkeypatch.context() as patch:
        patch.setattr(Step, "train", full)
        halved = run(catalog.load("algorithms", "FedKDX"))
    assert halved[0].backend._at_once == 2
    assert_alike(whole, halved, 1e-3)
    assert capsys.readouterr().err.splitlines() == ["stacked: out of GPU memory with 4 clients at once; goes on with 2"]

    def never(*_):
        raise torch.cuda.OutOfMemoryError("Tried to allocate 9 GiB")

    monkeypatch.setattr(Step, "train", never)
    with pytest.raises(UserError, match=r"^out of GPU memory with a single client .*9 GiB.*-lbs.*-dev cpu$"):
        run(FedAvg)


def test_a_wrong_mask_is_seen_by_the_trial_and_named(monkeypatch, capsys):
    """Rows that fill up a batch taken for real ones: the check of agreement is what stands against it."""
    monkeypatch.setattr(layers._BatchNorm, "_weights", lambda self, x: (None, x[:, 0].numel()))
    federation = on_the_way(EAGER)
    federation.run()
    assert same_state(federation.save().tensors, run(FedAvg, "sequential")[0].save().tensors)
    assert "its losses come out as" in capsys.readouterr().err


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
    monkeypatch.setattr(stacked.Stacked, "__init__", lambda self, *_: None)
    return backends.make(name, federation.workspace, OnGPU, federation.settings, selected).name


def test_auto_stacks_on_an_accelerator_where_it_can(monkeypatch, capsys):
    assert chosen(monkeypatch) == chosen(monkeypatch, "stacked") == "stacked"
    assert chosen(monkeypatch, "sequential") == "sequential"
    assert capsys.readouterr().err == ""


def test_auto_says_in_one_line_why_it_does_not_stack(monkeypatch, capsys):
    assert chosen(monkeypatch, model=Forgetful) == "sequential"
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("clients are trained one by one: model.fc.1: Dropout draws")


def test_a_single_client_is_stacked_too_as_a_graph_serves_it(monkeypatch):
    assert chosen(monkeypatch, selected=1) == "stacked"


def test_clients_state_on_the_host_changes_nothing(double):
    """Between rounds; on a CPU the two are the same memory, so that only the way there and back is tried."""
    for algorithm in (FedAvg, catalog.load("algorithms", "FedKDX"), catalog.load("algorithms", "FedMAT")):
        states = []
        for memory in ("device", "host"):
            federation = make_federation(algorithm, windows(), TASK, rounds=3, join_ratio=0.6, backend="sequential")
            federation.backend = stacked.Stacked(
                federation.workspace, federation.data, federation.settings, client_memory=memory
            )
            federation.evaluate = federation.backend.evaluator()
            federation.run()
            states.append(federation.save().tensors)
        assert same_state(*states)


def test_processes_are_for_cpus(monkeypatch):
    with pytest.raises(UserError, match=r"^--backend parallel: it is for CPUs, and the data are on meta"):
        chosen(monkeypatch, "parallel")
