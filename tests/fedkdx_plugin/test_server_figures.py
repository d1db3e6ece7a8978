"""What a server says of itself each round: right, recorded, and read back."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import h5py
import pytest
import torch

from baselines.fedavg import FedAvg
from fedkdx_plugin.algorithm.additions import OFF
from fedkdx_plugin.algorithm.compression import compress, decompress
from fedkdx_plugin.algorithm.fedkdx import FedKDX
from fedkdx_plugin.algorithm.fedkdx_plus import FedKDXPlus
from fedkdx_plugin.algorithm.measures import energy_kept, rank_share
from fedkdx_plugin.cli.main import main
from fedkdx_plugin.engine.participation import Participation
from fedkdx_plugin.engine.schedule import Schedule
from fedkdx_plugin.results.records import read_results, write_results
from tests.conftest import Recorder, make_federation


@pytest.mark.parametrize(("quantise", "tolerance"), [(False, 1e-6), (True, 2e-3)])  # rounded vectors are not orthogonal
def test_energy_kept_is_that_of_what_arrives(quantise, tolerance):
    torch.manual_seed(0)
    tensors = {"w": torch.randn(20, 3) @ torch.randn(3, 30) + 0.3 * torch.randn(20, 30), "b": torch.randn(5)}
    payload = compress(tensors, 0.8, quantise).payload
    arrived = decompress(payload, {name: tensor.shape for name, tensor in tensors.items()})
    whole = sum(tensor.double().square().sum() for tensor in tensors.values())
    expected = sum(tensor.double().square().sum() for tensor in arrived.values()) / whole
    assert "w.S" in payload
    assert 0.8 < float(expected) < 0.999
    assert float(energy_kept(payload, tensors)) == pytest.approx(float(expected), rel=tolerance)
    assert float(energy_kept({"b": torch.zeros(3)}, {"b": torch.zeros(3)})) == 1


def test_rank_share_counts_what_travels_whole_as_full():
    tensors = {"low": torch.ones(10, 20), "eye": torch.eye(10), "bias": torch.ones(10)}
    payload = compress(tensors, 0.99).payload
    assert "low.S" in payload and "eye" in payload
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    assert rank_share(payload, shapes) == pytest.approx((1 / 10 + 1) / 2)
    assert math.isnan(rank_share({"bias": torch.ones(10)}, {"bias": torch.Size([10])}))


@pytest.mark.parametrize(
    ("algorithm", "params"), [(FedKDX, {}), (FedKDXPlus, OFF | {"error_feedback": True})], ids=["paper", "feedback"]
)
def test_fedkdx_tells_of_its_broadcast(algorithm, params):
    federation, recorder = make_federation(algorithm, params=params), Recorder()
    assert all(map(math.isnan, federation.server.figures().values()))
    federation.run([recorder])
    for record in recorder.records:
        told = record.server
        assert told["epsilon"] == pytest.approx(0.9 + 0.08 * record.round / 3)
        assert told["epsilon"] < told["energy_kept"] <= 1
        assert 0 < told["rank_share"] <= 1
    payload, weights = federation.server.downlink.steps[-1].payload, federation.server.weights
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in (payload, weights)]
    assert recorder.records[-1].server["bytes_share"] == pytest.approx(sizes[0] / sizes[1])


def test_no_aggregation_no_figures():
    federation, recorder = make_federation(FedKDX), Recorder()
    federation.schedule = Schedule(2, participation=Participation(rare=(1.0, 1e-9)))
    federation.groups = {"rare": [0, 1, 2, 3]}
    federation.run([recorder])
    assert [record.server for record in recorder.records] == [{}, {}]


@pytest.mark.parametrize(("algorithm", "there"), [(FedKDX, True), (FedAvg, False)])
def test_written_and_read_back(tmp_path, algorithm, there):
    federation, recorder = make_federation(algorithm), Recorder()
    federation.run([recorder])
    recorder.records[1].server.clear()  # a round without aggregation
    confusion = {view: metrics.confusion for view, metrics in recorder.records[-1].metrics.items()}
    with h5py.File(tmp_path / "results.h5", "w") as file:
        write_results(file, recorder.records, confusion, federation.data, {})
        assert ("server" in file) == there
        back, _ = read_results(file)
    assert [record.server for record in back] == [record.server for record in recorder.records]
    assert bool(back[0].server) == there


def test_metrics_csv_has_a_column_a_figure(shard_folder, tmp_path):
    arguments = ["-data", str(shard_folder), *"-algo FedAvg,FedKDX -m cnn_small -gr 2 -ls 1 -dev cpu -o".split()]
    assert main([*arguments, str(tmp_path / "runs")]) == 0
    rows = {p.parent.name: list(csv.DictReader(p.open())) for p in Path(tmp_path).glob("runs/*/*/metrics.csv")}
    assert [float(row["server_epsilon"]) for row in rows["FedKDX-seed0"]] == pytest.approx([0.94, 0.98])
    assert "server_epsilon" not in rows["FedAvg-seed0"][0]
