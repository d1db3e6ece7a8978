"""Hints after a comparison are given where the runs themselves say so, and never from test windows."""

from __future__ import annotations

import h5py
import numpy as np
import pytest

from fedkdx_plugin.experiments.hints import hints
from fedkdx_plugin.results.runs import read
from tests.fedkdx_plugin.made_runs import make_run

VALIDATION = {"evaluated_on": "validation"}


def made(folder, gain, data, seed=0, algorithm="FedKDX+"):
    """Return a run whose student's accuracy at each client is by `gain` above that of what clients use."""
    run = make_run(folder, algorithm, seed, views=("served", "student"), data=data)
    with h5py.File(run / "results.h5", "a") as file:
        file["views/student/client_accuracy"][-1] = file["views/served/client_accuracy"][-1] + gain
        file["views/student/accuracy"][-1] = file["views/served/accuracy"][-1] + np.mean(gain)
    return read(run)


def test_a_network_that_is_better_at_every_client_is_named(tmp_path):
    runs = [made(tmp_path / str(seed), 0.05, VALIDATION, seed) for seed in (0, 1)]
    (hint,) = hints(runs)
    assert hint == (
        "FedKDX+: its network 'student' alone is better on validation windows, by 5.0 points, mean over clients"
    )


def test_clients_that_are_others_with_each_seed_give_no_hint_before_six_seeds(tmp_path):
    def hints_of(seeds):
        data = [VALIDATION | {"manifest_sha256": f"{seed}" * 64} for seed in range(seeds)]
        runs = [made(tmp_path / f"{seeds}-{seed}", 0.05, data[seed], seed) for seed in range(seeds)]
        return hints(runs)

    assert hints_of(2) == []
    (hint,) = hints_of(6)
    assert hint.endswith("by 5.0 points, mean over seeds")


@pytest.mark.parametrize(
    ("gain", "data"),
    [
        (0.05, None),  # test windows must not choose
        (0.005, VALIDATION),  # too little
        (-0.05, VALIDATION),
        ([0.2, 0.2, -0.1, -0.1, -0.1, 0.1, -0.1, 0.1], VALIDATION),  # here and there
    ],
)
def test_no_hint_without_a_clear_reason(tmp_path, gain, data):
    assert hints([made(tmp_path / "0", gain, data)]) == []


def test_methods_with_other_tuned_values_are_named_once(tmp_path, monkeypatch):
    tuned = {
        "FedMTL": {"lam": 0.005},
        "FedProx": {"mu": 0.01},
        "MOON": {"mu": 0.3},
        "Local": {"local_learning_rate": 0.05},
    }
    monkeypatch.setattr("fedkdx_plugin.experiments.hints.read_preset", {"tuned": tuned}.get)
    runs = [
        make_run(tmp_path / "a", "FedMTL", 0, preset="paper", hyper={"lam": 99.0}),
        make_run(tmp_path / "b", "FedMTL", 1, preset="paper", hyper={"lam": 99.0}),
        make_run(tmp_path / "c", "FedProx", preset="paper", hyper={"mu": 0.01}),  # which are the defaults
        make_run(tmp_path / "d", "FedAvg", preset="paper"),  # has none
        make_run(tmp_path / "e", "MOON", preset="tuned", hyper={"mu": 99.0}),  # was asked for
        make_run(tmp_path / "f", "Local", 0, preset="paper", local_learning_rate=0.01),
        make_run(
            tmp_path / "g", "Local", 1, preset="paper", local_learning_rate=0.02
        ),  # would hold with the preset, too
    ]
    (hint,) = hints([read(run) for run in runs])
    assert hint.startswith("--preset tuned has other hyper-parameters for FedMTL, Local, chosen on validation windows")
    assert hints([read(runs[-1])]) == []
