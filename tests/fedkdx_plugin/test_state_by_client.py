"""State that the server has for one client alone: who predicts with it, and that nobody else is sent it."""

from __future__ import annotations

import torch

from baselines.fedavg import FedAvg
from fedkdx_plugin.engine.schedule import Schedule
from registry.aggregation import labelled, of_client
from registry.interface import Message
from tests.conftest import Recorder, make_federation, same_state
from tests.flower.fakes import make_coordinator, make_link

OTHER = 2


class TwoStates(FedAvg):
    """Has another model for one client, whose head says class 1 whatever it sees."""

    def networks(self):
        own = dict(self.weights)
        own["model.head.weight"] = torch.zeros_like(own["model.head.weight"])
        own["model.head.bias"] = torch.eye(len(own["model.head.bias"]))[1]
        return {**self.weights, **labelled({OTHER: own})}


def test_a_label_is_of_one_client():
    shared = {"a": torch.zeros(1), "b": torch.zeros(1), "2/a": torch.ones(1), "22/a": torch.full((1,), 22.0)}
    assert {id: of_client(shared, id)["a"].item() for id in (2, 22, 3, None)} == {2: 1, 22: 22, 3: 0, None: 0}
    assert all(of_client(shared, id).keys() == {"a", "b"} for id in (2, 22, 3, None))


def test_only_that_client_predicts_with_it():
    one, plain, recorders = make_federation(TwoStates), make_federation(FedAvg), (Recorder(), Recorder())
    for federation, recorder in zip((one, plain), recorders, strict=True):
        federation.run([recorder])
    found, usual = (recorder.records[-1].metrics["served"].client_accuracy for recorder in recorders)
    for id, (own, theirs) in enumerate(zip(found, usual, strict=True)):
        y = one.data.test_y[one.data.test_slices[id]]
        right = float((y == 1).double().mean()) if id == OTHER else theirs
        assert own == right
    shared = one.server.networks()
    states = [one.workspace.state_for_evaluation(id, shared) for id in range(4)]
    assert same_state(states[0], states[3]) and not same_state(states[0], states[OTHER])
    assert all(state.keys() == one.workspace.initial.keys() for state in states)


def test_each_site_is_sent_its_own_alone(shard_folder, tmp_path):
    link = make_link(TwoStates, shard_folder, tmp_path)
    coordinator, _ = make_coordinator(TwoStates, shard_folder, link, Schedule(2, 1.0))
    coordinator.run([Recorder()])
    heads = {id: [] for id in range(3)}
    for id, data in link.requests:
        tensors = Message.from_bytes(data).tensors
        assert not any(f"{OTHER}/" in name for name in tensors)
        heads[id] += [own for name, own in tensors.items() if name.endswith("head.weight")]
    zero = {id: any(not head.any() for head in own) for id, own in heads.items()}
    assert zero == {0: False, 1: False, OTHER: True}
