"""Windows scaled by what the clients have in common: by whose numbers, at what price, and to what effect."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from baselines.centralised import Centralised
from baselines.fedavg import FedAvg
from dataset_utils import shards
from dataset_utils.scaling import statistics
from fedkdx_plugin.engine import scaling
from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.participation import LATE, RARE, UNSEEN, Participation
from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.engine.schedule import Schedule
from fedkdx_plugin.engine.training import Settings
from registry.interface import Round
from tests.conftest import Recorder, make_data, make_task

SIZES = (40, 7, 65, 20, 30, 12)
SAMPLES = 16  # in a window


def made() -> DeviceData:
    """Clients whose units differ."""
    data = make_data(SIZES)
    train = [(2 + k) * x + 10 * k for k, x in enumerate(data.train_x)]
    return replace(data, train_x=train, statistics=[statistics(x.numpy()) for x in train])


def federation(participation=None, algorithm=FedAvg, data=None, rounds=4):
    schedule = Schedule(rounds, 1.0, participation=participation or Participation())
    settings = Settings(batch_size=16, local_epochs=1, learning_rate=0.05)
    return Federation(algorithm, make_task(), algorithm.Params(), data or made(), settings, schedule, "sequential")


def scaled_by(one: Federation, data: DeviceData, ids) -> None:
    """Assert that all windows are scaled by mean and deviation of these clients' training windows, computed anew."""
    x = torch.cat([data.train_x[id] for id in ids]).double()
    mean, std = x.mean((0, 2, 3), keepdim=True), x.std((0, 2, 3), correction=0, keepdim=True)
    for id in range(len(SIZES)):
        if id not in one.groups.get(UNSEEN, ()):
            torch.testing.assert_close(
                one.data.train_x[id].double(), (data.train_x[id] - mean) / std, atol=1e-5, rtol=1e-6
            )
    test = [data.test_x[place] for place in data.test_slices]
    for id in one.groups.get(UNSEEN, ()):
        test[id] = torch.cat([data.train_x[id], test[id]])
    for id, place in enumerate(one.data.test_slices):
        torch.testing.assert_close(one.data.test_x[place].double(), (test[id] - mean) / std, atol=1e-5, rtol=1e-6)


def test_everybody_is_scaled_by_the_pooled_training_windows():
    data = made()
    one = federation(data=data)
    scaled_by(one, data, range(6))
    assert one.agreed.pooled.count.tolist() == [sum(SIZES) * SAMPLES] * 3
    whole = torch.cat(one.data.train_x)
    torch.testing.assert_close(whole.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.std((0, 2, 3), correction=0), torch.ones(3), atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_who_is_not_there_in_the_first_round_does_not_count_and_is_scaled_all_the_same(seed):
    data = made()
    participation = Participation(2, (0.3, 3), (0.3, 0.5))
    schedule = Schedule(4, 1.0, participation=participation)
    one = Federation(FedAvg, make_task(), None, data, Settings(seed=seed), schedule, "sequential")
    there = one.reachable(Round(1, 4, 1.0))
    assert not set(there) & (set(one.groups[UNSEEN]) | set(one.groups[LATE])) and one.groups[RARE]
    scaled_by(one, data, there)


def test_nobody_there_at_first_moves_the_exchange_to_the_first_round_that_has_somebody():
    data = made()
    own, common = data.statistics, []
    there = {1: [], 2: [4, 5], 3: [0, 1, 2]}
    rounds = [Round(index, 3, 1.0) for index in (1, 2, 3)]
    agreed = scaling.agree(own, rounds, lambda round: there[round.index], 6)
    assert agreed.round == 2 and agreed.pooled.count.tolist() == [42 * SAMPLES] * 3
    assert scaling.agree(own, rounds, lambda _: common, 6) is None
    assert scaling.agree(None, rounds, lambda round: there[round.index], 6) is None
    assert scaling.agree([None] * 4 + own[4:], rounds, lambda round: [3, 4], 6).pooled.count[0] == 30 * SAMPLES


def test_the_bytes_are_counted_once():
    """Three numbers a channel from each of six clients, and back to each: 3 x 3 x 8 bytes, and a header."""
    data = made()
    plain = replace(federation().data, scaled={})
    runs = []
    for own in (data, plain):
        recorder = Recorder()
        federation(data=own).run([recorder])
        runs.append(recorder.records)
    size = len(scaling.to_message(data.statistics[0]).to_bytes())
    assert 72 < size < 400
    for k, (one, other) in enumerate(zip(*runs, strict=True)):
        assert one.bytes_up - other.bytes_up == (6 * size if k == 0 else 0)
        assert one.bytes_down - other.bytes_down == (6 * size if k == 0 else 0)
        assert one.train_loss == other.train_loss  # already scaled windows train just the same


def test_who_pools_all_data_sends_no_statistics_beside():
    recorder = Recorder()
    one = federation(Participation(unseen=2), Centralised)
    one.run([recorder])
    seen = [id for id in range(6) if id not in one.groups[UNSEEN]]
    scaled_by_sizes = sum(SIZES[id] for id in seen) * SAMPLES
    assert one.agreed.pooled.count.tolist() == [scaled_by_sizes] * 3 and (one.agreed.up, one.agreed.down) == (0, 0)
    uploads = sum(x.numel() * 4 + y.numel() * 8 for x, y in one.uploads)
    assert recorder.records[0].bytes_up - recorder.records[1].bytes_up == pytest.approx(uploads, rel=0.05)


def test_runs_of_one_comparison_share_the_scaled_windows():
    data = made()
    one, other = federation(data=data), federation(data=data)
    assert one.data.test_x.data_ptr() == other.data.test_x.data_ptr()
    assert torch.equal(data.train_x[0], made().train_x[0])  # which stay as they are


def test_layout_in_memory_and_the_bits_of_numpy_are_kept():
    x = torch.randn(5000, 3, 1, 16).to(memory_format=torch.channels_last)
    data = replace(made(), test_x=x, test_slices=[slice(0)] * 6)
    common = statistics(x.numpy())
    found = scaling.apply(data, common).test_x
    assert found.is_contiguous(memory_format=torch.channels_last) and found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), common.scaling()(x.numpy()))


def test_a_comparison_says_what_it_scaled_by(federated_folder, tmp_path, monkeypatch):
    import json

    from fedkdx_plugin.cli.main import main

    monkeypatch.chdir(tmp_path)
    assert main(["-data", str(federated_folder), *"-algo FedAvg -m cnn_small -gr 2 -jr 1 -dev cpu".split()]) == 0
    (environment,) = tmp_path.glob("runs/*/*/environment.json")
    found = json.loads(environment.read_text())["scaling"]
    x = np.concatenate([shard.x for shard in shards.load(federated_folder).train]).astype(np.float64)
    np.testing.assert_allclose(found["mean"], x.mean(axis=(0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(found["variance"], x.var(axis=(0, 2, 3)), rtol=1e-9)
