"""The coordinator's rounds against the same rounds in one process, over links that lose and spoil what they carry."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from dataset_utils import shards
from fedkdx_plugin.algorithm.fedkdx_plus import FedKDXPlus, FedKDXPlusParams
from fedkdx_plugin.engine.metrics import Metrics
from fedkdx_plugin.engine.participation import Participation
from fedkdx_plugin.engine.schedule import Schedule
from registry import catalog
from registry.aggregation import Averaging
from registry.errors import UserError
from registry.interface import Message, Round
from tests.conftest import Recorder, same_state
from tests.flower.fakes import make_coordinator, make_link, make_local

PAPERS = [name for name in catalog.BUILT_IN["algorithms"] if name != "Centralised" and not name.endswith("+")]


def values(metrics: Metrics) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in vars(metrics).items()}


def assert_same_records(some, others):
    assert [record.round for record in some] == [record.round for record in others]
    for one, other in zip(some, others, strict=True):
        for name in ("selected", "rejected", "bytes_up", "bytes_down"):
            assert getattr(one, name) == getattr(other, name), name
        assert one.train_loss == other.train_loss
        assert one.metrics.keys() == other.metrics.keys()
        for view in one.metrics:
            for name, value in values(one.metrics[view]).items():
                np.testing.assert_array_equal(value, getattr(other.metrics[view], name), err_msg=f"{view} {name}")


@dataclass(frozen=True)
class OtherDefaults(FedKDXPlusParams):
    """Without what needs a teacher of the student's kind."""

    teacher_init: str = "own"
    pull_start: float = 0.0


class FedKDXByDifferences(FedKDXPlus):
    """FedKDX+: a state of its own for each client on the server, and a difference yet to be settled on each site."""

    Params = OtherDefaults


ALGORITHMS = [*(catalog.load("algorithms", name) for name in PAPERS), FedKDXByDifferences]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.__name__)
def test_sites_give_the_bits_of_one_process(algorithm, shard_folder, tmp_path):
    check_same_bits(algorithm, shard_folder, tmp_path, Schedule(4, 0.7, eval_gap=2))


@pytest.mark.parametrize("participation", [Participation(), Participation(late=(0.4, 3), rare=(0.4, 0.5))])
def test_sites_scale_their_windows_to_the_bits_of_one_process(federated_folder, tmp_path, participation):
    schedule = Schedule(4, 0.7, participation=participation)
    check_same_bits(catalog.load("algorithms", "FedKDX"), federated_folder, tmp_path, schedule)


def test_no_site_hears_anothers_own_statistics(federated_folder, tmp_path):
    link = check_same_bits(catalog.load("algorithms", "FedAvg"), federated_folder, tmp_path, Schedule(2, 1.0))
    own = [values for found in shards.load(federated_folder).statistics for values in (found.mean, found.variance)]
    for _, data in link.requests:
        tensors = Message.from_bytes(data).tensors
        assert "scaling/mean" in tensors
        for values in own:
            assert not any(t.shape == values.shape and np.allclose(t.numpy(), values) for t in tensors.values())


def test_what_was_agreed_on_outlives_the_server(federated_folder, tmp_path):
    """Whoever is there when it comes back, the scaling is that of the first round."""
    algorithm, schedule = catalog.load("algorithms", "FedAvg"), Schedule(3, 1.0)
    link = make_link(algorithm, federated_folder, tmp_path)
    link.away.add(2)
    coordinator, _ = make_coordinator(algorithm, federated_folder, link, schedule)
    coordinator.run()
    first = coordinator.agreed
    assert first.pooled.count.tolist() == [48 * 32] * 3  # of clients 0 and 1: 40 and 8 windows
    saved = Message.from_bytes(coordinator.save().to_bytes())
    link.away.clear()
    again, _ = make_coordinator(algorithm, federated_folder, link, schedule)
    assert again.agreed.pooled.count.tolist() == [108 * 32] * 3
    again.restore(saved)
    assert (again.agreed.round, again.agreed.up, again.agreed.down) == (first.round, first.up, first.down)
    np.testing.assert_array_equal(again.remote.scaling.mean, first.pooled.mean)
    np.testing.assert_array_equal(again.remote.scaling.variance, first.pooled.variance)


