"""Optimisers of local training: the equations, every backend, a new start in each round."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from baselines.fedavg import FedAvg
from fedkdx_plugin.cli.main import main
from fedkdx_plugin.configuration.config import Options
from fedkdx_plugin.engine import optimizers
from fedkdx_plugin.engine.optimizers import ADAM, ADAMW, MOMENTUM, NAMES, NUMBERS, SGD
from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.engine.schedule import Schedule
from fedkdx_plugin.engine.training import Settings
from registry import catalog
from registry.interface import Round
from registry.parameters import parse
from tests.conftest import Recorder, same_state
from tests.fedkdx_plugin.stacked_runs import TASK, assert_alike, windows, with_client
from tests.fedkdx_plugin.test_own_steps import phases

OTHERS = [MOMENTUM, ADAM, ADAMW]
RATE = 0.01


def by_hand(name, weight, gradients):
    """Return a weight after several steps, in NumPy, written from the papers' equations."""
    velocity = first = second = np.zeros_like(weight)
    for count, g in enumerate(gradients, 1):
        if name == SGD:
            weight = weight - RATE * g
        elif name == MOMENTUM:
            velocity = 0.9 * velocity + g
            weight = weight - RATE * velocity
        else:
            first = 0.9 * first + 0.1 * g
            second = 0.999 * second + 0.001 * g**2
            decay = 0.01 * weight if name == ADAMW else 0
            corrected = first / (1 - 0.9**count), second / (1 - 0.999**count)
            weight = weight - RATE * (corrected[0] / (np.sqrt(corrected[1]) + 1e-8) + decay)
    return weight


@pytest.mark.parametrize("name", NAMES)
def test_steps_of_several_clients_are_the_papers(name, double):
    rng = np.random.default_rng(0)
    start, gradients = rng.normal(size=(2, 3)), rng.normal(size=(4, 2, 3))
    own, kept = torch.tensor(start), tuple(torch.zeros(2, 3) for _ in range(NUMBERS[name]))
    for gradient in gradients:
        own, kept = optimizers.step(name, own, torch.tensor(gradient), kept, torch.tensor([[RATE], [RATE]]), None)
    np.testing.assert_allclose(own.numpy(), by_hand(name, start, gradients), rtol=1e-12)


@pytest.mark.parametrize("name", OTHERS)
def test_a_parameter_that_is_not_trained_keeps_all_that_is_kept_of_it(name, double):
    own, gradient = torch.randn(2, 3), torch.randn(2, 3)
    kept = tuple(torch.rand(2, 3) for _ in range(NUMBERS[name]))
    moving = torch.tensor([[True, False, True], [False, False, True]])
    moved, new = optimizers.step(name, own, gradient, kept, torch.tensor(RATE), moving)
    for before, after in zip((own, *kept), (moved, *new), strict=True):
        assert torch.equal(before[~moving], after[~moving]) and not (before[moving] == after[moving]).any()


def run(algorithm, backend, optimizer, rounds=2, rate=RATE):
    settings = Settings(batch_size=16, local_epochs=2, learning_rate=rate, optimizer=optimizer)
    params, recorder = parse(algorithm.Params, {}, algorithm.__name__), Recorder()
    made = Federation(algorithm, TASK, params, windows(), settings, Schedule(rounds, 0.8), backend)
    made.run([recorder])
    return made, recorder.records


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("algorithm", ["FedAvg", "FedKDX", "phases"])
def test_stacked_training_is_the_references(algorithm, name, double, capsys):
    server = with_client(trains=phases) if algorithm == "phases" else catalog.load("algorithms", algorithm)
    one, other = (run(server, backend, name) for backend in ("sequential", "stacked"))
    assert_alike(one, other, 1e-6, bytes=64)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", OTHERS)
def test_every_optimiser_gives_another_result_and_the_same_bits_again(name):
    one, again, plain = (run(FedAvg, "sequential", optimizer)[0] for optimizer in (name, name, SGD))
    assert same_state(dict(one.server.weights), dict(again.server.weights))
    assert not same_state(dict(one.server.weights), dict(plain.server.weights))


@pytest.mark.parametrize("name", OTHERS)
def test_an_optimiser_starts_anew_in_every_round(name):
    """A federation that is restored after the first round, with nothing of an optimiser, makes the same second."""
    whole, _ = run(FedAvg, "sequential", name)
    first, second = (
        Federation(FedAvg, TASK, whole.server.params, windows(), whole.settings, Schedule(2, 0.8), "sequential")
        for _ in range(2)
    )
    first.round(Round(1, 2, 0.8))
    second.restore(first.save())
    second.run([], done=1)
    assert same_state(dict(whole.server.weights), dict(second.server.weights))


def test_the_choices_of_the_option_are_those_there_are():
    (own,) = (field for field in dataclasses.fields(Options) if field.name == "optimizer")
    assert own.metadata["choices"] == NAMES


def test_an_algorithm_with_steps_of_its_own_is_named(tmp_path, shard_folder, capsys):
    file = tmp_path / "own.py"
    file.write_text(
        "from baselines.fedavg import FedAvg, FedAvgClient\n"
        "class OwnClient(FedAvgClient):\n"
        "    def update(self, weights, gradients, rate, step, context):\n"
        "        return {name: own - rate * gradients[name] for name, own in weights.items()}\n"
        "class Own(FedAvg):\n"
        "    Client = OwnClient\n"
    )
    command = ["run", "-data", str(shard_folder), "-algo", f"FedAvg,{file}:Own", "--optimizer", "adam", "-gr", "1"]
    assert main([*command, "-o", str(tmp_path / "runs")]) == 2
    assert "--optimizer adam: not with Own, whose clients" in capsys.readouterr().err
