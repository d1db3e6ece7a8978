"""FedAvgFT: FedAvg's model on the server, each client's own last training in prediction."""

from __future__ import annotations

import pytest
import torch

from baselines.fedavg import FedAvg
from baselines.fedavgft import FedAvgFT
from fedkdx_plugin.engine.evaluation import UNSEEN
from fedkdx_plugin.engine.participation import Participation
from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.engine.schedule import Schedule
from registry.interface import Round, float_state
from tests.conftest import Recorder, make_federation, make_task, same_state


def kept_by_training(federation) -> dict[int, dict[str, torch.Tensor]]:
    """Client -> the state of `model` at the end of its last training, of the rounds to come."""
    trained: dict[int, dict[str, torch.Tensor]] = {}
    keep = federation.workspace.keep

    def listen(one):
        trained[one.id] = {n: t.clone() for n, t in float_state({"personal": one.nets["model"]}).items()}
        keep(one)

    federation.workspace.keep = listen
    return trained


@pytest.mark.parametrize("local_bn", [False, True])
def test_the_server_is_fedavgs_and_clients_predict_with_what_they_trained_last(local_bn):
    task = make_task(local_bn=local_bn)
    plain = make_federation(FedAvg, task=task, rounds=6, join_ratio=0.5)
    tuned = make_federation(FedAvgFT, task=task, rounds=6, join_ratio=0.5)
    trained = kept_by_training(tuned)
    for t in range(1, 5):
        plain.round(Round(t, 6))
        tuned.round(Round(t, 6))
        assert same_state(dict(plain.server.weights), dict(tuned.server.weights))
        for client in tuned.workspace.clients:
            assert client.serves() == ("personal" if client.id in trained else "model")
            if client.id in trained:
                now = tuned.workspace.state_for_evaluation(client.id, tuned.server.networks())
                assert all(torch.equal(now[name], tensor) for name, tensor in trained[client.id].items())


def test_clients_that_never_trained_predict_with_fedavgs_model():
    def records(algorithm):
        small = make_federation(algorithm)
        schedule = Schedule(3, 1.0, participation=Participation(1))
        federation = Federation(algorithm, make_task(), algorithm.Params(), small.data, small.settings, schedule)
        recorder = Recorder()
        federation.run([recorder])
        return recorder.records

    for one, other in zip(records(FedAvg), records(FedAvgFT), strict=True):
        assert one.metrics[UNSEEN].loss == other.metrics[UNSEEN].loss
        assert one.metrics["served"].loss == other.metrics["model"].loss != other.metrics["served"].loss
        assert (one.bytes_up, one.bytes_down) == (other.bytes_up, other.bytes_down)
