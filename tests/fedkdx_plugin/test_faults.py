"""Clients that drop out, are slow, or whose replies arrive damaged: drawn by seed, told of, nobody else's harm."""

from __future__ import annotations

import csv
import json
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
import torch

from baselines.centralised import Centralised
from baselines.fedavg import FedAvg
from baselines.fedprox import FedProx
from baselines.moon import MOON
from fedkdx_plugin.algorithm.fedkdx import FedKDX
from fedkdx_plugin.cli.main import main
from fedkdx_plugin.engine.faults import DROPOUT, KINDS, STRAGGLER, Faults, damaged
from fedkdx_plugin.engine.record import RoundRecord
from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.engine.schedule import Schedule
from fedkdx_plugin.engine.training import Settings, batches
from fedkdx_plugin.results.runs import nothing_accepted
from registry.errors import UserError
from registry.interface import BadMessage, Message, NonFinite, Round
from tests.conftest import Recorder, make_data, make_federation, make_task, same_state
from tests.test_cli import fails

EVERYTHING = Faults(dropout=0.3, stragglers=0.3, corrupt=0.3)


def federation(algorithm, faults=EVERYTHING, rounds=6, **settings):
    return make_federation(algorithm, rounds=rounds, join_ratio=1, faults=faults, **settings)


def run(one):
    recorder = Recorder()
    one.run([recorder])
    return recorder.records


def test_faults_come_as_often_as_asked():
    drawn = range(4000)
    for name, happens in [
        ("dropout", lambda faults, k: faults.drops(0, k, 3)),
        ("stragglers", lambda faults, k: faults.slows(0, k, 3)),
        ("corrupt", lambda faults, k: faults.damage(0, k, 3) is not None),
    ]:
        share = np.mean([happens(Faults(**{name: 0.2}), k) for k in drawn])
        assert abs(share - 0.2) < 5 * np.sqrt(0.2 * 0.8 / 4000)
        assert not any(happens(Faults(), k) for k in drawn)


def test_stragglers_have_time_for_one_to_all_epochs_each_as_likely():
    slow = Faults(stragglers=1 - 1e-12)
    counts = np.bincount([slow.epochs(0, k, 0, 4) for k in range(4000)], minlength=5)
    assert counts[0] == 0 and len(counts) == 5
    assert (abs(counts[1:] - 1000) < 5 * np.sqrt(4000 * 0.25 * 0.75)).all()
    assert Faults().epochs(0, 1, 0, 4) == 4


def test_partial_work_is_the_first_epochs_of_the_whole():
    slow = Settings(local_epochs=4, faults=Faults(stragglers=1 - 1e-12))
    whole, seen = Settings(local_epochs=4), set()
    for index in range(1, 9):
        round = Round(index, 8)
        part = [b.tolist() for b in batches(70, round, 1, slow, "cpu")]
        full = [b.tolist() for b in batches(70, round, 1, whole, "cpu")]
        assert part == full[: 3 * slow.epochs(round, 1)]
        seen.add(slow.epochs(round, 1))
    assert len(seen) > 1


def test_fedprox_takes_in_partial_work_and_it_counts():
    """μ = 0 is FedAvg, but for the stragglers' work that it takes."""
    slow = Faults(stragglers=0.5)
    patient, plain = (federation(a, slow, params=p) for a, p in [(FedProx, {"mu": 0.0}), (FedAvg, None)])
    records = run(patient)
    assert not any(record.lost or record.rejected for record in records)
    assert any(set(record.lost.values()) == {STRAGGLER} for record in run(plain))
    assert not same_state(patient.server.weights, plain.server.weights)
    whole = federation(FedProx, Faults(), params={"mu": 0.0})
    run(whole)
    assert not same_state(patient.server.weights, whole.server.weights)


@pytest.mark.parametrize("algorithm", [FedAvg, FedKDX])
def test_the_same_faults_befall_every_algorithm(algorithm):
    def fate(one):
        return [(record.selected, record.lost, sorted(record.rejected)) for record in run(one)]

    expected = fate(federation(MOON))
    assert fate(federation(algorithm)) == expected
    kinds = {why for _, lost, _ in expected for why in lost.values()}
    assert kinds == {DROPOUT, STRAGGLER} and any(rejected for *_, rejected in expected)
    assert fate(federation(algorithm, seed=1)) != expected


