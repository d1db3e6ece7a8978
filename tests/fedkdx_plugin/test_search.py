"""Random search: as many candidates for every method, drawn by seed and name, chosen on validation windows alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import yaml

from fedkdx_plugin.cli.main import main
from fedkdx_plugin.configuration.choice import read_preset
from fedkdx_plugin.experiments.experiment import Experiment
from fedkdx_plugin.experiments.results import Results
from fedkdx_plugin.experiments.search import Best, best, candidates, table, write_preset
from fedkdx_plugin.results.runs import read
from registry.errors import UserError
from tests.fedkdx_plugin.made_runs import last_accuracy, make_run

SPACES = {
    "FedAvg": {},
    "FedProx": {"mu": {"log": [0.001, 1]}},
    "FedAvgM": {"momentum": {"uniform": [0.5, 0.99]}, "server_rate": {"log": [0.3, 3]}},
    "FedMAT": {"segments": [1, 2, 4, 8]},
}
VALIDATION = {"evaluated_on": "validation"}


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def drawn(spaces=SPACES, count=8, seed=0):
    """Return algorithm -> its candidates' hyper-parameters."""
    found = {}
    for entry in candidates("x.yaml", {"candidates": count, "seed": seed, "spaces": spaces}):
        found.setdefault(entry["algorithm"], []).append(entry["set"])
    return found


def test_every_method_has_as_many_candidates_the_first_with_its_defaults():
    found = drawn()
    assert {name: len(own) for name, own in found.items()} == {"FedAvg": 1, "FedProx": 8, "FedAvgM": 8, "FedMAT": 4}
    assert all(own[0] == {} for own in found.values())
    # all of a small space, each once, its default of 2 segments as the first
    assert sorted(values["FedMAT.segments"] for values in found["FedMAT"][1:]) == [1, 4, 8]


def test_candidates_follow_from_seed_and_method_alone():
    assert drawn() == drawn()
    assert drawn({"FedProx": SPACES["FedProx"]})["FedProx"] == drawn()["FedProx"]
    assert drawn(count=4)["FedAvgM"] == drawn()["FedAvgM"][:4]
    assert drawn(seed=1)["FedProx"][1:] != drawn()["FedProx"][1:]


def test_the_learning_rate_is_drawn_for_every_method_beside_its_own(tmp_path):
    every = {"local_learning_rate": {"log": [0.003, 0.1]}}
    (tmp_path / "x.yaml").write_text(
        yaml.safe_dump(
            {
                "base": {"data": "SPAR", "global_rounds": 1},
                "search": {"candidates": 5, "every": every, "spaces": {"FedAvg": {}, "FedProx": SPACES["FedProx"]}},
            }
        )
    )
    runs = Experiment.grid("x.yaml").runs
    rates = {
        name: [run.settings["local_learning_rate"] for run in runs if run.settings["algorithm"] == [name]]
        for name in ("FedAvg", "FedProx")
    }
    assert [len(set(own)) for own in rates.values()] == [5, 5]
    assert all(own[0] == 0.01 and all(0.003 <= rate <= 0.1 for rate in own) for own in rates.values())
    assert not any(key.endswith("learning_rate") for run in runs for key in run.settings["set"])  # said once
    assert len({run.section for run in runs} | {run.folder.parent for run in runs}) == 2  # one section, one folder
    with pytest.raises(UserError, match=r"-lr: .* draws the learning rate"):
        Experiment.grid("x.yaml", {"local_learning_rate": 0.1})
    with pytest.raises(UserError, match=r"--set FedAvg.*: .* draws it"):
        Experiment.grid("x.yaml", {"set": {"FedAvg.local_learning_rate": 0.1}})


def test_draws_are_even_on_their_scale_and_within_their_ends():
    mus = np.array([own["FedProx.mu"] for own in drawn(count=400)["FedProx"][1:]])
    rates = np.array([own["FedAvgM.momentum"] for own in drawn(count=400)["FedAvgM"][1:]])
    assert mus.min() >= 0.001 and mus.max() <= 1 and rates.min() >= 0.5 and rates.max() <= 0.99
    # the mean of n even draws from [0, 1] is within 5 / sqrt(12 n) of 1/2 but once in millions
    for places in (np.log10(mus) / 3 + 1, (rates - 0.5) / 0.49):
        assert abs(places.mean() - 0.5) < 5 / np.sqrt(12 * len(places))
    assert all(float(f"{mu:.3g}") == mu for mu in mus)


