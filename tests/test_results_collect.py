"""Rows of results from run folders."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from registry.errors import UserError
from tests.fedkdx_plugin.made_runs import client_accuracy, last_accuracy, make_run, set_subjects
from tests.made_rows import csv_rows, make


def runs_in(folder: Path) -> Path:
    """Make two finished runs and an unfinished one."""
    make_run(folder / "one" / "FedKDX", "FedKDX", views=("served", "teacher", "student"), train_fraction=0.1)
    make_run(folder / "one" / "FedProx", "FedProx", hyper={"mu": 0.5}, groups={"late": [1, 3]}, late="0.3@1")
    make_run(folder / "one" / "Local", "Local", done=1)
    return folder


def test_collect_reads_what_the_run_folders_hold(tmp_path, capsys):
    folder, path = runs_in(tmp_path / "runs"), tmp_path / "data" / "survey.csv"
    said = make.collect([folder], path, "0123abc")
    assert said == "survey.csv: 2 runs added (0 there already, 1 unfinished or failed left out), 2 in all"
    rows = csv_rows.read(path).set_index("algorithm").to_dict("index")
    mine = rows["FedKDX"]
    own = client_accuracy(folder / "one" / "FedKDX")
    assert 100 * float(mine["pooled"]) == pytest.approx(last_accuracy(folder / "one" / "FedKDX"), abs=0.001)
    assert float(mine["accuracy"]) == pytest.approx(own.mean(), abs=0.00001)
    assert [float(text) for text in mine["client_accuracy"].split(";")] == pytest.approx(own, abs=0.00001)
    assert float(mine["worst"]) == pytest.approx(own.min(), abs=0.00001)
    assert [name.split("=")[0] for name in mine["networks"].split(";")] == ["teacher", "student"]
    assert (mine["experiment"], mine["data"], mine["clients"], mine["names"]) == ("one", "made", "8", "")
    assert (mine["mb_up"], mine["mb_down"], mine["mb_first"], mine["commit"]) == ("3", "6", "1", "0123abc")
    other = rows["FedProx"]
    late = client_accuracy(folder / "one" / "FedProx")[[1, 3]].mean()  # as many windows each, so pooled is the same
    assert other["groups"] == f"late={make.short(late, 5)}/{make.short(late, 5)}"
    assert (other["hyper"], other["options"]) == ("mu=0.5", "late=0.3@1 split=blocked")
    assert mine["seconds"] == "11"  # 0.75 and the number of the round and 1, of three rounds: 11.25


def test_collecting_again_changes_nothing_and_other_numbers_are_refused(tmp_path):
    folder, path = runs_in(tmp_path / "runs"), tmp_path / "survey.csv"
    make.collect([folder], path, "0123abc")
    before = path.read_text()
    assert make.collect([folder], path).startswith("survey.csv: 0 runs added (2 there already")
    assert path.read_text() == before
    make_run(
        tmp_path / "again" / "FedKDX", "FedKDX", skill=2.0, views=("served", "teacher", "student"), train_fraction=0.1
    )
    make_run(tmp_path / "again" / "FedAvg", "FedAvg")
    with pytest.raises(UserError, match=r"FedKDX, made, .*, seed 0: accuracy is [\d.]+ \(commit 0123abc\) and [\d.]+"):
        make.collect([tmp_path / "again"], path)
    assert path.read_text() == before
    with pytest.raises(UserError, match="--commit main: write 7 to 40 hexadecimal digits"):
        make.collect([folder], path, "main")


def test_runs_that_accepted_no_reply_are_left_out_and_counted(tmp_path):
    """Their networks are those that they began with."""
    folder = runs_in(tmp_path / "runs")
    make_run(folder / "one" / "FedAvg", "FedAvg", rejected={0: "not finite", 1: "too long"})
    said = make.collect([folder], tmp_path / "survey.csv")
    assert said == (
        "survey.csv: 2 runs added (0 there already, 1 unfinished or failed left out, 1 in which no reply was accepted "
        "left out), 2 in all"
    )
    assert set(csv_rows.read(tmp_path / "survey.csv")["algorithm"]) == {"FedKDX", "FedProx"}


@pytest.mark.parametrize(("name", "mark"), [("a;b", ";"), ("1..3", "\\.\\."), ("a+b", "\\+")])
def test_a_name_that_would_not_be_found_again_is_refused(tmp_path, name, mark):
    folder = make_run(tmp_path / "runs" / "one", "FedAvg")
    set_subjects(folder, [name, "c"], 0)
    says = rf"one: subject '.*': a name with '{mark}' cannot be kept in a CSV file"
    with pytest.raises(UserError, match=says) as one:
        make.collect([tmp_path / "runs"], tmp_path / "survey.csv")
    assert "\n" not in str(one.value) and not (tmp_path / "survey.csv").exists()


def test_pooled_f1_and_balanced_accuracy():
    pairs = np.array(
        [[[5, 1, 0], [1, 4, 0], [0, 0, 0]], [[3, 1, 0], [2, 3, 0], [0, 0, 0]]]
    )  # 8 2, 3 7; a class nobody has
    run = SimpleNamespace(confusion={"served": pairs})
    f1, balanced = make.of_pairs(run, SimpleNamespace(nonfinite=0))
    assert f1 == pytest.approx((16 / 21 + 14 / 19) / 2)
    assert balanced == pytest.approx((0.8 + 0.7) / 2)
    assert np.isnan(make.of_pairs(run, SimpleNamespace(nonfinite=1))).all()


def test_clients_are_named_by_their_subjects(tmp_path):
    folder = make_run(tmp_path / "run", "FedAvg")
    (folder / "manifest.json").write_text(
        json.dumps({"clients": [{"subjects": {"7": {}}}, {"subjects": {"a": {}, "b": {}}}]})
    )
    run = SimpleNamespace(folder=folder, config={"partition": "subject"})
    assert make.names_of(run) == ["7", "a+b"]
    assert make.names_of(SimpleNamespace(folder=folder, config={"partition": "iid"})) == []


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "all"),
        ({"train_fraction": 0.1}, "tenth"),
        ({"train_fraction": 0.25, "split": "blocked", "exclude_subjects": ["3"], "bn": "local"}, "blocked"),
        ({"train_fraction": 0.25, "split": "blocked", "aggregate": "median"}, "blocked aggregate=median"),
        ({"join_ratio": 0.2, "window": "128 samples"}, "all join_ratio=0.2 window=128samples"),
        ({"train_fraction": 0.1, "late": "0.3@50"}, "late"),
        ({"train_fraction": 0.1, "late": "0.3@20"}, "late=0.3@20 train_fraction=0.1"),
        ({"train_fraction": 0.1, "partition": "dirichlet", "alpha": 0.5}, "Dirichlet 0.5"),
        ({"train_fraction": 0.1, "split": "blocked"}, "split=blocked train_fraction=0.1"),
    ],
)
def test_settings_have_the_protocols_names(options, name):
    assert make.setting_of(options, rounds=100) == name
