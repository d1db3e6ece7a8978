"""The coordinator's rounds against the same rounds in one process, over links that lose and spoil what they carry."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fedkdx_plugin.algorithm.client import FedKDXParams
from fedkdx_plugin.algorithm.server import FedKDX
from fedkdx_plugin.engine.metrics import Metrics
from fedkdx_plugin.engine.rounds import Schedule
from registry import catalog
from registry.interface import Message
from tests.conftest import Recorder, same_state
from tests.distributed.fakes import make_coordinator, make_link, make_local

FEDERATED = [name for name in catalog.BUILT_IN["algorithms"] if name != "Centralised"]


def figures(metrics: Metrics) -> dict[str, np.ndarray]:
    return {name: np.asarray(value) for name, value in vars(metrics).items()}


def assert_same_records(some, others):
    assert [record.round for record in some] == [record.round for record in others]
    for one, other in zip(some, others, strict=True):
        for name in ("selected", "rejected", "bytes_up", "bytes_down"):
            assert getattr(one, name) == getattr(other, name), name
        assert one.train_loss == other.train_loss
        assert one.metrics.keys() == other.metrics.keys()
        for view in one.metrics:
            for name, value in figures(one.metrics[view]).items():
                np.testing.assert_array_equal(value, getattr(other.metrics[view], name), err_msg=f"{view} {name}")


@dataclass(frozen=True)
class OtherDefaults(FedKDXParams):
    """As the preset `tuned`, in what is sent."""

    downlink: str = "differences"
    quantise: bool = True
    error_feedback: bool = True


class FedKDXByDifferences(FedKDX):
    """FedKDX with a state of its own for each client on the server, and a difference yet to be settled on each site."""

    Params = OtherDefaults


ALGORITHMS = [*(catalog.load("algorithms", name) for name in FEDERATED), FedKDXByDifferences]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: algorithm.__name__)
def test_sites_give_the_bits_of_one_process(algorithm, shard_folder, tmp_path):
    schedule = Schedule(4, 0.7, eval_gap=2)
    local, here = make_local(algorithm, shard_folder, schedule), Recorder()
    local.run([here])
    link = make_link(algorithm, shard_folder, tmp_path)
    coordinator, _ = make_coordinator(algorithm, shard_folder, link, schedule)
    there = Recorder()
    coordinator.run([there])
    assert_same_records(there.records, here.records)
    assert same_state(dict(coordinator.server.save().tensors), dict(local.server.save().tensors))
    assert coordinator.server.save().meta == local.server.save().meta


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
