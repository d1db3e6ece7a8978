"""A training step that can be a CUDA graph: fixed shapes, no wait, few operations beside it."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fedkdx_plugin.engine.backends.stacked import losses as losses_module
from fedkdx_plugin.engine.backends.stacked.losses import Losses
from fedkdx_plugin.engine.backends.stacked.plan import Plan, Ready
from fedkdx_plugin.engine.backends.stacked.state import State
from fedkdx_plugin.engine.backends.stacked.step import GRAPH, Step, _Counted
from fedkdx_plugin.engine.faults import Faults
from fedkdx_plugin.models.cnn import CNNSmall
from fedkdx_plugin.models.cnn_lstm import CNNLSTM
from registry import catalog, interface, tensors
from registry.interface import Round, Task
from tests.conftest import CLASSES, SHAPE, Recorder, make_federation, smaller_student
from tests.fedkdx_plugin.stacked_runs import (
    failing,
    on_the_way,
    run,
    windows,
)

NAMES = list(catalog.BUILT_IN["algorithms"])


class Refuse(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold: what waits for the device, and shapes that depend on values."""

    WAITS = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2", "bincount")

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        assert name not in self.WAITS, operation
        if name == "index":
            assert all(index is None or index.dtype == torch.int64 for index in args[1]), "chosen by a mask"
        return operation(*args, **(kwargs or {}))


def made_step(algorithm, model, place=lambda tensor: tensor, spare=0, **settings):
    """Make a step, with places to spare, two unequal clients to load into it, their plan and state."""
    task, last = Task(SHAPE, CLASSES, model, smaller_student(algorithm, model)), Round(2, 2)
    federation, _ = run(algorithm, task=task, data=windows((16, 7)), rounds=1, join_ratio=1, local_epochs=1, **settings)
    backend, ids = federation.backend, range(1 if algorithm.pools_data else 2)
    backend._kept.load(list(ids), backend._state)
    ready = []
    for id in ids:
        one = backend._begin(id, id, federation.server.message(id, last), last)
        client = copy.copy(one.client)
        client.data = tree_map_only(torch.Tensor, place, client.data)
        ready.append(Ready(client, {name: place(tensor) for name, tensor in one.context.items()}, id))
    plan = Plan.of(ready, last, federation.settings)
    nets = copy.deepcopy(dict(federation.workspace.nets))
    losses = Losses(ready[0].client, {name: net.to(place(torch.empty(0)).device) for name, net in nets.items()})
    state = State(*(tuple(place(tensor) for tensor in part) for part in backend._state))
    return Step(losses, len(ids) + spare, 8, plan, 64, ready[0], 10.0), ready, plan, state


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
