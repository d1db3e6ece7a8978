"""The comparison table: what its rows are means of."""

from __future__ import annotations

import dataclasses

import h5py
import numpy as np
import pytest

from fedkdx_plugin import load_runs
from fedkdx_plugin.reports import comparison_table
from tests.fedkdx_plugin.made_runs import make_run, sections_of


def test_a_network_has_a_row_for_every_seed_or_none(tmp_path):
    """With seed 1 the network predicts as the method does, so that its row is the method's there."""
    folders = [make_run(tmp_path / str(seed), "FedKDX", seed, views=("served", "student")) for seed in (0, 1, 2)]
    (section,) = sections_of(*folders)
    runs = list(section.methods[0].runs)
    last = runs[1].records[-1]
    same = dict.fromkeys(last.metrics, last.metrics["served"])
    runs[1] = dataclasses.replace(runs[1], records=[*runs[1].records[:-1], dataclasses.replace(last, metrics=same)])
    names = [(row.name, row.seed) for row in comparison_table.of_seeds(runs)]
    shown = runs[0].name
    assert names == [(name, seed) for seed in (0, 1, 2) for name in (shown, f"{shown} (student)")]
    own, student = (
        [row for row in comparison_table.of_seeds(runs) if row.name == n] for n in (shown, f"{shown} (student)")
    )
    assert student[1].values["accuracy"] == own[1].values["accuracy"]
    text = comparison_table.markdown(comparison_table.of_seeds(runs))
    mean = 100 * np.mean([row.values["accuracy"] for row in student])
    assert f"{mean:.2f} ± " in next(line for line in text.splitlines() if "(student)" in line)


def test_runs_that_other_sites_measured_are_said_below_the_table(tmp_path):
    names = ("FedAvg", "FedKDX")
    (section,) = sections_of(*(make_run(tmp_path / f"{name}-seed0", name) for name in names))
    runs = []
    for method, away in zip(section.methods, ([1, 3], []), strict=True):
        (run,) = method.runs
        last = run.records[-1]
        counts = last.metrics["served"].client_samples.copy()
        counts[away] = 0
        last = dataclasses.replace(
            last, metrics={"served": dataclasses.replace(last.metrics["served"], client_samples=counts)}
        )
        environment = {**run.environment, "data": {**run.data, "sites": {}}}
        runs.append(dataclasses.replace(run, records=[*run.records[:-1], last], environment=environment))
    text = " ".join(comparison_table.remarks(*runs))
    first, second = (run.name for run in runs)
    assert text == (
        "Not all runs were measured by the same sites, so their metrics are of different windows: "
        f"{first} (seed 0) by 0, 2, 4, 5, 6, 7; {second} (seed 0) by 0, 1, 2, 3, 4, 5, 6, 7."
    )
    assert comparison_table.remarks(runs[0], runs[0]) == []


def test_predictions_that_are_not_finite_are_said_below_the_table(tmp_path):
    """Eight clients have 20 windows each; seed 1 of FedKDX is as it should be, and so is all before the last round."""
    views = ("served", "student")
    for seed in (0, 1):
        folder = make_run(tmp_path / f"FedKDX-seed{seed}", "FedKDX", seed, views=views)
        with h5py.File(folder / "results.h5", "a") as file:
            file["views/served/nonfinite"][:] = [7, 7, 40 if seed == 0 else 0]
            file["views/student/nonfinite"][-1] = 3 if seed == 0 else 0
    folder = make_run(tmp_path / "Local-seed0", "Local")
    with h5py.File(folder / "results.h5", "a") as file:
        file["views/served/nonfinite"][-1] = 160
    wanted = [
        "FedKDX seed 0: 40 of 160 predictions were NaN or infinite and count as wrong (last round).",
        "FedKDX seed 0 (student): 3 of 160 predictions were NaN or infinite and count as wrong (last round).",
        "Local seed 0: 160 of 160 predictions were NaN or infinite and count as wrong (last round).",
    ]
    results = load_runs(tmp_path)
    assert [line for line in results.write().splitlines() if "infinite" in line] == wanted
    (section,) = sections_of(*(run.folder for run in results.runs))
    assert [note for note in section.notes if "infinite" in note] == wanted


@pytest.mark.parametrize(
    ("differing", "names"),
    [
        (
            ({"student_model": "cnn"}, {"student_model": "cnn_small"}),
            ["FedKD student_model=cnn", "FedKD student_model=cnn_small"],
        ),
        (
            ({"local_learning_rate": 0.01}, {"local_learning_rate": 0.05}),
            ["FedKD local_learning_rate=0.01", "FedKD local_learning_rate=0.05"],
        ),
    ],
)
def test_variants_of_one_method_are_no_seeds_of_it(tmp_path, differing, names):
    """Not in the table, nor in the data frame, nor in the plot: a mean over two students would be of nothing."""
    for n, config in enumerate(differing):
        make_run(tmp_path / "all" / str(n), "FedKD", 0, skill=1.0 + n, **config)
    results = load_runs(tmp_path / "all")
    assert [row.name for row in comparison_table.of_seeds(results.runs)] == names
    assert "±" not in comparison_table.markdown(comparison_table.of_seeds(results.runs))
    assert list(results.table.reset_index()["method"]) == names and set(results.table["seeds"]) == {1}
    labels = [line.get_label() for line in results.plot().axes[0].get_lines()]
    assert labels == names


def test_a_seed_without_a_value_is_left_out_of_the_mean_and_said_to_be():
    """Of 50, 70 and none: 60, and a deviation of the root of (100 + 100) / 1. No seed has a value: there is no mean."""
    values = [{"accuracy": 0.5, "auc": np.nan}, {"accuracy": np.nan, "auc": np.nan}, {"accuracy": 0.7, "auc": np.nan}]
    text = comparison_table.markdown([comparison_table.Row("A", seed, own) for seed, own in enumerate(values)])
    assert [cell.strip() for cell in text.splitlines()[2].split("|")] == [
        "",
        "A",
        "60.00 ± 14.14 (2 of 3 seeds)",
        "–",
        "",
    ]
