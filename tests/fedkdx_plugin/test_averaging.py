"""The mean that options ask for, in runs: by every algorithm that averages, refused by the others, on every backend."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from baselines.fedavg import FedAvg
from baselines.fedftl import COVARIANCE, MEAN, FedFTL
from baselines.fedprox import FedProx
from fedkdx_plugin.algorithm.fedkdx import FedKDX
from fedkdx_plugin.cli.main import main
from fedkdx_plugin.configuration.config import Options
from fedkdx_plugin.engine import attacks
from registry import catalog
from registry.aggregation import RULES, Average, Averaging, sample_weights, weighted_sum
from registry.errors import UserError
from registry.interface import Message, Round
from tests.conftest import Recorder, make_data, make_federation, make_task, same_state
from tests.fedkdx_plugin.broken import algorithm, takes_its_own_mean
from tests.test_cli import fails

SIZES = (12, 7, 20, 9, 15)
ALONE = {"FedAMP", "Local", "Centralised", "FedFomo", "FedMTL", "FedDistill", "FedProto", "FedGH"}
NAMES = list(catalog.BUILT_IN["algorithms"])


def federation(server, how, **settings):
    task = replace(make_task(), averaging=how)
    return make_federation(
        server, make_data(SIZES), task, **{"join_ratio": 1, "local_epochs": 1, "rounds": 2, **settings}
    )


def run(one):
    with closing(one):
        one.run([recorder := Recorder()])
    return recorder.records


def test_the_command_line_names_what_there_is():
    fields = Options.__dataclass_fields__
    assert fields["aggregate"].metadata["choices"] == RULES
    assert fields["attack"].metadata["choices"] == attacks.KINDS
    how = Averaging()
    assert (how.rule, how.bad, how.max_share) == tuple(
        fields[name].default for name in ("aggregate", "assumed_bad", "max_share")
    )


@pytest.mark.parametrize("name", NAMES)
def test_who_averages(name):
    server = catalog.load("algorithms", name)
    assert server.averages == (name not in ALONE)
    if name in ALONE:
        for how in (*(Averaging(rule) for rule in RULES if rule != "mean"), Averaging(max_share=0.5)):
            with pytest.raises(UserError, match=f"{how.asked}: {name} does not average what its clients send"):
                federation(server, how)


@pytest.mark.parametrize("rule", ["median", "krum", "geometric"])
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ALONE])
def test_stacked_clients_are_averaged_like_all_others(name, rule, double):
    server = catalog.load("algorithms", name)
    one, other = (federation(server, Averaging(rule), backend=backend) for backend in ("sequential", "stacked"))
    for first, second in zip(run(one), run(other), strict=True):
        assert not first.rejected and not second.rejected
    found, expected = other.server.save().tensors, one.server.save().tensors
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "mean"])
def test_fedkdx_averages_whole_updates_not_gradients(rule):
    """Rates differ between clients: what is averaged is gradient times rate, as it is applied."""
    one = federation(FedKDX, Averaging(rule), params={"epsilon_start": 1.0, "epsilon_end": 1.0})
    server, start = one.server, dict(one.server.weights)
    rng, rates = torch.Generator().manual_seed(0), [0.1, 0.05, 0.2, 0.1, 0.02]
    gradients = [{n: torch.randn(t.shape, generator=rng) for n, t in start.items()} for _ in rates]
    replies = {
        id: Message(own, {"samples": 10 + id, "rate": rate})
        for id, (own, rate) in enumerate(zip(gradients, rates, strict=True))
    }
    for id, reply in replies.items():
        server.check_reply(id, reply)
    server.aggregate(replies, Round(1, 2))
    updates = [{n: rate * t for n, t in own.items()} for own, rate in zip(gradients, rates, strict=True)]
    expected = Average(Averaging(rule))(updates, sample_weights(replies))
    for name, tensor in start.items():
        torch.testing.assert_close(server.weights[name], tensor - expected[name], rtol=1e-4, atol=1e-5)


def test_a_cap_holds_for_fedkdx_with_equal_weights_too():
    one, other = (
        federation(FedKDX, how, params={"weights": "uniform"}) for how in (Averaging(), Averaging(max_share=0.2))
    )
    run(one), run(other)
    assert same_state(one.server.save().tensors, other.server.save().tensors)  # 1/5 each, as they were


def test_a_cap_changes_the_weight_of_the_largest_client():
    one = federation(FedAvg, Averaging(max_share=0.25))
    states = [{name: torch.full_like(t, float(id)) for name, t in one.server.weights.items()} for id in range(4)]
    replies = {id: Message(own, {"samples": n}) for id, (own, n) in enumerate(zip(states, (1, 1, 1, 97), strict=True))}
    one.server.aggregate(replies, Round(1, 2))
    expected = weighted_sum(states, [0.25] * 4)
    for name, tensor in expected.items():
        torch.testing.assert_close(one.server.weights[name], tensor)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "mean"])
def test_one_clients_statistics_do_not_rule_the_covariance_of_fedftl(rule):
    one = federation(FedFTL, Averaging(rule))
    size = one.server.features
    rng = torch.Generator().manual_seed(0)
    honest = {MEAN: torch.zeros(size), COVARIANCE: torch.eye(size)}
    replies = {}
    for id in range(7):
        own = {name: t + 0.01 * torch.randn(t.shape, generator=rng) for name, t in honest.items()}
        if id == 3:
            own = {name: torch.full_like(t, 1e6) for name, t in own.items()}
        replies[id] = Message(one.server.weights | own, {"samples": 10})
    one.server.aggregate(replies, Round(1, 2))
    assert (one.server.covariance[COVARIANCE] - torch.eye(size)).abs().max() < 0.1


def test_an_algorithm_that_would_ignore_the_rule_is_stopped():
    one = federation(algorithm(FedAvg, aggregate=takes_its_own_mean), Averaging("median"))
    with pytest.raises(UserError, match=r"--aggregate median: Broken\.aggregate takes no mean by `self.average`"):
        run(one)
    run(federation(algorithm(FedAvg, aggregate=takes_its_own_mean), Averaging()))


def test_notes_are_in_the_record_of_their_round_and_on_standard_error(capsys):
    records = run(federation(FedProx, Averaging("krum"), join_ratio=0.4))
    assert [len(record.notes) for record in records] == [1, 0]
    assert f"round 1: {records[0].notes[0]}" in capsys.readouterr().err


def test_runs_record_the_options_and_are_resumed_with_them(shard_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["-data", str(shard_folder), "-algo", "FedAvg,FedKDX", "-m", "cnn_small", "-jr", "1", "-ls", "1"]
    command += ["-dev", "cpu", "--aggregate", "geometric", "--max_share", "0.4"]
    assert main([*command, "-gr", "4", "-o", "whole"]) == 0
    assert main([*command, "-gr", "2", "-o", "half"]) == 0
    (half,) = Path("half").glob("*")
    assert main(["resume", str(half), "-gr", "4"]) == 0
    for name in ("FedAvg", "FedKDX"):
        (one,) = Path("whole").glob(f"*/{name}-seed0")
        config = yaml.safe_load((one / "config.yaml").read_text())
        assert (config["aggregate"], config["max_share"], config["assumed_bad"]) == ("geometric", 0.4, 0.2)
    (one,), (other,) = (Path(part).glob("*/FedAvg-seed0/state.safetensors") for part in ("whole", "half"))
    one, other = (Message.from_bytes(path.read_bytes()).tensors for path in (one, other))
    assert same_state(one, other)
    capsys.readouterr()


def test_the_log_says_where_replies_are_too_few(shard_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["-data", str(shard_folder), "-algo", "FedAvg", "-m", "cnn_small", "-jr", "0.4", "-gr", "2", "-ls", "1"]
    assert main([*command, "-dev", "cpu", "-o", "runs", "--aggregate", "median"]) == 0
    (log,) = Path("runs").glob("*/FedAvg-seed0/log.txt")
    said = "round 1: --aggregate median: 1 replies are too few to tell a bad one; their mean is taken (said once)"
    assert log.read_text().count(said) == 1
    assert said in capsys.readouterr().err


def test_wrong_options_are_one_clear_line(shard_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = ("-data", str(shard_folder), "-algo")
    line = fails(capsys, *base, "FedAvg,Local", "--aggregate", "median")
    assert "--aggregate median: Local does not average what its clients send; leave one of them out" in line
    assert "FedDistill does not average" in fails(capsys, *base, "FedDistill", "--max-share", "0.5")
    line = fails(capsys, *base, "FedAvg", "--aggregate", "krum", "--max-share", "0.5")
    assert "--max-share: --aggregate krum gives every reply the same weight" in line
    assert "'medain' is unknown (did you mean median?)" in fails(capsys, *base, "FedAvg", "--aggregate", "medain")
    assert "0 is out of range" in fails(capsys, *base, "FedAvg", "--max-share", "0")
    assert "0.5 is out of range" in fails(capsys, *base, "FedAvg", "--assumed-bad", "0.5")
    line = fails(capsys, *base, "FedAvg", "--aggregate", "median", "--assumed-bad", "0.3")
    assert "--assumed-bad 0.3: --aggregate median does not use it; leave it out, or take --aggregate trimmed or" in line


def test_a_grid_may_give_what_some_of_its_means_use(shard_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    base = {"data": str(shard_folder), "algorithm": ["FedAvg"], "model": "cnn_small", "assumed_bad": 0.3}
    for rules, code in ((["mean", "trimmed"], 0), (["mean", "median"], 2)):
        Path("grid.yaml").write_text(yaml.safe_dump({"base": base, "grid": {"aggregate": rules}}))
        assert main(["experiment", "grid.yaml", "--dry-run"]) == code
    assert "--assumed-bad 0.3: --aggregate mean, median does not use it" in capsys.readouterr().err
