"""Client-level privacy from the command line to the files, and wrong input in one line before anything runs."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from fedkdx_plugin.cli.main import main
from fedkdx_plugin.configuration.choice import choose
from fedkdx_plugin.configuration.config import Options, from_dict
from fedkdx_plugin.experiments import private
from fedkdx_plugin.privacy import accounting, options
from registry.errors import UserError
from tests.test_cli import RUN, fails

PRIVATE = ["--dp", "client", "--epsilon", "8", "--delta", "1e-3"]
GROUP = ["--norm", "group"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_the_command_line_names_what_there_is():
    fields = Options.__dataclass_fields__
    for name, values in (("dp", options.LEVELS), ("dp_noise", options.NOISES), ("sampling", accounting.SAMPLINGS)):
        assert fields[name].metadata["choices"] == values and fields[name].default == values[0]


def test_a_run_tells_what_it_has_spent(shard_folder, capsys):
    assert main(["-data", str(shard_folder), "-algo", "FedAvg,FedKDX", *RUN, *PRIVATE, *GROUP]) == 0
    shown = capsys.readouterr()
    assert " ε 8.00" in shown.err or " ε 7.9" in shown.err
    said = "What is shared is differentially private for replacing one client: ε = "
    assert said in shown.out
    (folder,) = Path("runs").iterdir()
    table = (folder / "comparison.md").read_text()
    assert said in table
    last = [
        float(list(csv.DictReader((folder / f"{name}-seed0" / "metrics.csv").open()))[-1]["server_privacy_epsilon"])
        for name in ("FedAvg", "FedKDX")
    ]
    assert f"who sees all 2 runs has seen their sums, ε = {sum(last):.3g} and δ = 0.002" in table
    for name in ("FedAvg", "FedKDX"):
        rows = list(csv.DictReader((folder / f"{name}-seed0" / "metrics.csv").open()))
        spent = [float(row["server_privacy_epsilon"]) for row in rows]
        assert spent == sorted(spent) and 7.9 < spent[-1] <= 8
        assert all(float(row["server_privacy_clip"]) > 0 for row in rows)
        table = json.loads((folder / f"{name}-seed0" / "privacy.json").read_text())
        assert (table["of"], table["clients"], table["selected"]) == ("replacing one client", 3, 1)
        assert table["privacy_epsilon"] == table["planned_epsilon"] == spent[-1] and table["rounds"] == 2
        # C is automatic: its count takes a tenth of 1/z², and updates get the noise z/√0.9, by Δ = 2C
        assert table["deviation_of_sum"] == pytest.approx(2 * table["noise_multiplier"] / 0.9**0.5)
        config = yaml.safe_load((folder / f"{name}-seed0" / "config.yaml").read_text())
        assert (config["dp"], config["epsilon"], config["delta"], config["clip"]) == ("client", 8.0, 1e-3, None)
    assert "round 1: clients" in (log := (folder / "FedAvg-seed0" / "log.txt").read_text()) and " ε " in log
    assert main(["report", str(folder), "-o", "page"]) == 0
    assert said in "".join(path.read_text() for path in Path("page").rglob("*.html"))


def test_a_run_with_noise_on_each_window_tells_what_it_has_spent(shard_folder, capsys):
    private = ["--dp", "example", "--epsilon", "8", "--delta", "1e-3", "--clip", "1", "-gr", "2"]
    assert main(["-data", str(shard_folder), "-algo", "FedAvg", *RUN, *private, *GROUP]) == 0
    said = "What a client shares and keeps is differentially private for any one of its windows: at most ε = "
    shown = capsys.readouterr()
    assert said in shown.out and " ε " in shown.err
    (folder,) = Path("runs").iterdir()
    rows = list(csv.DictReader((folder / "FedAvg-seed0" / "metrics.csv").open()))
    spent = [float(row["server_privacy_epsilon"]) for row in rows]
    assert spent == sorted(spent) and 7.9 < spent[-1] <= 8
    table = json.loads((folder / "FedAvg-seed0" / "privacy.json").read_text())
    assert table["noise_multiplier"] == pytest.approx(float(rows[0]["server_privacy_noise"]))
    assert [row["windows"] for row in table["clients"]] == [40, 8, 60]
    assert max(row["epsilon"] for row in table["clients"]) == pytest.approx(spent[-1])
    assert main(["resume", str(folder), "-gr", "9"]) == 2
    assert "-gr 9: with --dp the noise was measured for 2 rounds" in capsys.readouterr().err
    assert main(["resume", str(folder)]) == 0


def test_the_number_of_rounds_stays(shard_folder, capsys):
    assert main(["-data", str(shard_folder), "-algo", "FedAvg", *RUN, *PRIVATE, *GROUP]) == 0
    capsys.readouterr()
    (folder,) = Path("runs").iterdir()
    assert main(["resume", str(folder), "-gr", "9"]) == 2
    assert "-gr 9: with --dp the noise was measured for 2 rounds" in capsys.readouterr().err
    assert main(["resume", str(folder)]) == 0


def test_windows_must_not_be_scaled_by_what_clients_send_without_noise(federated_folder, capsys):
    told = fails(capsys, "-data", str(federated_folder), "-algo", "FedAvg", *RUN, *PRIVATE, *GROUP)
    assert "--scale federated: not with --dp client" in told and "--scale client or none" in told


def test_noise_by_clients_has_two_figures(shard_folder, capsys):
    argv = [*RUN, *PRIVATE, *GROUP, "--dp-noise", "distributed", "--clip", "0.5"]
    assert main(["-data", str(shard_folder), "-algo", "FedAvg", *argv]) == 0
    assert "(against the server, ε = " in capsys.readouterr().out


WRONG = {
    "--epsilon 8": "--epsilon: without --dp there is no noise",
    "--clip 1": "--clip: without --dp there is no noise",
    "--dp-noise distributed": "--dp-noise distributed: without --dp there is no noise",
    "--dp client --delta 1e-3": "--dp client: --epsilon is missing",
    "--dp client --epsilon 8": "--dp client: --delta is missing",
    "--dp client --epsilon 0 --delta 1e-3": "--epsilon: 0 is out of range; it must be above 0",
    "--dp client --epsilon -1 --delta 1e-3": "--epsilon: -1 is out of range; it must be above 0",
    "--dp client --epsilon inf --delta 1e-3": "--epsilon: 'inf' is not a number",
    "--dp client --epsilon nan --delta 1e-3": "--epsilon",
    "--dp client --epsilon 8 --delta 1": "--delta: 1 is out of range; it must be above 0 and below 1",
    "--dp client --epsilon 8 --delta 0.4": "--delta 0.4: not below 1/3",
    "--dp client --epsilon 1e-9 --delta 1e-9": "too small for one round",
    "--dp client --epsilon 1e-6 --delta 1e-3": "too small, the noise would be",
    "--dp client --epsilon 8 --delta 1e-3 --clip much": "--clip much: write auto, or a number above 0",
    "--dp client --epsilon 8 --delta 1e-3 --clip 0": "--clip 0: write auto, or a number above 0",
    "--dp client --epsilon 8 --delta 1e-3 --clip 1e300": "--clip 1e300: out of range, beside noise that large, weights",
    "--dp client --epsilon 8 --delta 1e-3 --clip 1e-300": "--clip 1e-300: out of range, updates that small are rounded",
    "--dp example --epsilon 8 --delta 1e-3 --clip 9e6": "away in float32; it must be from 1.2e-07 to 8.4e+06",
    "--dp example --epsilon 8 --delta 1e-3 --clip 1e-7": "away in float32; it must be from 1.2e-07 to 8.4e+06",
    "--dp example --epsilon 8 --delta 1e-3": "--dp example: needs --clip NUMBER",
    "--dp example --epsilon 8 --delta 0.2 --clip 1": "--delta 0.2: not below 1/8",
    "--dp example --epsilon 8 --delta 1e-3 --clip 1 -algo FedProto": "not with FedProto, which sends the mean features",
    "--dp example --epsilon 8 --delta 1e-3 --clip 1 -algo FedProto,FedAvg,Centralised": "; nor with Centralised, which",
    "--dp client --epsilon 8 --delta 1e-3 --norm batch": "FedAvg averages statistics of batch norm",
    "--dp client --epsilon 8 --delta 1e-3 --aggregate median": "--aggregate median: not with --dp client",
    "--dp client --epsilon 8 --delta 1e-3 --max-share 0.4": "--max-share 0.4: not with --dp client",
    "--dp client --epsilon 8 --delta 1e-3 --outliers 5": "--outliers 5: not with --dp client",
    "--dp client --epsilon 8 --delta 1e-3 --late 0.5@2": "--late: not with --dp client",
    "--dp client --epsilon 8 --delta 1e-3 --rare 0.5@0.5": "--rare: not with --dp client",
    "--dp client --epsilon 8 --delta 1e-3 -algo SCAFFOLD": "not with SCAFFOLD, whose clients' numbers of samples",
    "--dp client --epsilon 8 --delta 1e-3 -algo FedAvg,Local": "what its clients send; leave it out",
    "--dp client --epsilon 8 --delta 1e-3 -algo Centralised": "not with Centralised, which uploads all windows",
    "--dp client --epsilon 8 --delta 1e-3 --dp-noise distributed": "--dp-noise distributed: needs --clip NUMBER",
    "--dp client --epsilon 8 --delta 1e-3 --dp-noise distributed --clip 1 -algo FedKDX": "FedKDX, whose replies",
    "--dp client --epsilon 8 --delta 1e-3 --dp-noise distributed --clip 1 --sampling poisson": "not with --sampling",
    "--dp client --epsilon 8 --delta 1e-3 --dp-noise distributed --clip 1 --dropout 0.1": "not with --dropout",
    "--dp client --epsilon 8 --delta 1e-3 --dp-noise distributed --clip 1 --attackers 0.3": "not with --attackers",
}


@pytest.mark.parametrize("given", WRONG)
def test_wrong_input_is_one_line_before_anything_runs(given, shard_folder, capsys):
    argv = ["-data", str(shard_folder), "-algo", "FedAvg", *RUN, *GROUP, *given.split()]
    assert WRONG[given] in fails(capsys, *argv)
    assert not Path("runs").exists()


@pytest.mark.parametrize("precision", ["tf32", "bf16"])
def test_products_of_few_digits_do_not_go_with_the_privacy_of_windows(precision):
    """On a CPU they are refused anyway: here what is checked on a GPU, too."""
    asked = {"dp": "example", "epsilon": 8, "delta": 1e-3, "clip": "1", "precision": precision}
    config = from_dict({"data": "x", "algorithm": ["FedAvg"], **asked}, "")
    with pytest.raises(UserError, match=rf"^--precision {precision}: not with --dp example: .* in float32"):
        private.check(config, choose(config))


def test_without_the_library_it_says_what_to_install(shard_folder, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "dp_accounting", None)
    told = fails(capsys, "-data", str(shard_folder), "-algo", "FedAvg", *RUN, *PRIVATE, *GROUP)
    assert "pip install 'fedkdx[privacy]'" in told