@pytest.mark.parametrize(
    ("search", "says"),
    [
        ({"candidates": 3}, "spaces: must map algorithms to spaces"),
        ({"candidates": 0, "spaces": SPACES}, "candidates: must be a whole number of at least 1, not 0"),
        ({"spaces": SPACES}, "candidates: must be a whole number of at least 1, not None"),
        ({"candidates": True, "spaces": SPACES}, "candidates: must be a whole number"),
        ({"candidates": 3, "seed": 0.5, "spaces": SPACES}, "seed: must be a whole number"),
        ({"candidates": 3, "space": SPACES}, "unknown key 'space' (did you mean spaces?)"),
        ({"candidates": 3, "spaces": SPACES, "every": [1]}, "every: must map options"),
        ({"candidates": 3, "spaces": SPACES, "every": {"batch_size": [8, 16]}}, "may hold local_learning_rate alone"),
        ({"candidates": 3, "spaces": SPACES, "every": {"local_learning_rate": [-1, -2]}}, "is out of range"),
        ({"candidates": 3, "spaces": {"FedAgv": {}}}, "did you mean FedAvg?"),
        ({"candidates": 3, "spaces": {"FedProx": [1]}}, "FedProx: must map hyper-parameters"),
        *(
            ({"candidates": 3, "spaces": {"FedProx": {"mu": spec}}}, "mu: ")
            for spec in (1, [], [[1]], {"log": [0, 1]}, {"log": [1, 0.1]}, {"uniform": [1]}, {"normal": [0, 1]})
        ),
        ({"candidates": 3, "spaces": {"FedProx": {"mi": [1, 2]}}}, "no hyper-parameter 'mi'"),
        ({"candidates": 3, "spaces": {"FedProx": {"mu": [-1, -2]}}}, "is out of range"),
    ],
)
def test_a_wrong_search_gets_one_line(tmp_path, search, says):
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"base": {"data": "SPAR"}, "search": search}))
    with pytest.raises(UserError) as raised:
        Experiment.grid("x.yaml")
    assert says in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"algorithm": "FedAvg"}, "-algo: the methods are those of search: spaces in x.yaml; choose some"),
        ({"label": "mine"}, "--label: in x.yaml, a search labels its candidates itself"),
        ({"set": {"mu": 0.5}}, "--set mu: x.yaml draws it in search: spaces: FedProx"),
        ({"set": {"fedprox.mu": 0.5}}, "--set fedprox.mu: x.yaml draws it"),
    ],
)
def test_options_that_would_replace_what_was_drawn_are_refused(tmp_path, given, says):
    """Else all candidates would run with mu = 0.5, under labels that say other values."""
    (tmp_path / "x.yaml").write_text(
        yaml.safe_dump({"base": {"data": "SPAR"}, "search": {"candidates": 3, "spaces": SPACES}})
    )
    with pytest.raises(UserError) as raised:
        Experiment.grid("x.yaml", given)
    assert says in str(raised.value)
    assert Experiment.grid("x.yaml", {"global_rounds": 3}, ["algorithm=FedProx"]).runs[0].rounds == 3


@pytest.mark.parametrize(
    ("base", "grid", "says"),
    [
        ({"preset": "mine.yaml"}, {}, "FedProx: mu is drawn, and preset mine.yaml says 0.5, while the first candidate"),
        ({}, {"preset": ["paper", "mine.yaml"]}, "FedProx: mu is drawn, and preset mine.yaml says 0.5"),
        ({"set": {"mu": 0.5}}, {}, "FedProx: mu is drawn, and 'set' says 0.5"),
        ({"set": {"fedprox.mu": 0.5}}, {}, "FedProx: mu is drawn, and 'set' says 0.5"),
        ({}, {"set.mu": [0.5]}, "FedProx: mu is drawn, and 'set' says 0.5"),
        ({"local_learning_rate": 0.05}, {}, "local_learning_rate is drawn, and local_learning_rate says 0.05"),
    ],
)
def test_a_value_for_what_is_drawn_is_refused(tmp_path, base, grid, says):
    """Else the candidate called 'defaults', which the others are compared with, has other values."""
    (tmp_path / "mine.yaml").write_text("FedProx: {mu: 0.5}")
    every = {"local_learning_rate": {"log": [0.003, 0.1]}}
    search = {"candidates": 3, "every": every, "spaces": {"FedProx": SPACES["FedProx"]}}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump({"base": {"data": "SPAR"} | base, "grid": grid, "search": search}))
    with pytest.raises(UserError) as raised:
        Experiment.grid("x.yaml")
    assert says in str(raised.value) and "\n" not in str(raised.value)
    assert str(raised.value).endswith("; take it out of one")


def test_a_value_for_what_is_not_drawn_is_of_all_candidates(tmp_path):
    (tmp_path / "mine.yaml").write_text("FedAvgM: {momentum: 0.5}\nFedProx: {mu: 0.5}")
    search = {"candidates": 3, "spaces": {"FedAvgM": {"server_rate": {"log": [0.3, 3]}}}}
    content = {"base": {"data": "SPAR", "preset": "mine.yaml"}, "search": search}
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(content))
    assert [run.settings["set"]["FedAvgM.momentum"] for run in Experiment.grid("x.yaml").runs] == [0.5] * 3
    with pytest.raises(UserError, match=r"server_rate is drawn, and preset other\.yaml says 2\.5"):
        (tmp_path / "other.yaml").write_text("FedAvgM: {server_rate: 2.5}")
        Experiment.grid("x.yaml", {"preset": "other.yaml"})


