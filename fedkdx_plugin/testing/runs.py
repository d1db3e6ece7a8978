"""Checks of an algorithm's runs: they repeat bit by bit, tolerate unequal clients, and learn."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from fedkdx_plugin.engine.backends.base import Trained
from fedkdx_plugin.models.cnn import CNNSmall
from fedkdx_plugin.models.cnn_lstm import CNNLSTM
from fedkdx_plugin.testing.case import (
    AlgorithmCase,
    copy_of,
    difference,
    numbers,
    require_all_counted,
    require_finite,
    require_finite_metrics,
    run,
)
from fedkdx_plugin.testing.made import TinierNet, make_data, same_state
from fedkdx_plugin.testing.running import Checks, float64, require
from registry.aggregation import of_client
from registry.interface import Message, NonFinite, Round

CHECKS = Checks()
RANDOMNESS = "draw all that is random from (task.seed, round.index, client), never from a global generator or a counter"


@CHECKS
def check_same_seed(case: AlgorithmCase) -> None:
    """Require that two runs with the same seed give the same bits."""
    one, two = case.federation(), case.federation()
    records = run(one), run(two)
    wrong = difference(one.save(), two.save())
    require(not wrong, f"two runs with the same seed end differently ({wrong}): {RANDOMNESS}")
    for a, b in zip(*records, strict=True):
        require(
            numbers(a) == numbers(b), f"two runs with the same seed have other metrics in round {a.round}: {RANDOMNESS}"
        )


@CHECKS
def check_models(case: AlgorithmCase) -> None:
    """Require that built-in models run, with a smaller student if the algorithm accepts one."""
    for model in (CNNSmall, CNNLSTM):
        data, task = make_data(sizes=(20, 3)), case.task(model, TinierNet)
        records = run(case.federation(data, task, rounds=2, join_ratio=1, local_epochs=1))
        require_all_counted(records)
        require(math.isfinite(records[-1].metrics["served"].loss), f"{model.__name__}: the loss is not finite")


@CHECKS
def check_unequal_clients(case: AlgorithmCase) -> None:
    """Require finite results with a client of one window, one of one class, late ones, and an absent class."""
    data = make_data(sizes=(1, 50, 9, 33, 17))
    data.train_y[2].fill_(1)
    for y in data.train_y:
        y[y == 3] = 0  # no client has training windows of class 3
    federation = case.federation(data, rounds=8, join_ratio=0.2)
    records = run(federation)
    require_all_counted(records)
    require_finite(federation.save().tensors)
    require_finite_metrics(records[-1])


@CHECKS
def check_order_of_clients(case: AlgorithmCase) -> None:
    """Require that the result does not depend on the order in which clients train and reply."""
    one, two = (case.federation(join_ratio=1) for _ in range(2))
    train = two.backend.train

    def backwards(messages: Mapping[int, Message], round: Round) -> dict[int, Trained | NonFinite]:
        return dict(reversed(train(dict(reversed(list(messages.items()))), round).items()))

    two.backend.train = backwards  # type: ignore[method-assign]
    run(one)
    run(two)
    wrong = difference(one.save(), two.save())
    require(not wrong, f"the result depends on the order in which clients train and reply ({wrong}): {RANDOMNESS}")


@CHECKS
def check_restart(case: AlgorithmCase) -> None:
    """Require that a federation that is saved and restored continues with the same bits as one that is not."""
    whole, first, second = (case.federation(rounds=5) for _ in range(3))
    unbroken = run(whole)
    for t in (1, 2):
        first.round(Round(t, 5, 0.5))
    second.restore(copy_of(first.save()))
    broken = run(second, done=2)
    wrong = difference(whole.save(), second.save())
    advice = "put all that the server must remember into `save` and `restore`, and all that a client must into `memory`"
    require(not wrong, f"saved after round 2 and restored, a run ends differently ({wrong}): {advice}")
    for a, b in zip(unbroken[2:], broken, strict=True):
        require(numbers(a) == numbers(b), f"saved and restored, a run has other metrics in round {a.round}: {advice}")


@CHECKS
def check_asking_for_messages(case: AlgorithmCase) -> None:
    """Require that `Server.message` does not change the server."""
    asked, quiet = case.federation(), case.federation()
    for t in (1, 2, 3):
        for id in range(asked.data.clients):
            asked.server.message(id, Round(t, 3))
        asked.round(Round(t, 3))
        quiet.round(Round(t, 3))
    wrong = difference(asked.save(), quiet.save())
    require(not wrong, f"asking the server for messages changes the run ({wrong}): change it in `aggregate` alone")


@CHECKS
def check_beats_chance(case: AlgorithmCase) -> None:
    """Require an accuracy above 0.5 on four classes, of which chance gives 0.25."""
    data = make_data(sizes=(60, 40, 80, 50), tests=40)
    accuracy = run(case.federation(data, rounds=8, join_ratio=1, local_epochs=3))[-1].metrics["served"].accuracy
    require(
        accuracy > 0.5,
        f"after 8 rounds accuracy is {accuracy:.2f}, and chance is 0.25: check that `losses` trains the network served",
    )


@CHECKS
def check_learning_from_others(case: AlgorithmCase) -> None:
    """Require that what a client learns depends on the others' windows; does not apply if data are pooled."""
    if case.algorithm.pools_data:
        return
    data, other = make_data(), make_data()
    other.train_x[0].mul_(-1).add_(0.5)
    states = []
    for windows in (data, other):
        federation = case.federation(windows, join_ratio=1)
        run(federation)
        states.append({**federation.workspace.kept[3], **of_client(federation.server.networks(), 3)})
    require(not same_state(*states), "client 3 ends the same whatever client 0 trains on: nothing reaches the others")


