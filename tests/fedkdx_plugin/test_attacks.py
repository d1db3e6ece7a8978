"""Attackers: who they are, what each sends, that nothing else changes, and that they are not measured."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from baselines.centralised import Centralised
from baselines.fedavg import FedAvg
from baselines.fedkd import FedKD
from baselines.fedkd_plus import FedKDPlus
from baselines.fedmtl import FedMTL
from baselines.local import Local
from fedkdx_plugin.algorithm.fedkdx import FedKDX
from fedkdx_plugin.algorithm.fedkdx_plus import FedKDXPlus
from fedkdx_plugin.cli.main import main
from fedkdx_plugin.engine.attacks import KINDS, STRENGTHS, Attack, gaussian, little_is_enough
from fedkdx_plugin.engine.backends.base import Trained
from fedkdx_plugin.engine.participation import ATTACKERS, UNSEEN, Participation
from fedkdx_plugin.engine.randomness import generator
from fedkdx_plugin.experiments.experiment import Experiment
from fedkdx_plugin.flower.coordinator import check_sites
from fedkdx_plugin.results.runs import read_all
from registry.errors import UserError
from registry.interface import Message, NonFinite, Round
from tests.conftest import Recorder, make_data, make_federation, same_state
from tests.test_cli import fails

SIZES = (20, 7, 25, 20, 9)
FIRST = Round(1, 3)


def federation(algorithm, attack, **settings):
    return make_federation(algorithm, make_data(SIZES), join_ratio=1, attack=attack, **settings)


def exchanged(algorithm, attack, **settings):
    """Return a federation, and the honest and the forged results of its first round."""
    one = federation(algorithm, attack, **settings)
    sent = {id: one.transport.send_down(m) for id, m in one.server.messages(range(len(SIZES)), FIRST).items()}
    results = one.backend.train(sent, FIRST)
    return one, sent, results, one._attacked(results, sent, FIRST)


def updates(one, sent, results):
    """Return what each client asks for, in float64: W_k - W^t, or the decompressed update."""
    found = {}
    for id, result in results.items():
        contribution, idle = one.server.contribution(id, result.reply), one.server.idle(sent[id])
        found[id] = {n: t.double() - idle[n].double() if n in idle else t.double() for n, t in contribution.items()}
    return found


@pytest.mark.parametrize("algorithm", [FedAvg, FedKDX, FedKD, FedKDXPlus, FedKDPlus])
@pytest.mark.parametrize(("kind", "factor"), [("sign-flip", -1.0), ("scaling", 10.0)])
def test_sign_flip_and_scaling_multiply_the_update(algorithm, kind, factor):
    one, sent, honest, false = exchanged(algorithm, Attack(kind, 0.4))
    before, after = updates(one, sent, honest), updates(one, sent, false)
    for id in range(len(SIZES)):
        for name, tensor in before[id].items():
            by = factor if id in one.groups[ATTACKERS] and "running" not in name else 1.0
            # factors of 8 bits are rounded again
            near = 0.02 if algorithm in (FedKDXPlus, FedKDPlus) else 1e-5
            scale = float(tensor.abs().max())
            assert (after[id][name] - by * tensor).abs().max() <= near * (1 + abs(by)) * scale + 1e-7, name


def test_an_update_is_relative_to_what_the_server_sent():
    one, sent, honest, false = exchanged(FedAvg, Attack("sign-flip", 0.4, 2.0))
    (attacker, *_) = one.groups[ATTACKERS]
    for name, start in sent[attacker].tensors.items():
        trained = honest[attacker].reply.tensors[name]
        if "running" in name:  # statistics of batch norm are not forged
            assert torch.equal(false[attacker].reply.tensors[name], trained)
            continue
        torch.testing.assert_close(false[attacker].reply.tensors[name], start - 2 * (trained - start))


def test_without_a_model_from_the_server_the_whole_reply_is_the_update():
    one, _, honest, false = exchanged(FedMTL, Attack("scaling", 0.4, 3.0))
    (attacker, *_) = one.groups[ATTACKERS]
    for name, tensor in honest[attacker].reply.tensors.items():
        assert torch.equal(false[attacker].reply.tensors[name], 3 * tensor)


@pytest.mark.parametrize("algorithm", [FedAvg, FedKDX, FedKDXPlus, FedMTL])
@pytest.mark.parametrize("kind", sorted(STRENGTHS))
def test_a_false_reply_has_the_form_and_size_of_the_honest_one_and_is_accepted(algorithm, kind):
    one, _, honest, false = exchanged(algorithm, Attack(kind, 0.4))
    for id, result in false.items():
        assert result.reply.size() == honest[id].reply.size()
        assert result.reply.meta == honest[id].reply.meta
        changed = not same_state(result.reply.tensors, honest[id].reply.tensors)
        assert changed == (id in one.groups[ATTACKERS])
        one.server.check_reply(id, result.reply)


def test_little_is_enough_is_the_mean_less_z_standard_deviations():
    rng = torch.Generator().manual_seed(0)
    seen = [{"w": torch.randn(4, 3, generator=rng), "b": torch.randn(3, generator=rng)} for _ in range(5)]
    found = little_is_enough(seen, 1.5)
    for name in seen[0]:
        values = np.stack([one[name].double().numpy() for one in seen])
        np.testing.assert_allclose(found[name].double().numpy(), values.mean(0) - 1.5 * values.std(0), atol=1e-6)


def test_all_attackers_send_the_same_little_from_what_they_alone_see():
    one, sent, honest, false = exchanged(FedAvg, Attack("little-is-enough", 0.4))
    ids, before, after = one.groups[ATTACKERS], updates(one, sent, honest), updates(one, sent, false)
    assert len(ids) == 2
    for name in (name for name in before[0] if "running" not in name):
        values = torch.stack([before[id][name] for id in ids])
        expected = values.mean(0) - 1.5 * values.std(0, correction=0)
        for id in ids:
            torch.testing.assert_close(after[id][name], expected, atol=1e-5, rtol=1e-5)


def test_noise_has_the_norm_asked_for_and_is_drawn_from_the_seed():
    update = {"w": torch.randn(200, 50, generator=torch.Generator().manual_seed(1)), "none": torch.zeros(0)}
    found = gaussian(update, 10.0, generator(0, "attack", 1, 3))
    ratio = float(found["w"].norm() / update["w"].norm())
    assert abs(ratio - 10) < 10 * 5 / np.sqrt(2 * 10_000)  # five standard deviations of the norm of so many values
    cosine = float((found["w"] * update["w"]).sum() / found["w"].norm() / update["w"].norm())
    assert abs(cosine) < 5 / np.sqrt(10_000)
    assert torch.equal(found["w"], gaussian(update, 10.0, generator(0, "attack", 1, 3))["w"])
    assert not torch.equal(found["w"], gaussian(update, 10.0, generator(0, "attack", 2, 3))["w"])


def test_labels_are_flipped_at_the_attackers_alone():
    data = make_data(SIZES)
    flipped = Attack("label-flip", 0.4).on_data(data, [1, 3], 4)
    for id, (own, now) in enumerate(zip(data.train_y, flipped.train_y, strict=True)):
        assert torch.equal(now, 3 - own if id in (1, 3) else own)
    assert all(torch.equal(a, b) for a, b in zip(data.train_x, flipped.train_x, strict=True))
    one, other = federation(FedAvg, Attack("label-flip", 0.4)), federation(FedAvg, Attack("none", 0.4))
    for each in (one, other):
        each.run([Recorder()])
    assert not same_state(one.server.weights, other.server.weights)


def test_the_same_clients_attack_whatever_the_algorithm_and_never_unseen_ones():
    groups = [federation(a, Attack("scaling", 0.4), seed=3).groups for a in (FedAvg, FedKDX, Local)]
    assert groups[0] == groups[1] == groups[2] and len(groups[0][ATTACKERS]) == 2
    drawn = {tuple(Attack("scaling", 0.2).group(20, {}, seed)[ATTACKERS]) for seed in range(5)}
    assert len(drawn) > 1 and all(len(ids) == 4 for ids in drawn)
    for seed in range(10):
        apart = Participation(unseen=0.5).groups(10, seed)
        assert not set(Attack("scaling", 0.4).group(10, apart, seed)[ATTACKERS]) & set(apart[UNSEEN])


@pytest.mark.parametrize("algorithm", [FedAvg, FedKDX])
def test_attackers_are_not_measured(algorithm):
    one = federation(algorithm, Attack("scaling", 0.4))
    recorder = Recorder()
    one.run([recorder])
    ids = one.groups[ATTACKERS]
    for record in recorder.records:
        for metrics in record.metrics.values():
            assert [id for id, count in enumerate(metrics.client_samples) if not count] == ids
            assert metrics.confusion.sum() == 12 * (len(SIZES) - len(ids))
    honest = federation(algorithm, Attack())
    honest.run([whole := Recorder()])
    assert whole.records[-1].metrics["served"].client_samples.all()


def test_the_training_loss_is_of_honest_clients():
    attack = Attack("label-flip", 0.4)
    one, other = federation(FedAvg, attack, rounds=1), federation(FedAvg, Attack("none", 0.4), rounds=1)
    losses = []
    for each in (one, other):
        each.run([recorder := Recorder()])
        losses.append(recorder.records[0].train_loss)
    assert losses[0] == losses[1]  # in the first round, honest clients have met no attacker


@pytest.mark.parametrize("kind", KINDS)
def test_where_data_are_pooled_only_false_labels_reach_the_model(kind):
    one, other = (federation(Centralised, Attack(own, 0.8)) for own in (kind, "none"))
    for each in (one, other):
        assert 0 in each.groups[ATTACKERS]  # whose place the pooled data have
        each.run([recorder := Recorder()])
        assert not np.isnan(recorder.records[-1].train_loss)
    assert same_state(one.server.weights, other.server.weights) == (kind != "label-flip")


def test_honest_attackers_change_no_weights():
    one, other = federation(FedKDX, Attack("none", 0.4)), federation(FedKDX, Attack())
    for each in (one, other):
        each.run([Recorder()])
    assert same_state(one.save().tensors, other.save().tensors)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "none"])
def test_a_run_that_is_restored_goes_on_with_the_same_bits(kind):
    unbroken, first, second = (federation(FedKDXPlus, Attack(kind, 0.4), rounds=4) for _ in range(3))
    unbroken.run([Recorder()])
    for index in (1, 2):
        first.round(Round(index, 4, 1))
    second.restore(Message.from_bytes(first.save().to_bytes()))
    for index in (3, 4):
        second.round(Round(index, 4, 1))
    one, other = unbroken.save().tensors, second.save().tensors
    assert one.keys() == other.keys()
    for name, tensor in one.items():  # an attack may leave NaN at a client
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=0, equal_nan=True)


def test_an_attacker_without_a_sound_reply_is_dropped_as_any_client():
    one, sent, honest, _ = exchanged(FedAvg, Attack("little-is-enough", 0.4))
    (first, second) = one.groups[ATTACKERS]
    results = one._attacked({**honest, first: NonFinite("no")}, sent, FIRST)
    assert isinstance(results[first], NonFinite) and isinstance(results[second], Trained)


@pytest.mark.parametrize(
    ("attack", "text"),
    [
        (Attack("scaling"), "--attack scaling: nobody attacks; add a share"),
        (Attack("label-flip", 0.2, 3.0), "--attack-strength: --attack label-flip has no strength"),
        (Attack("none", 0.2, 3.0), "--attack-strength: --attack none has no strength"),
        (Attack("scaling", 0.95), "--attackers 0.95: of 5 clients, one at least must be honest"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(attack, text):
    with pytest.raises(UserError, match=text):
        federation(FedAvg, attack)


def test_runs_tell_of_attackers(shard_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = [
        "-data",
        str(shard_folder),
        "-algo",
        "FedAvg,Local",
        "-m",
        "cnn_small",
        "-gr",
        "2",
        "-jr",
        "1",
        "-ls",
        "1",
    ]
    command += ["-dev", "cpu", "-o", "runs", "--attack", "sign-flip", "--attackers", "0.3"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "of them attackers" in out and "Metrics are of the honest clients alone" in out
    (folder,) = Path("runs").glob("*")
    for run in read_all([folder])[0]:
        assert run.config["attack"] == "sign-flip" and run.config["attackers"] == 0.3
        served = run.evaluated[-1].metrics["served"]
        assert np.isnan(served.client_accuracy[run.groups[ATTACKERS]]).all() and served.accuracy >= 0
    rows = list(csv.DictReader((next(folder.glob("FedAvg-seed0")) / "metrics.csv").open()))
    assert "attackers_accuracy" not in rows[0]


def test_a_run_tells_of_predictions_that_are_not_finite(shard_folder, tmp_path, monkeypatch, capsys):
    """One of three clients attacks, so that the two others, with twelve test windows each, are measured."""
    monkeypatch.chdir(tmp_path)
    command = ["-data", str(shard_folder), "-algo", "FedAvg", "-m", "cnn_small", "-gr", "1", "-jr", "1"]
    attack = ["--attack", "scaling", "--attackers", "0.34", "--attack-strength", "1e20"]
    assert main([*command, "-dev", "cpu", *attack]) == 0
    text = "24 of 24 predictions were NaN or infinite and count as wrong"
    assert f"\n\nFedAvg seed 0: {text} (last round).\n" in capsys.readouterr().out
    (log,) = Path("runs").glob("*/FedAvg-seed0/log.txt")
    assert f"round 1: {text}\n" in log.read_text()


def test_wrong_flags_are_one_clear_line(shard_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = ("-data", str(shard_folder), "-algo", "FedAvg")
    assert "nobody attacks" in fails(capsys, *base, "--attack", "scaling")


def test_sites_are_not_told_to_attack(shard_folder):
    given = {"data": str(shard_folder), "algorithm": "FedAvg"}
    check_sites(Experiment.comparison(given))
    with pytest.raises(UserError, match="--attackers: attacks are simulated in one process alone"):
        check_sites(Experiment.comparison(given | {"attackers": 0.3}))
