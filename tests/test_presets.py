"""Presets of the user: what is wrong in one is said with its name, also of algorithms that do not run."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedkdx_plugin.cli.main import main
from fedkdx_plugin.configuration.choice import choose
from fedkdx_plugin.configuration.config import from_dict
from registry.errors import UserError


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def chosen(preset: str, algorithms: str = "FedAvg"):
    Path("mine.yaml").write_text(preset)
    return choose(from_dict({"data": "SPAR", "algorithm": algorithms, "preset": "mine.yaml"}, ""))


@pytest.mark.parametrize(
    ("preset", "says"),
    [
        (
            "FedAvg: {batch_size: 3}",
            "--preset mine.yaml: FedAvg has no hyper-parameter 'batch_size'; known: local_learning_rate; options of "
            "all algorithms are no part of a preset",
        ),
        ("FedProx: {mu: -3}", "--preset mine.yaml: FedProx: mu: -3 is out of range; it must be at least 0"),
        ("FedAvg: {local_learning_rate: x}", "--preset mine.yaml: FedAvg: local_learning_rate: 'x' is not a number"),
        ("FedAvgg: {}", "--preset mine.yaml: there is no algorithm 'FedAvgg' (did you mean FedAvg?); correct the name"),
    ],
)
def test_what_is_wrong_is_said_with_the_name_of_the_file(preset, says):
    with pytest.raises(UserError) as error:
        chosen(preset)
    assert str(error.value).startswith(says)


def test_a_right_preset_is_taken():
    fedavg, fedprox = chosen("FedAvg: {local_learning_rate: 0.2}\nFedProx: {mu: 0.5}\nMOON: {mu: 2}", "FedAvg,FedProx")
    assert (fedavg.learning_rate, fedprox.params.mu, fedprox.learning_rate) == (0.2, 0.5, 0.01)


def test_an_algorithm_that_is_named_twice_is_refused_and_all_beside_a_name_is_not():
    with pytest.raises(UserError, match=r"^-algo: FedAvg is named 2 times; name it once"):
        chosen("", "FedAvg,fedavg")
    names = [choice.name for choice in chosen("", "Local,all")]
    assert names[0] == "Local" and names.count("Local") == 1 and len(names) > 40


def test_the_list_names_the_learning_rate_of_an_algorithm_without_hyper_parameters(capsys):
    assert main(["list", "FedAvg"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        "  hyper-parameters (--set FedAvg.NAME=VALUE):",
        "    local_learning_rate=0.01  learning rate of the clients' optimiser",
    ]
