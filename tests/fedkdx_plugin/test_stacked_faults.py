"""What once went wrong in the stacked backend: state, memory that runs out, evaluation, networks of unusual form."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from baselines.fedavg import FedAvg, FedAvgClient
from fedkdx_plugin.engine.backends import selection
from fedkdx_plugin.engine.backends.stacked import backend as stacked
from fedkdx_plugin.engine.backends.stacked import layers
from fedkdx_plugin.engine.backends.stacked.losses import Losses
from fedkdx_plugin.engine.backends.stacked.state import Part
from fedkdx_plugin.engine.backends.stacked.step import Step
from registry import catalog
from registry.errors import UserError
from registry.interface import Message, NonFinite, Round, Task, outputs
from tests.conftest import CLASSES, SHAPE, TinierNet, TinyNet, make_federation, same_state
from tests.fedkdx_plugin.stacked_runs import TASK, assert_alike, both, run, windows, with_client

FULL = torch.cuda.OutOfMemoryError("Tried to allocate 9 GiB")
PERSONAL = with_client(private=("model.head.*",))


def task(model: type) -> Task:
    return Task(SHAPE, CLASSES, model, TinierNet)


def uneven(data):
    """Return the same with test sets of unequal size."""
    kept = (12, 3, 9, 5, 12)
    chosen = torch.cat([torch.arange(p.start, p.start + n) for p, n in zip(data.test_slices, kept, strict=True)])
    ends = torch.tensor(kept).cumsum(0).tolist()
    return replace(
        data,
        test_x=data.test_x[chosen],
        test_y=data.test_y[chosen],
        test_client=data.test_client[chosen],
        test_slices=[slice(end - n, end) for end, n in zip(ends, kept, strict=True)],
    )


def alike(algorithm, capsys, task=TASK, data=None) -> str:
    """Both backends come out alike, as chosen by 'auto'. Returns what was said, why clients were not stacked."""
    reference = run(algorithm, "sequential", task, data)
    chosen = by_auto(algorithm, task, data)
    records = [chosen.round(Round(index, 2, 0.8)) for index in (1, 2)]
    assert_alike(reference, (chosen, records), 1e-9)
    return capsys.readouterr().err


def by_auto(algorithm, task=TASK, data=None, join_ratio=0.8, **options):
    """Return a federation of two rounds whose clients are stacked where they can be."""
    federation = make_federation(
        algorithm, data or windows(), task, rounds=2, join_ratio=join_ratio, backend="sequential"
    )
    federation.backend = stacked.Stacked(federation.workspace, federation.data, federation.settings, **options)
    federation.evaluate = federation.backend.evaluator()
    return federation


@pytest.mark.parametrize("name", ["FedKDX", "FedMAT", "MOON"])
def test_what_was_saved_stays_as_it_was(name):
    """A run folder holds on to the last round's state, and writes it where the next one is broken off."""
    algorithm = catalog.load("algorithms", name)
    federation = make_federation(algorithm, windows(), TASK, rounds=3, join_ratio=1, backend="stacked")
    federation.round(Round(1, 3))
    saved = federation.save().tensors
    before = {key: tensor.clone() for key, tensor in saved.items()}
    federation.round(Round(2, 3))
    assert same_state(before, saved)