def made(tmp_path, algorithm, label, skills, data=VALIDATION, **hyper):
    """Return runs of a candidate in several settings."""
    return [
        read(
            make_run(
                tmp_path / str(n) / f"{algorithm} {label}", algorithm, 0, skill, label=label, data=data, hyper=hyper
            )
        )
        for n, skill in enumerate(skills)
    ]


def test_the_best_is_by_the_mean_over_all_settings(tmp_path):
    first = made(tmp_path, "FedProx", "defaults", (0.2, 2.0), mu=0.01)
    second = made(tmp_path, "FedProx", "mu=0.5", (1.5, 1.5), mu=0.5)
    other = made(tmp_path, "FedAvg", "defaults", (1.0, 1.0))
    means = [np.mean([last_accuracy(run.folder) for run in runs]) / 100 for runs in (first, second, other)]
    assert means[1] > means[0]
    found = best([*first, *second, *other])
    assert found == [
        Best("FedAvg", "defaults", {}, pytest.approx(means[2]), pytest.approx(means[2]), 1),
        Best("FedProx", "mu=0.5", {"mu": 0.5}, pytest.approx(means[1]), pytest.approx(means[0]), 2),
    ]
    assert f"| FedProx | 2 | mu=0.5 | {100 * means[1]:.2f} | {100 * means[0]:.2f} |" in table(found)
    write_preset(tmp_path / "mine.yaml", found, "What it is.")
    assert read_preset("mine.yaml") == {"FedProx": {"mu": 0.5}}
    with pytest.raises(UserError, match="exists already"):
        write_preset(tmp_path / "mine.yaml", found, "")


def test_of_equal_candidates_the_defaults_are_kept(tmp_path):
    first, second = made(tmp_path, "FedProx", "mu=0.5", (1.0,), mu=0.5), made(tmp_path, "FedProx", "defaults", (1.0,))
    assert best([*first, *second])[0].values == {}


def test_nothing_is_chosen_on_test_windows_or_by_half(tmp_path):
    with pytest.raises(UserError, match="on validation windows only"):
        best(made(tmp_path / "a", "FedProx", "defaults", (1.0,), {"evaluated_on": "test"}))
    halves = made(tmp_path / "b", "FedProx", "defaults", (1.0, 1.0)) + made(tmp_path / "b", "FedProx", "mu=1", (1.0,))
    with pytest.raises(UserError, match="not all candidates have run in all settings"):
        best(halves)
    with pytest.raises(UserError, match="of no search"):
        best(made(tmp_path / "c", "FedProx", "", (1.0,)))


def test_a_search_from_file_to_preset(shard_folder, tmp_path, capsys):
    base = {"data": str(shard_folder), "model": "cnn_small", "global_rounds": 1, "device": "cpu", "evaluate_on": "test"}
    spaces = {"FedAvg": {}, "FedMAT": {"segments": [1, 4]}}
    (tmp_path / "try.yaml").write_text(yaml.safe_dump({"base": base, "search": {"candidates": 3, "spaces": spaces}}))
    planned = Experiment.grid("try.yaml")
    labels = [run.settings["label"] for run in planned.runs]
    assert labels[:2] == ["defaults", "defaults"] and sorted(labels[2:]) == ["segments=1", "segments=4"]
    command = ["experiment", "try.yaml", "--jobs", "1", "--write-preset", "mine.yaml"]
    assert main(command) == 2  # shards of test windows
    assert "chosen on validation windows only" in capsys.readouterr().err
    assert not Path("runs").exists()  # refused before anything runs
    assert main(command[:-2]) == 0
    with pytest.raises(UserError, match="chosen on validation windows only"):
        best(Results.of(Experiment.resumed("runs/try")).runs)
    again = Experiment.resumed("runs/try")
    assert again.is_search and [run.folder for run in again.runs] == [run.folder for run in planned.runs]
    (tmp_path / "mine.yaml").write_text("FedAvg: {}")
    assert main(command) == 2 and "mine.yaml: exists already" in capsys.readouterr().err
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump({"base": base, "grid": {"algorithm": ["FedAvg"]}}))
    assert main(["experiment", "plain.yaml", "--write-preset", "other.yaml"]) == 2
    assert "plain.yaml has no part 'search'" in capsys.readouterr().err


def test_a_preset_has_all_that_the_best_candidate_ran_with(tmp_path):
    """The search itself may have begun from a preset or `set`: what these said is part of the candidate."""
    first = made(tmp_path, "FedAvgM", "defaults", (1.0,), momentum=0.9, server_rate=0.3)
    second = made(tmp_path, "FedAvgM", "momentum=0.5", (1.5,), momentum=0.5, server_rate=0.3)
    assert best([*first, *second])[0].values == {"momentum": 0.5, "server_rate": 0.3}
    assert best(first)[0].values == {"server_rate": 0.3}
