"""Clients trained together come out as each does alone."""

from __future__ import annotations

import pytest
import torch

from baselines.fedavg import FedAvg, FedAvgClient
from fedkdx_plugin.algorithm import compression
from fedkdx_plugin.algorithm.additions import OFF
from fedkdx_plugin.engine.backends.sequential import Sequential
from fedkdx_plugin.engine.backends.stacked import backend as stacked
from fedkdx_plugin.engine.backends.stacked import size
from fedkdx_plugin.engine.evaluation import Prediction
from fedkdx_plugin.engine.faults import Faults
from fedkdx_plugin.models.cnn import CNNSmall
from fedkdx_plugin.models.cnn_lstm import CNNLSTM
from registry import catalog
from registry.interface import NonFinite, Round, Task
from tests.conftest import CLASSES, SHAPE, TinierNet, TinyNet, make_federation, same_state, smaller_student
from tests.fedkdx_plugin.stacked_runs import (
    SIZES,
    TASK,
    assert_alike,
    both,
    run,
    windows,
    with_client,
)

NAMES = list(catalog.BUILT_IN["algorithms"])


# of every kind of network that is built around the model
AROUND = ("FedAvg", "MOON", "FedMAT", "FedFTL", "FedKDX", "FedRoD", "GPFL", "pFedMe", "kNN-Per")
CASES = [
    pytest.param(name, model, marks=() if model is TinyNet or name in AROUND else pytest.mark.slow)
    for name in NAMES
    for model in (TinyNet, CNNSmall, CNNLSTM)
]


@pytest.mark.parametrize(("name", "model"), CASES)
def test_every_algorithm_and_model_as_the_reference(name, model, double):
    algorithm = catalog.load("algorithms", name)
    task = Task(SHAPE, CLASSES, model, smaller_student(algorithm, model))
    one, two = (run(algorithm, backend, task) for backend in ("sequential", "stacked"))
    assert all(reason == "" for reason in two[0].backend._reasons.values())
    assert two[0].backend._reasons
    # FedFomo's gains and FedAS's traces travel as text, where a last digit may be missing
    assert_alike(one, two, 1e-9, bytes=200 if name in ("FedFomo", "FedAS") else 0)


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


def test_stragglers_make_the_epochs_they_have_time_for(double):
    algorithm, faults = catalog.load("algorithms", "FedProx"), Faults(stragglers=0.6)
    one, two = both(algorithm, rounds=3, local_epochs=4, faults=faults)
    planned = [one[0].settings.epochs(Round(t, 3), id) for t in (1, 2, 3) for id in range(5)]
    assert len(set(planned)) > 2
    assert_alike(one, two, 1e-9)


@pytest.mark.parametrize(("name", "params"), [("FedKDX+", OFF | {"serve": "both"}), ("FedFomo", {}), ("FedMAT", {})])
def test_local_batch_norm_and_held_out_windows_as_the_reference(name, params, double):
    algorithm, task = catalog.load("algorithms", name), Task(SHAPE, CLASSES, TinyNet, TinierNet, local_bn=True)
    assert_alike(*both(algorithm, task=task, params=params), 1e-9)


@pytest.mark.parametrize("downlink", ["broadcast", "differences"])
@pytest.mark.parametrize("name", ["FedKDX+", "FedKD+"])
def test_compressed_together_as_in_the_reference(name, downlink, double):
    params = OFF | {"downlink": downlink, "error_feedback": True, "quantise": True, "epsilon_end": 0.95}
    task = Task(SHAPE, CLASSES, CNNSmall, CNNSmall)
    assert_alike(*both(catalog.load("algorithms", name), task=task, rounds=3, params=params), 1e-9)


def test_matrices_of_all_clients_are_decomposed_in_one_call(monkeypatch):
    """Up and down: as many calls as there are shapes, whatever the number of clients."""
    calls = []

    def first(matrices):
        calls.append((len(matrices), tuple(matrices.shape[1:])))
        return compression._by_eigh(matrices)

    monkeypatch.setattr(compression, "METHODS", (first, *compression.METHODS[1:]))
    task, algorithm = Task(SHAPE, CLASSES, CNNSmall, CNNSmall), catalog.load("algorithms", "FedKDX+")
    federation = make_federation(algorithm, windows(), task, rounds=3, join_ratio=1, backend="stacked")
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


class Counting(TinyNet):
    """With state that no layer declares: how often it was asked."""

    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.register_buffer("asked", torch.zeros(()))

    def features(self, x):
        if self.training:
            self.asked += 1
        return super().features(x) * (1 + 0.1 * self.asked)


def test_state_that_a_model_changes_itself_comes_out_as_in_the_reference(double):
    assert_alike(*both(FedAvg, task=Task(SHAPE, CLASSES, Counting, TinyNet)), 1e-9)


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