def test_a_site_whose_windows_are_scaled_otherwise_is_refused_by_name(shard_folder, federated_folder, tmp_path):
    algorithm = catalog.load("algorithms", "FedAvg")
    link = make_link(algorithm, federated_folder, tmp_path)
    link.setups[2] = replace(link.setups[2], folder=shard_folder)
    coordinator, story = make_coordinator(algorithm, federated_folder, link, Schedule(2, 1.0))
    there = Recorder()
    coordinator.run([there])
    assert [record.selected for record in there.records] == [[0, 1], [0, 1]]
    (event,) = story.of("refused")
    assert (
        event.client == 2 and "windows scaled (--scale) as they came, but the federation has federated" in event.detail
    )


@pytest.mark.parametrize("averaging", [Averaging("geometric"), Averaging("median"), Averaging(max_share=0.35)])
@pytest.mark.parametrize("name", ["FedAvg", "FedKDX"])
def test_sites_are_averaged_as_one_process_does(name, averaging, shard_folder, tmp_path):
    algorithm = catalog.load("algorithms", name)
    check_same_bits(algorithm, shard_folder, tmp_path, Schedule(2, 1.0), averaging)
    plain, asked = (make_local(algorithm, shard_folder, Schedule(2, 1.0), averaging=how) for how in (None, averaging))
    for each in (plain, asked):
        each.run([Recorder()])
    assert not same_state(dict(plain.server.save().tensors), dict(asked.server.save().tensors))


def check_same_bits(algorithm, shard_folder, tmp_path, schedule, averaging=None):
    """Run the sites; return the link over which they worked."""
    local, here = make_local(algorithm, shard_folder, schedule, averaging=averaging), Recorder()
    local.run([here])
    link = make_link(algorithm, shard_folder, tmp_path)
    coordinator, _ = make_coordinator(algorithm, shard_folder, link, schedule, averaging=averaging)
    there = Recorder()
    coordinator.run([there])
    assert_same_records(there.records, here.records)
    assert same_state(dict(coordinator.server.save().tensors), dict(local.server.save().tensors))
    assert coordinator.server.save().meta == local.server.save().meta
    return link


def test_metrics_come_with_the_next_request(shard_folder, tmp_path):
    algorithm = catalog.load("algorithms", "FedAvg")
    link = make_link(algorithm, shard_folder, tmp_path)
    coordinator, _ = make_coordinator(algorithm, shard_folder, link, Schedule(2, 1.0))
    remote, shared, first = coordinator.remote, coordinator.server.networks(), Round(1, 2, 1.0)
    assert coordinator.backend is remote
    assert coordinator.evaluate(shared) == {} and remote.measured == {} and link.requests == []
    results = remote.train({1: coordinator.server.messages([1], first)[1]}, first)
    assert results.keys() == {1} and remote.states == {1: 1}
    assert [id for id, _ in link.requests] == [2, 1, 0]  # all measure, one trains
    local = make_local(algorithm, shard_folder, Schedule(2, 1.0))
    assert remote.measured["served"].accuracy == local.evaluate(shared)["served"].accuracy
    remote.measure(Round(2, 2, 1.0))  # no state waits to be measured
    assert len(link.requests) == 3
    with pytest.raises(UserError, match="lie at the sites"):
        remote.predict("model", [])


def test_nothing_private_is_in_any_answer(shard_folder, tmp_path):
    algorithm = catalog.load("algorithms", "FedKDX")
    link = make_link(algorithm, shard_folder, tmp_path)
    coordinator, _ = make_coordinator(algorithm, shard_folder, link, Schedule(2, 1.0))
    coordinator.run()
    kept = list(tmp_path.rglob("*.safetensors"))
    assert kept
    states = [Message.from_bytes(path.read_bytes()).tensors for path in kept]
    teachers = [tensor for state in states for name, tensor in state.items() if "teacher" in name]
    assert teachers
    for _, data in link.answers + link.requests:
        for name, tensor in Message.from_bytes(data).tensors.items():
            assert "teacher." not in name
            assert not any(
                tensor.shape == own.shape and own.numel() > 1 and torch.equal(tensor, own) for own in teachers
            )
