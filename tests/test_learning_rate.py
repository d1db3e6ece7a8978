"""Learning rates: each algorithm may have its own, from a preset or `--set`; `-lr` wins over a preset."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedkdx_plugin.cli.main import main
from fedkdx_plugin.configuration.choice import choose, resolve, run_settings
from fedkdx_plugin.configuration.config import from_dict
from fedkdx_plugin.experiments.setting import training
from tests.test_cli import resolved


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def resolved_again(values: dict) -> dict:
    config = from_dict(values, "")
    return resolve(config, choose(config))


RATES = "FedAvg: {local_learning_rate: 0.05}\nFedProx: {mu: 0.5}\n"


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [  # of FedAvg, FedProx and Local
        ([], (0.01, 0.01, 0.01)),
        (["--preset", "rates.yaml"], (0.05, 0.01, 0.01)),
        (["--preset", "rates.yaml", "-lr", "0.2"], (0.2, 0.2, 0.2)),  # what is asked for on the command line wins
        (["-lr", "0.2", "--set", "fedprox.local_learning_rate=0.3"], (0.2, 0.3, 0.2)),  # but for one of them
        (["--preset", "rates.yaml", "--set", "local_learning_rate=0.3"], (0.3, 0.3, 0.3)),
    ],
)
def test_each_algorithm_may_have_its_own_learning_rate(argv, wanted):
    Path("rates.yaml").write_text(RATES)
    values = resolved("-data", "SPAR", "-algo", "FedAvg,FedProx,Local", *argv)
    for found in (values, resolved_again(values)):  # what is written into a folder's file reads back as the same
        config = from_dict(found, "")
        choices = choose(config)
        runs = [run_settings(found, choice, 0) for choice in choices]
        assert tuple(choice.learning_rate for choice in choices) == wanted
        assert tuple(run["local_learning_rate"] for run in runs) == wanted
        assert not any(key.endswith("learning_rate") for run in runs for key in run["set"])
        trained = [training(from_dict(run, ""), *choose(from_dict(run, ""))).learning_rate for run in runs]
        assert tuple(trained) == wanted


@pytest.mark.parametrize("value", ["0", "-1", "fast"])
def test_a_wrong_learning_rate_of_one_algorithm_is_refused(value, capsys):
    command = ["-data", "SPAR", "-algo", "FedAvg", "--dry-run", "--set", f"FedAvg.local_learning_rate={value}"]
    assert main(command) == 2
    assert "error: FedAvg: local_learning_rate" in capsys.readouterr().err
