"""Local: every client trains in every round, whoever is selected, or only when it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from baselines.fedavg import FedAvg
from baselines.local import Local
from fedkdx_plugin.engine.faults import Faults
from fedkdx_plugin.engine.participation import Participation
from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.engine.schedule import Schedule
from fedkdx_plugin.engine.training import Settings
from registry.interface import Message, Round
from registry.parameters import parse
from tests.baselines import reference
from tests.conftest import Recorder, make_data, make_federation, make_task

CLIENTS = 4


def selected(algorithm, backend="sequential", params=None, participation=None, faults=None, rounds=3):
    """Return the clients of each round, and which were lost."""
    settings = Settings(batch_size=16, local_epochs=1, learning_rate=0.05, faults=faults or Faults())
    schedule = Schedule(rounds, 0.5, participation=participation or Participation())
    own = parse(algorithm.Params, params or {}, algorithm.__name__)
    recorder = Recorder()
    made = Federation(algorithm, make_task(), own, make_data(), settings, schedule, backend)
    made.run([recorder])
    trained = [client.trained for client in made.workspace.clients]
    return [record.selected for record in recorder.records], trained, [record.lost for record in recorder.records]


@pytest.mark.parametrize("backend", ["sequential", "stacked"])
def test_every_client_trains_in_every_round(backend):
    rounds, trained, _ = selected(Local, backend)
    assert rounds == [[0, 1, 2, 3]] * 3 and trained == [3] * CLIENTS


def test_the_listing_says_what_the_counted_bytes_are():
    """An empty message to each client, and from each its number of windows."""
    recorder = Recorder()
    schedule = Schedule(1, 1.0)
    made = Federation(Local, make_task(), parse(Local.Params, {}, "Local"), make_data(), Settings(), schedule)
    made.run([recorder])
    sizes = [len(y) for y in made.data.train_y]
    assert recorder.records[0].bytes_down == CLIENTS * len(Message({}).to_bytes()) > 0
    assert recorder.records[0].bytes_up == sum(len(Message({}, {"samples": n}).to_bytes()) for n in sizes)
    assert Local.sends == "no weights: empty messages down, only the number of windows up; own model"
    assert "without any communication" not in Local.__doc__


def test_at_equal_work_the_clients_are_those_of_every_other_method():
    assert selected(Local, params={"local_rounds": "selected"})[0] == selected(FedAvg)[0]
    assert all(len(ids) == 2 for ids in selected(FedAvg)[0])


def test_nobody_waits_for_a_server_that_is_out_of_reach():
    """Late and rare clients train, dropouts and stragglers do not occur; unseen clients stay untrained."""
    away = Participation(unseen=1, late=(0.5, 3), rare=(0.5, 0.01))
    rounds, trained, lost = selected(Local, participation=away, faults=Faults(dropout=0.9, stragglers=0.9))
    assert len({tuple(ids) for ids in rounds}) == 1 and len(rounds[0]) == CLIENTS - 1
    assert sorted(trained) == [0, 3, 3, 3] and lost == [{}] * 3
    assert any(selected(FedAvg, participation=away, faults=Faults(dropout=0.9))[2])


def test_with_a_memory_it_predicts_with_the_nearest_own_windows_by_the_features_it_has_trained(double):
    """kNN-Per without a federation: what of it is the memory alone."""
    made, plain = (make_federation(Local, rounds=2, params={"memory": memory}) for memory in (True, False))
    for t in (1, 2):
        views = made.round(Round(t, 2)).metrics
        plain.round(Round(t, 2))
    shares = []
    for id, place in enumerate(made.data.test_slices):
        client = made.workspace.enter(id)
        assert client.serves() == "memory" and plain.workspace.enter(id).serves() == "model"
        share, net = float(client.nets["memory"].share), client.nets["model"].eval()
        own, test = (net(x) for x in (made.data.train_x[id], made.data.test_x[place]))
        one_hot = torch.nn.functional.one_hot(made.data.train_y[id], 4).double().numpy()
        keys = own.features.detach().numpy()
        near = [reference.neighbours(h, keys, one_hot) for h in test.features.detach().numpy()]
        p = share * np.array(near) + (1 - share) * test.logits.softmax(1).detach().numpy()
        right = (p.argmax(1) == made.data.test_y[place].numpy()).mean()
        assert views["served"].client_accuracy[id] == pytest.approx(right)
        shares.append(share)
    assert max(shares) > 0  # else this test would say nothing of memories
