"""Whether algorithms learn, on real data: SPAR here, small; UCI-HAR and SLEEP as slow tests (`pytest -m slow`)."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from fedkdx_plugin.cli.main import main
from registry import catalog

NAMES = list(catalog.BUILT_IN["algorithms"])
SOME = ["Local", "FedAvg", "FedFTL", "FedKDX", "FedKDX+", "SCAFFOLD", "FedRep", "pFedMe"]
PERSONAL = ("FedFomo", "FedMTL", "FedMAT", "FedFTL", "FedDistill", "FedKD", "FedKDX")


def accuracies(tmp_path: Path, *argv: str) -> dict[str, float]:
    """Return the final accuracy of every row of a comparison."""
    assert main([*argv, "-dev", "cpu", "-o", str(tmp_path / "runs"), "--data-root", str(tmp_path / "data")]) == 0
    (table,) = tmp_path.glob("runs/*/comparison.csv")
    return {row["algorithm"]: float(row["accuracy"]) for row in csv.DictReader(table.open())}


@pytest.mark.parametrize("names", [SOME, pytest.param(NAMES, marks=pytest.mark.slow)], ids=["some", "all"])
def test_every_algorithm_beats_chance_on_spar(tmp_path, names):
    """Seven exercises: chance is 14 %, always naming the commonest one 17 %."""
    found = accuracies(
        tmp_path,
        *f"-data SPAR -algo {','.join(names)} -m cnn_small -gr 6 -jr 0.4 -ls 4 -lr 0.03 -nc 5".split(),
    )
    assert found.keys() >= set(names)
    assert {name: value for name, value in found.items() if value < 0.3} == {}


@pytest.mark.slow
def test_fedavg_comes_close_to_centralised_where_clients_are_alike(tmp_path):
    found = accuracies(
        tmp_path,
        *"-data SPAR -algo Centralised,FedAvg --partition iid -nc 10 -jr 1 -gr 50".split(),
    )
    assert abs(found["FedAvg"] - found["Centralised"]) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize(("data", "file"), [("UCI-HAR", "UCI HAR Dataset.zip"), ("SLEEP", "SLEEP.zip")])
def test_every_algorithm_learns_real_data(tmp_path, real_data, data, file):
    found = accuracies(tmp_path, "-data", data, "--raw", str(real_data(file)), *"-algo all -jr 0.4 -gr 30".split())
    assert {name: value for name, value in found.items() if value < 0.6} == {}
    ahead = {name: round(100 * (found[name] - found["Local"]), 1) for name in PERSONAL}
    print(f"points ahead of Local on {data}: {ahead}")