def test_a_run_broken_off_within_a_round_goes_on_from_the_last_one(monkeypatch):
    algorithm = catalog.load("algorithms", "FedKDX")
    options = {"rounds": 3, "join_ratio": 1, "backend": "stacked"}
    whole, broken, resumed = (make_federation(algorithm, windows(), TASK, **options) for _ in range(3))
    whole.run()
    broken.round(Round(1, 3))
    saved = broken.save()

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(broken.server, "aggregate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        broken.round(Round(2, 3))
    resumed.restore(Message.from_bytes(saved.to_bytes()))
    resumed.run(done=1)
    assert same_state(whole.save().tensors, resumed.save().tensors)


def of_two_kinds(**members):
    """Clients whose contexts are of two shapes, which are two groups of a round."""

    def context(self):
        return {"weight": torch.full((1 + self.id % 2,), 0.5)}

    def own(self, nets, batch, context):
        return {"model": FedAvgClient.losses(self, nets, batch, context)["model"] * context["weight"].sum()}

    return with_client(context=context, losses=own, private=("model.head.*",), **members)


@pytest.mark.parametrize("where", ["train", "receive", "reply", "before_replies"])
def test_wherever_memory_runs_out_each_client_trains_once(where, double, monkeypatch, capsys):
    calls = []

    def failing(function):
        def first(*arguments):
            calls.append(where)
            if len(calls) == (2 if where == "before_replies" else 4):  # after some have ended
                raise FULL
            return function(*arguments)

        return first

    members = {}
    if where == "before_replies":
        members[where] = classmethod(failing(lambda *_: None))
    elif where != "train":
        members[where] = failing(getattr(FedAvgClient, where))
    algorithm = of_two_kinds(**members)
    reference = run(of_two_kinds(), "sequential", join_ratio=1)
    federation = make_federation(algorithm, windows(), TASK, rounds=2, join_ratio=1, backend="stacked")
    if where == "train":
        train, failed = Step.train, []

        def second_fails(self, ready, plan, state):
            if len(ready) == 2 and self.rows.shape[1] > 2 and not failed:
                failed.append(1)
                raise FULL
            return train(self, ready, plan, state)

        monkeypatch.setattr(Step, "train", second_fails)
    records = [federation.round(Round(index, 2)) for index in (1, 2)]
    assert [client.trained for client in federation.workspace.clients] == [2] * 5
    assert_alike(reference, (federation, records), 1e-9)
    assert "out of GPU memory with 5 clients at once; continues with 2" in capsys.readouterr().err


def test_where_memory_runs_out_in_evaluation_fewer_windows_are_asked(double, monkeypatch, capsys):
    logits = Losses.logits

    def full(self, net, states, x, mask):
        if len(x) > 2:
            raise FULL
        return logits(self, net, states, x, mask)

    reference = run(PERSONAL, "sequential", join_ratio=1)
    monkeypatch.setattr(Losses, "logits", full)
    assert_alike(reference, run(PERSONAL, join_ratio=1), 1e-9)
    assert "stacked: out of GPU memory in evaluation" in capsys.readouterr().err


def test_a_step_ends_with_the_last_who_holds_it():
    """Else what it takes of a GPU's memory stays until the garbage collector runs."""
    federation, _ = run(FedAvg)
    gc.collect()
    gc.disable()
    try:
        step = weakref.ref(next(iter(federation.backend._steps.values())))
        federation.backend._steps.clear()
        assert step() is None
    finally:
        gc.enable()


class NoStatistics(TinyNet):
    """Batch norm that in evaluation too looks at the windows it is given."""

    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.bn = nn.BatchNorm2d(self.width, track_running_stats=False)


class Centred(TinyNet):
    """Features that depend on all windows of a batch."""

    def features(self, x):
        h = super().features(x)
        return h - h.mean(0)


@pytest.mark.parametrize("model", [NoStatistics, Centred])
def test_windows_that_fill_up_an_evaluation_change_no_prediction(model, double, capsys):
    said = alike(PERSONAL, capsys, task(model), uneven(windows()))
    assert ("come out" in said) == (model is Centred)


class Decides(TinyNet):
    """Of a form that torch.vmap refuses."""

    def features(self, x):
        h = super().features(x)
        return h * 2 if x.abs().max() > 1e9 else h


class WithConstants(TinyNet):
    """With a buffer that is no state, as of positions."""

    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.register_buffer("position", torch.linspace(0, 1, shape[2]), persistent=False)

    def features(self, x):
        return super().features(x + self.position)


class WithNothing(TinyNet):
    """With a parameter of no values."""

    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.nothing = nn.Parameter(torch.zeros(0))

    def features(self, x):
        return super().features(x) + self.nothing.sum()


@pytest.mark.parametrize(("model", "stacks"), [(Decides, False), (WithConstants, True), (WithNothing, True)])
def test_networks_of_unusual_form(model, stacks, double, capsys):
    assert (alike(PERSONAL, capsys, task(model)) == "") == stacks


def test_a_part_finds_its_tensors_around_one_without_values():
    part = Part({"a": torch.Size([3]), "none": torch.Size([0, 2]), "b": torch.Size([2, 8]), "one": torch.Size([])})
    flat = torch.arange(2.0 * part.width).view(2, part.width)
    views, split = part.views(flat), part.split(flat)
    assert all(torch.equal(views[name], split[name]) for name in part.shapes)
    assert [tuple(tensor.shape) for tensor in split.values()] == [(2, 3), (2, 0, 2), (2, 2, 8), (2,)]


class Tied(TinyNet):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.again = nn.Linear(self.width * 2, classes)
        self.again.weight = self.head.weight


def test_tied_parameters_are_a_reason_in_words():
    reason = layers.reason_against({"model": Tied(SHAPE, CLASSES)})
    assert reason == "model.again.weight: is the same tensor as model.head.weight, and would be two in a stack"


class Unprobed(TinyNet):
    """Weight normalisation of the older kind cannot be copied after a forward pass."""

    def __deepcopy__(self, memo):
        raise RuntimeError("Only Tensors created explicitly by the user support the deepcopy protocol")


class OnGPU:
    """Stands for data on a GPU where one has to choose only."""

    test_x = torch.empty(0, device="meta")


def test_a_backend_that_cannot_be_made_is_stepped_down_from(capsys):
    made = make_federation(FedAvg, windows(), task(Unprobed), backend="sequential")
    choose = (made.workspace, OnGPU, made.settings, 4)
    assert selection.make("auto", *choose).name == "sequential"
    assert "clients are trained one by one: RuntimeError: Only Tensors" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"^--backend stacked: RuntimeError: Only Tensors"):
        selection.make("stacked", *choose)