@pytest.mark.parametrize("algorithm", [FedAvg, FedKDX])
@pytest.mark.parametrize("backend", ["sequential", "parallel"])
def test_faults_repeat_themselves_bit_for_bit(algorithm, backend):
    one = federation(algorithm, backend="sequential", rounds=3)
    records = run(one)
    torch.set_num_threads(2 if backend == "parallel" else 1)
    other = federation(algorithm, backend=backend, rounds=3)
    with closing(other):
        for first, second in zip(records, run(other), strict=True):
            assert (first.lost, first.rejected, first.bytes_up) == (second.lost, second.rejected, second.bytes_up)
    assert same_state(one.server.save().tensors, other.server.save().tensors)


def test_a_client_that_drops_out_is_sent_its_message_and_does_nothing():
    one = federation(FedKDX, Faults(dropout=0.5), rounds=1)
    before = [dict(state) for state in one.workspace.kept]
    (record,) = run(one)
    assert record.lost and set(record.lost) < set(record.selected)
    for id, client in enumerate(one.workspace.clients):
        untouched = same_state(one.workspace.kept[id], before[id]) and not client.trained and not client.memory
        assert untouched == (id in record.lost)
    whole = federation(FedKDX, Faults(), rounds=1)
    (unharmed,) = run(whole)
    assert record.bytes_down == unharmed.bytes_down
    assert record.bytes_up < unharmed.bytes_up


def test_the_student_of_a_client_whose_reply_was_damaged_stays_in_step(double):
    """The server learns of a client's version from its replies alone; whatever was lost, all end at W^t."""
    one = federation(FedKDX, Faults(dropout=0.2, corrupt=0.4), rounds=12)
    records = run(one)
    assert sum(len(record.rejected) for record in records) > 5
    last = Round(13, 13)
    for id, client in enumerate(one.workspace.clients):
        one.workspace.enter(id)
        client.receive(Message.from_bytes(one.server.message(id, last).to_bytes()))
        for name, tensor in client.shared().items():
            assert tensor.allclose(one.server.weights[name], rtol=1e-9, atol=1e-9), name


def test_a_round_without_a_reply_passes():
    one = federation(FedAvg, Faults(dropout=0.999), rounds=2)
    start = {name: tensor.clone() for name, tensor in one.server.weights.items()}
    records = run(one)
    assert all(len(record.lost) == 4 and not record.bytes_up and np.isnan(record.train_loss) for record in records)
    assert same_state(one.server.weights, start)
    assert all(record.metrics for record in records)


