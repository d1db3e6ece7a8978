"""What cannot be done stacked is stepped down from, and a line says what failed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from baselines.fedavg import FedAvg
from fedkdx_plugin.engine.backends import selection
from fedkdx_plugin.engine.backends.stacked import agreement, layers
from fedkdx_plugin.engine.backends.stacked import backend as stacked
from fedkdx_plugin.engine.backends.stacked.step import COMPILED, EAGER, GRAPH, Step
from fedkdx_plugin.engine.training import ClientError
from registry import catalog
from registry.errors import UserError
from registry.interface import Task
from tests.conftest import CLASSES, SHAPE, TinyNet, make_federation, same_state
from tests.fedkdx_plugin.stacked_runs import (
    TASK,
    assert_alike,
    failing,
    losses,
    on_the_way,
    run,
    windows,
    with_client,
)

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


def test_a_model_that_cannot_be_stacked_is_named():
    task = Task(SHAPE, CLASSES, Forgetful, TinyNet)
    with pytest.raises(UserError, match=r"^--backend stacked: model\.fc\.1: Dropout draws random numbers"):
        run(FedAvg, task=task)


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
    assert capsys.readouterr().err.splitlines() == [
        "stacked: out of GPU memory with 4 clients at once; continues with 2"
    ]

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


class OnGPU:
    """Stands for data on a GPU where one has to choose only."""

    test_x = torch.empty(0, device="meta")


def chosen(monkeypatch, name="auto", selected=2, model=TinyNet):
    """Return the name of the backend that would be made on an accelerator."""
    federation = make_federation(FedAvg, task=Task(SHAPE, CLASSES, model, TinyNet), backend="sequential")
    monkeypatch.setattr(stacked.Stacked, "__init__", lambda self, *_: None)
    return selection.make(name, federation.workspace, OnGPU, federation.settings, selected).name


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


def test_processes_are_for_cpus(monkeypatch):
    with pytest.raises(UserError, match=r"^--backend parallel: it is for CPUs, and the data are on meta"):
        chosen(monkeypatch, "parallel")
