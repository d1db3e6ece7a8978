"""Algorithms on a checkout of PFLlib: its data are read safely, and its scripts find the results."""

from __future__ import annotations

import json
import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from fedkdx_plugin.api import load_runs
from fedkdx_plugin.pfllib import main
from tests.dataset_utils.test_pfllib import Hostile, put

SIZES = (12, 8, 16)
COMMON = ["-m", "cnn_small", "-gr", "3", "-dev", "cpu", "-lbs", "4", "--backend", "sequential"]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """Make a folder of PFLlib's layout with a data set of three clients and three classes."""
    monkeypatch.chdir(tmp_path)
    rng, folder = np.random.default_rng(0), tmp_path / "PFLlib" / "dataset" / "HAR"
    for k, size in enumerate(SIZES):
        for part, count in (("train", size), ("test", 6)):
            y = np.arange(count) % 3
            put(folder, part, k, {"x": rng.normal(size=(count, 2, 1, 32)) + y[:, None, None, None], "y": y})
    stated(folder, num_clients=3, num_classes=3)
    return tmp_path / "PFLlib"


def stated(folder: Path, **numbers: int) -> None:
    (folder / "config.json").write_text(json.dumps({"partition": "pat", "alpha": 0.1} | numbers))


def best(checkout: Path, data: str, algorithm: str, goal: str, times: int) -> tuple[float, float]:
    """Return mean and standard deviation of the best accuracy, from what PFLlib's own script reads."""
    found = []
    for time in range(times):
        with h5py.File(checkout / "results" / f"{data}_{algorithm}_{goal}_{time}.h5") as file:
            found.append(np.array(file.get("rs_test_acc")).max())
    return float(np.mean(found)), float(np.std(found))


def test_results_are_where_pfllib_reads_them(checkout, capsys):
    argv = [str(checkout), "-data", "HAR", "-algo", "FedAvg,FedKDX", "-t", "2", "--seed", "5", "-go", "trial", *COMMON]
    assert main(argv) == 0
    runs = {(run.algorithm, run.seed): run for run in load_runs("runs").runs}
    assert runs.keys() == {(name, seed) for name in ("FedAvg", "FedKDX") for seed in (5, 6)}
    for (name, seed), run in runs.items():
        with (
            h5py.File(checkout / "results" / f"HAR_{name}_trial_{seed - 5}.h5") as ours,
            h5py.File(run.folder / "results.h5") as kept,
        ):
            for dataset in ("rs_test_acc", "rs_test_auc", "rs_train_loss"):
                assert ours[dataset].shape == (3,)
                np.testing.assert_array_equal(ours[dataset], kept[dataset])
    mean, _ = best(checkout, "HAR", "FedKDX", "trial", 2)
    assert mean == np.mean([max(r.metrics["served"].accuracy for r in runs["FedKDX", s].records) for s in (5, 6)])
    assert [int(n) for n in runs["FedKDX", 5].records[-1].metrics["served"].client_samples] == [6, 6, 6]
    assert "3 clients, 36 training and 18 test windows, 3 classes" in capsys.readouterr().out


def test_the_same_command_goes_on_and_makes_nothing_twice(checkout, capsys):
    argv = [str(checkout), "-data", "HAR", "-algo", "FedAvg", *COMMON]
    assert main(argv) == 0
    (first,) = Path("runs").rglob("results.h5")
    before, file = first.stat().st_mtime_ns, checkout / "results" / "HAR_FedAvg_test_0.h5"
    file.unlink()
    assert main(argv) == 0
    assert first.stat().st_mtime_ns == before and file.exists()
    assert "1 run, 1 of them done" in capsys.readouterr().out
    assert main([*argv, "-lr", "0.5"]) == 2  # other options under the same goal
    assert "of another run" in capsys.readouterr().err


def fails(capsys, *argv: str) -> str:
    assert main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "\n" not in error
    return error


def test_a_result_of_pfllibs_own_is_never_replaced(checkout, capsys):
    path = checkout / "results" / "HAR_FedAvg_test_0.h5"
    path.parent.mkdir()
    with h5py.File(path, "w") as file:
        file["rs_test_acc"] = np.ones(4)
    before = path.read_bytes()
    assert "give another goal (-go)" in fails(capsys, str(checkout), "-data", "HAR", "-algo", "FedAvg", *COMMON)
    assert path.read_bytes() == before and not Path("runs").exists()


def test_nothing_in_a_pickle_is_run(checkout, tmp_path, capsys):
    put(checkout / "dataset" / "HAR", "train", 1, {"x": Hostile(tmp_path / "trap"), "y": np.zeros(3)})
    assert "1.npz" in fails(capsys, str(checkout), "-data", "HAR", *COMMON)
    assert not (tmp_path / "trap").exists()


def test_what_does_not_fit_is_told(checkout, capsys):
    folder = checkout / "dataset" / "HAR"
    run = (str(checkout), "-data", "HAR", "-algo", "Local", *COMMON)
    assert "no data set '' there" in fails(capsys, str(checkout))
    assert "no data set 'MNIST' there" in fails(capsys, str(checkout), "-data", "MNIST")
    stated(folder, num_clients=2, num_classes=3)
    assert "3 clients, and config.json says 2" in fails(capsys, *run)
    stated(folder, num_clients=3, num_classes=2)
    assert "a label is 2, and config.json says 2 classes" in fails(capsys, *run)
    (folder / "config.json").write_text("{")
    assert "config.json" in fails(capsys, *run)
    stated(folder, num_clients=3, num_classes=4)
    assert main(run) == 0
    assert "no window has a label from 3 to 3" in capsys.readouterr().err
    put(folder, "train", 0, {"x": np.zeros((6, 2, 1, 32)), "y": np.arange(6) % 3})
    assert "of other files than" in fails(capsys, *run)


def test_a_real_checkout(tmp_path, monkeypatch):
    """Its data set HAR or PAMAP2, generated before; one round, and results in a copy of its layout."""
    if not (given := os.environ.get("PFLLIB")):
        pytest.skip("set PFLLIB to a checkout of PFLlib with a generated HAR or PAMAP2")
    monkeypatch.chdir(tmp_path)
    names = [name for name in ("HAR", "PAMAP2") if (Path(given) / "dataset" / name / "train").is_dir()]
    assert names, f"{given}: generate HAR or PAMAP2 first"
    copy = tmp_path / "PFLlib"
    copy.mkdir()
    (copy / "dataset").symlink_to(Path(given).absolute() / "dataset")
    assert main([str(copy), "-data", names[0], "-algo", "FedAvg", *COMMON[:2], "-gr", "1", "-dev", "cpu"]) == 0
    assert 0 <= best(copy, names[0], "FedAvg", "test", 1)[0] <= 1
