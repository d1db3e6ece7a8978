"""CFL: the best bipartition, when a cluster is split, late members, FedAvg before any split."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from baselines.cfl import CFL, CFLParams, bipartition
from baselines.fedavg import FedAvg
from registry.aggregation import of_client
from registry.interface import Message, Round
from tests.baselines.checks import goes_on_identically
from tests.conftest import Recorder, make_data, make_federation, make_task, same_state

NAME, STATISTIC = "model.head.bias", "model.bn.running_mean"


@pytest.mark.parametrize("seed", range(8))
def test_no_bipartition_has_a_smaller_largest_cosine(seed):
    """Against all of them."""
    rng = np.random.default_rng(seed)
    count = 2 + seed % 5
    units = rng.normal(size=(count, 3))
    units /= np.linalg.norm(units, axis=1, keepdims=True)
    cosines = (units @ units.T).tolist()
    halves, alpha = bipartition(cosines)

    def across(sides):
        return max(cosines[i][j] for i in range(count) for j in range(count) if sides[i] != sides[j])

    others = [sides for sides in itertools.product((0, 1), repeat=count) if 0 < sum(sides) < count]
    assert alpha == across(halves) == min(map(across, others)) and halves[0] == 0


def server(**params) -> CFL:
    return CFL(make_task(), CFLParams(**params), {NAME: torch.zeros(4), STATISTIC: torch.zeros(8)})


def reply(model, *update: float, samples: int = 10) -> Message:
    moved = model[NAME] + torch.tensor([*update, *[0.0] * (4 - len(update))])
    return Message({NAME: moved, STATISTIC: torch.full((8,), 3.0)}, {"samples": samples})


def one_round(one: CFL, index: int, **updates: tuple[float, ...]) -> None:
    replies = {}
    for name, update in updates.items():
        id = int(name.removeprefix("c"))
        replies[id] = reply(one.message(id, Round(index, 9)).tensors, *update)
    one.aggregate(replies, Round(index, 9))


def split_in_round_2() -> CFL:
    """Let clients 0 to 3 go 10 together, then 0 and 2 against 1 and 3, with a mean of 0.5."""
    one = server()
    one_round(one, 1, c0=(10,), c1=(10,), c2=(10,), c3=(10,))
    one_round(one, 2, c0=(0, 5), c1=(0, -4), c2=(0, 5), c3=(0, -4))
    return one


def test_a_stationary_cluster_whose_clients_pull_apart_is_split():
    one = split_in_round_2()
    assert one.members == {0: 1, 1: 2, 2: 1, 3: 2} and one.figures() == {"clusters": 2}
    assert one.models[1][NAME].tolist() == [10, 0.5, 0, 0] == one.models[2][NAME].tolist()
    one_round(one, 3, c0=(0, 2), c1=(0, -2), c2=(0, 4), c3=(0, -4))
    assert one.models[1][NAME].tolist() == [10, 3.5, 0, 0] and one.models[2][NAME].tolist() == [10, -2.5, 0, 0]
    shared = one.networks()
    assert [of_client(shared, id)[NAME][1].item() for id in (0, 1, 2, 3, None)] == [3.5, -2.5, 3.5, -2.5, 0.5]


@pytest.mark.parametrize(
    "second",
    [
        {"c0": (0, 5), "c1": (0, -2)},  # the mean is 1.5, and 1 is a tenth of 10
        {"c0": (0, 3), "c1": (0, -3)},  # nobody goes 4
        {"c0": (0, 5)},  # alone
    ],
)
def test_other_clusters_are_not(second):
    one = server()
    one_round(one, 1, c0=(10,), c1=(10,))
    one_round(one, 2, **second)
    assert set(one.members.values()) == {0} and not one.halves


def test_halves_that_are_not_apart_stay_together():
    """At right angles α = 0 and √½ = 0.71."""
    for gamma, split in ((0.7, True), (0.72, False)):
        one = server(gamma=gamma, eps1=0.5)
        one_round(one, 1, c0=(10,), c1=(10,))
        one_round(one, 2, c0=(0, 5), c1=(0, 0, 5))
        assert bool(one.halves) is split


def test_who_was_not_there_joins_by_its_update_from_the_model_before_the_split():
    one = split_in_round_2()
    parent = one.models[0][NAME].clone()
    before = {cluster: one.models[cluster] for cluster in (1, 2)}
    assert torch.equal(one.message(7, Round(3, 9)).tensors[NAME], parent)
    one_round(one, 3, c7=(1, -3), c8=(1, 2))
    assert one.members[7] == 2 and one.members[8] == 1
    assert all(one.models[cluster] is own for cluster, own in before.items())  # their replies are not averaged
    one_round(one, 4, c7=(0, -1))
    assert one.models[2][NAME].tolist() == [10, -0.5, 0, 0] and torch.equal(one.models[0][NAME], parent)


def test_before_any_split_it_is_fedavg():
    plain, one = make_federation(FedAvg), make_federation(CFL, params={"gamma": 1.0})
    recorders = Recorder(), Recorder()
    for federation, recorder in zip((plain, one), recorders, strict=True):
        federation.run([recorder])
    assert same_state(dict(plain.server.weights), dict(one.server.models[0]))
    losses = [[record.metrics["served"].loss for record in recorder.records] for recorder in recorders]
    assert losses[0] == losses[1]


def test_it_finds_clusters_whose_labels_contradict_each_other():
    data = make_data(sizes=(60, 60, 60, 60), tests=40)
    for id in (1, 3):
        data.train_y[id] = 3 - data.train_y[id]
        data.test_y[data.test_slices[id]] = 3 - data.test_y[data.test_slices[id]]
    recorder = Recorder()
    federation = make_federation(CFL, data, rounds=30, join_ratio=1, local_epochs=3, params={"eps1": 0.5})
    federation.run([recorder])
    members = federation.server.members
    assert members[0] != members[1] and recorder.records[-1].metrics["served"].accuracy > 0.8


def test_a_saved_server_goes_on_identically():
    """Split, with late members."""
    assert goes_on_identically(lambda: make_federation(CFL, rounds=6, params={"eps1": 1.0, "eps2": 0.0}), 6)