def test_nothing_goes_wrong_where_there_is_no_network():
    assert not any(record.lost or record.rejected for record in run(federation(Centralised)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", [FedAvg, FedKDX])
def test_every_kind_of_damage_is_refused(algorithm, kind):
    one = federation(algorithm, Faults(), rounds=1)
    round = Round(1, 1)
    (result,) = one.backend.train({0: one.server.message(0, round)}, round).values()
    data = damaged(result.reply.to_bytes(), kind, np.random.default_rng(1))
    with pytest.raises((BadMessage, NonFinite)):
        reply = one.transport.send_up(0, result.reply, lambda _: data)
        one.server.check_reply(0, reply)


@pytest.mark.parametrize("faults", [{"dropout": 1.0}, {"stragglers": -0.1}, {"corrupt": 1.5}])
def test_nobodys_work_must_be_certain_to_be_lost(faults):
    with pytest.raises(UserError, match=f"--{next(iter(faults))} .*at least 0 and below 1"):
        federation(FedAvg, Faults(**faults))


def test_runs_tell_of_faults(shard_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["-data", str(shard_folder), "-algo", "FedAvg", "-m", "cnn_small", "-gr", "6", "-jr", "1", "-ls", "2"]
    faults = ["--dropout", "0.3", "--stragglers", "0.3", "--corrupt", "0.3"]
    assert main([*command, "-dev", "cpu", "-o", "faulty", *faults]) == 0
    assert "rejected" in capsys.readouterr().out
    (run,) = Path("faulty").glob("*/FedAvg-seed0")
    with h5py.File(run / "results.h5") as file:
        lost, rejected = ([json.loads(text) for text in file[name][:]] for name in ("lost", "rejected"))
    assert {why for round in lost for why in round.values()} == {DROPOUT, STRAGGLER}
    rows = list(csv.DictReader((run / "metrics.csv").open()))
    assert [int(row["lost"]) for row in rows] == [len(round) for round in lost]
    assert [int(row["rejected"]) for row in rows] == [len(round) for round in rejected]
    log = (run / "log.txt").read_text()
    for number, (away, refused) in enumerate(zip(lost, rejected, strict=True), 1):
        assert (f"round {number}: no reply from client" in log) == bool(away)
        for id in refused:
            assert f"round {number}: dropped an update: client {id}: " in log


def test_a_probability_of_one_is_one_clear_line(shard_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = fails(capsys, "-data", str(shard_folder), "-algo", "FedAvg", "--dropout", "1")
    assert "--dropout 1: the probability must be at least 0 and below 1" in line
    line = fails(capsys, "-data", str(shard_folder), "-algo", "FedAvg", "--corrupt", "2")
    assert "corrupt: 2 is out of range" in line


def test_a_run_that_accepts_no_reply_ends_with_a_line_and_no_success(shard_folder, tmp_path, capsys):
    words = f"-algo FedAvg -m cnn_small -gr 2 -ls 1 -jr 1 -dev cpu --backend sequential -o {tmp_path} -lr 1e308"
    argv = ["-data", str(shard_folder), *words.split()]
    assert main(argv) == 2
    said = "1 of 1 runs accepted no reply in any round, so that nothing was learned:\n  FedAvg-seed0: client 0: "
    assert said in capsys.readouterr().err
    (folder,) = tmp_path.iterdir()
    rows = list(csv.DictReader((folder / "FedAvg-seed0" / "metrics.csv").open(encoding="utf-8")))
    assert [row["train_loss"] for row in rows] == ["", ""]  # nobody's loss is known
    assert main(["resume", str(folder)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        ([({0: "too late"}, {1: "NaN"}), ({}, {0: "infinite", 1: "NaN again"})], "infinite"),
        ([({0: "too late", 1: "away"}, {})], "too late"),
        ([({}, {0: "NaN", 1: "NaN"}), ({0: "too late"}, {})], ""),  # client 1 replies in the second round
        ([({0: "too late"}, {}), ({}, {0: "NaN", 1: "NaN"})], ""),
    ],
)
def test_only_where_no_reply_was_ever_accepted(rounds, expected):
    records = [RoundRecord(1, [0, 1], rejected, 0.0, 0, 0, {}, {}, lost) for lost, rejected in rounds]
    assert nothing_accepted(SimpleNamespace(records=records)) == expected
    assert nothing_accepted(SimpleNamespace(records=[RoundRecord(1, [], {}, 0.0, 0, 0, {})])) == ""


def test_what_is_usual_is_known_after_a_restart():
    """With one reply a round, it is compared with what was usual in the last one."""

    def made():
        task, settings = make_task(), Settings(batch_size=16, local_epochs=1)
        return Federation(FedAvg, task, None, make_data(), settings, Schedule(3, 0.25, outliers=10.0), "sequential")

    first, again = made(), made()
    first.round(Round(1, 3, 0.25))
    (id,) = first._select(Round(1, 3, 0.25))
    length = float(torch.stack([t.double().square().sum() for t in first.server.weights.values()]).sum().sqrt())
    assert first.outliers.usual == pytest.approx(length)  # of a single reply, the model is that reply
    again.restore(Message.from_bytes(first.save().to_bytes()))
    assert again.outliers.usual == first.outliers.usual
    assert list(again.outliers.found({id: {"w": torch.tensor(11 * length)}})) == [id]
