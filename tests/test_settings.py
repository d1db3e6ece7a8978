"""Comparisons with clients set apart and on validation windows, from the command line to the files."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import h5py
import pytest
import yaml

from dataset_utils.generate import prepare
from dataset_utils.shards import load
from fedkdx_plugin.cli.main import main
from fedkdx_plugin.configuration.config import from_dict
from fedkdx_plugin.experiments import runner
from tests.dataset_utils.synthetic import Synthetic
from tests.test_cli import RUN, fails


def test_the_line_of_a_run_says_how_many_subjects_fewer_clients_leave_out(tmp_path):
    """Of three subjects, with shards that were there before, too, of which nothing else is said."""
    options = {"data": "Synthetic", "data_root": str(tmp_path)}
    for clients, says in (
        (1, "1 clients (2 more subjects left out by -nc), "),
        (2, "2 clients (1 more subject left out by -nc), "),
        (3, "3 clients, "),
    ):
        config = from_dict(options | {"num_clients": clients}, "")
        for _ in range(2):
            folder = prepare(config.shards, tmp_path, None, False, print, Synthetic())
            assert runner._described(load(folder), config).startswith(says)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_clients_set_apart_have_figures_of_their_own(shard_folder, capsys):
    argv = ["-data", str(shard_folder), "-algo", "Local,FedKDX", *RUN, "-jr", "1", "--unseen", "1", "--late", "0.5@2"]
    assert main(argv) == 0
    assert "3 clients, 1 of them unseen, 1 of them late" in capsys.readouterr().out
    (folder,) = Path("runs").iterdir()
    table = {row["algorithm"]: row for row in csv.DictReader((folder / "comparison.csv").open())}
    assert {"Local", "FedKDX", "FedKDX (unseen)"} <= table.keys() and "Local (unseen)" not in table
    assert "FedKDX (teacher)" not in table  # by now it serves everybody who is not unseen
    assert table["FedKDX (unseen)"]["late clients"] == "" and 0 <= float(table["Local"]["late clients"]) <= 1
    (line,) = [line for line in (folder / "comparison.md").read_text().splitlines() if "FedKDX (unseen)" in line]
    assert "–" in line
    rows = list(csv.DictReader((folder / "FedKDX-seed0" / "metrics.csv").open()))
    with h5py.File(folder / "FedKDX-seed0" / "results.h5") as results:
        unseen, late = (results[f"groups/{name}"][0] for name in ("unseen", "late"))
        assert not results["selected"][:, unseen].any() and not results["selected"][0, late]
        assert float(rows[-1]["late_accuracy"]) == results["views/served/client_accuracy"][-1, late]
        assert float(rows[-1]["unseen_accuracy"]) == results["views/unseen/client_accuracy"][-1, unseen]
    config = yaml.safe_load((folder / "experiment.yaml").read_text())["base"]
    assert (config["unseen"], config["late"], config["rare"]) == (1.0, "0.5@2", None)


def test_validation_is_named_wherever_its_figures_are(shard_folder, capsys):
    manifest = json.loads((shard_folder / "manifest.json").read_text()) | {"spec": {"evaluate_on": "validation"}}
    folder = Path("tuning").absolute()
    shutil.copytree(shard_folder, folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "holds validation windows" in fails(capsys, "-data", str(folder), *RUN)
    argv = ["-data", str(folder), "-algo", "FedAvg", *RUN, "--evaluate-on", "validation"]
    assert main(argv) == 0
    assert main([*argv, "-go", "mine"]) == 0
    assert "36 validation windows" in capsys.readouterr().out
    first, second = sorted(Path("runs").iterdir(), key=lambda path: "mine" in path.name)
    assert first.name.startswith("made-cnn_small-validation-")
    assert second.name.startswith("made-cnn_small-mine-validation-")
    assert (first / "comparison.md").read_text().startswith("Measured on validation windows")
    assert next(csv.DictReader((first / "comparison.csv").open()))["evaluated on"] == "validation"
    run = first / "FedAvg-seed0"
    assert json.loads((run / "environment.json").read_text())["data"]["evaluated_on"] == "validation"
    with h5py.File(run / "results.h5") as results:
        assert results.attrs["evaluated_on"] == "validation"
        assert "rs_validation_acc" in results and "rs_test_acc" not in results