def test_a_frozen_network_is_in_evaluation_mode_whenever_it_is_asked(double):
    def build(cls, task):
        return {"model": task.model(), "anchor": task.model()}

    def reply(self):
        with torch.no_grad():
            self.nets["anchor"](self.data.x[:8])
        return FedAvgClient.reply(self)

    algorithm = with_client(frozen=("anchor",), build=classmethod(build), reply=reply)
    algorithm.check_reply = lambda *_: None
    assert_alike(*both(algorithm), 1e-9)


def test_a_mode_that_one_client_leaves_is_not_the_next_ones(double):
    def context(self):
        if self.id == 0:
            self.nets["model"].eval()
        return {}

    def reply(self):
        with torch.no_grad():
            self.nets["model"](self.data.x[:5])  # moves running statistics where it trains
            self.nets["model"].eval()
        return FedAvgClient.reply(self)

    algorithm = with_client(context=context, reply=reply)
    algorithm.check_reply = lambda *_: None
    assert_alike(*both(algorithm), 1e-9)


def test_gradients_of_one_client_are_not_the_next_ones(double):
    def receive(self, message):
        FedAvgClient.receive(self, message)
        head = self.nets["model"].head
        F.cross_entropy(head(torch.ones(1, 16)), self.data.y[:1]).backward()
        with torch.no_grad():
            head.weight -= 0.1 * head.weight.grad

    assert_alike(*both(with_client(receive=receive)), 1e-9)


def test_a_small_term_over_rows_that_fill_up_is_seen(capsys):
    """In float32, where it is a few thousandths of the loss."""

    def own(self, nets, batch, context):
        losses = FedAvgClient.losses(self, nets, batch, context)
        return losses | {"wrong": 0.03 * batch.x.square().mean()}

    reference = run(with_client(losses=own), "sequential")[0].save().tensors
    chosen = by_auto(with_client(losses=own))
    chosen.run()
    assert same_state(chosen.save().tensors, reference)
    assert "its losses come out as" in capsys.readouterr().err


def test_a_context_of_numbers_is_a_reason_and_of_gradients_none(double, capsys):
    def number(self):
        return {"weight": 0.5}

    def own(self, nets, batch, context):
        return {"model": FedAvgClient.losses(self, nets, batch, context)["model"] * context["weight"]}

    assert "AttributeError" in alike(with_client(context=number, losses=own), capsys)

    def with_gradient(self):
        return {"weight": torch.full((), 0.5, requires_grad=True)}

    assert alike(with_client(context=with_gradient, losses=own), capsys) == ""


def test_nonfinite_work_for_all_at_once_drops_nobody_else(double):
    def before_replies(cls, clients, states):
        raise NonFinite("something is not finite")

    assert_alike(*both(with_client(before_replies=classmethod(before_replies))), 1e-9)


def test_windows_are_let_go_after_training():
    for backend in ("sequential", "stacked"):
        federation, _ = run(FedAvg, backend)
        assert all(client.data is None and client.validation is None for client in federation.workspace.clients)


def test_one_by_one_with_state_on_the_host(double, capsys):
    """Clients that are not stacked get their memory where they work, and it goes back."""
    seen = []

    def moved(memory, device):
        seen.append(len(memory))
        return memory

    def receive(self, message):
        self.memory["note"] = torch.ones(3)
        FedAvgClient.receive(self, message)

    def own(self, nets, batch, context):
        return FedAvgClient.losses(self, nets, batch, context) | {"id": batch.x.sum() * 0 + self.id}

    federation = make_federation(
        with_client(receive=receive, losses=own), windows(), TASK, rounds=2, join_ratio=1, backend="sequential"
    )
    federation.backend = stacked.Stacked(
        federation.workspace, federation.data, federation.settings, client_memory="host"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacked, "_moved", moved)
        federation.round(Round(1, 2))
    assert len(seen) == 15  # to begin with, then there and back for each that is trained by itself


def test_the_same_network_asked_twice_is_asked_twice(double):
    def own(self, nets, batch, context):
        one, two = outputs(nets, batch.x, "model", "model")
        return {"model": batch.cross_entropy(one.logits) + 0.1 * batch.mean(two.features.square().mean(1))}

    one, two = both(with_client(losses=own))
    assert all(reason == "" for reason in two[0].backend._reasons.values())
    assert_alike(one, two, 1e-9)