@CHECKS
def check_no_replies(case: AlgorithmCase) -> None:
    """Require that rounds in which every reply is refused raise nothing and do not change the server."""
    federation = case.federation(rounds=2, join_ratio=1, learning_rate=1e30, clip_norm=0)
    before = copy_of(federation.server.save())
    for record in run(federation):
        require(
            len(record.rejected) == len(record.selected),
            f"round {record.round}: a reply with infinite weights was accepted",
        )
    wrong = difference(before, copy_of(federation.server.save()))
    require(not wrong, f"rounds without any reply change the server ({wrong}): change it in `aggregate` alone")


@CHECKS
def check_renaming_clients(case: AlgorithmCase) -> None:
    """Require that clients with other ids have the same results under those ids.

    With one full batch a round and all clients selected, nothing that the engine draws depends on the ids.
    """
    order = [2, 0, 3, 1]
    with float64():
        data = make_data()
        renamed = replace(data, train_x=[data.train_x[k] for k in order], train_y=[data.train_y[k] for k in order])
        one, two = (
            case.federation(windows, rounds=2, join_ratio=1, batch_size=200, local_epochs=1)
            for windows in (data, renamed)
        )
        run(one)
        run(two)
    networks = two.server.networks(), one.server.networks()
    states = [(of_client(networks[0], None), of_client(networks[1], None))]
    for new, old in enumerate(order if not case.algorithm.pools_data else [0]):
        states.append((of_client(networks[0], new), of_client(networks[1], old)))
        states.append((two.workspace.kept[new], one.workspace.kept[old]))
    for found, expected in states:
        for name, tensor in expected.items():
            alike = torch.allclose(found[name], tensor, rtol=1e-9, atol=1e-9)
            require(alike, f"with other ids of the clients '{name}' ends differently: let no result depend on `id`")


@CHECKS
def check_frozen_networks(case: AlgorithmCase) -> None:
    """Require that networks named in `Client.frozen` stay in evaluation mode, without gradients, and never predict."""
    federation = case.federation(rounds=2, join_ratio=1)
    run(federation)
    for name in case.algorithm.Client.frozen:
        net = federation.workspace.nets[name]
        trained = net.training or any(parameter.requires_grad for parameter in net.parameters())
        require(not trained, f"the frozen network '{name}' is set to train: leave its mode and its gradients alone")
        require(name not in federation.views, f"the frozen network '{name}' predicts: `serves` must not name it")
