"""Metrics by class and over all windows together, against scikit-learn, and by hand where it has none."""

from __future__ import annotations

import math

import h5py
import numpy as np
import pytest
from sklearn import metrics as sklearn

from dataset_utils.shards import read_manifest
from fedkdx_plugin.reports import classes, data
from fedkdx_plugin.reports.tables import to_csv
from tests.fedkdx_plugin.made_runs import CLASSES, make_run, sections_of


def drawn(seed: int, size: int = 4, windows: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels, predictions and their confusion matrix; the last class is never there nor predicted."""
    rng = np.random.default_rng(seed)
    y = rng.integers(size, size=windows)
    found = np.where(rng.random(windows) < 0.6, y, rng.integers(size, size=windows))
    return y, found, sklearn.confusion_matrix(y, found, labels=range(size + 1))


@pytest.mark.parametrize("seed", range(5))
def test_they_are_scikit_learns(seed):
    y, found, matrix = drawn(seed)
    precision, recall, f1, _ = sklearn.precision_recall_fscore_support(y, found, labels=range(4))
    np.testing.assert_allclose(classes.precision(matrix)[:4], precision)
    np.testing.assert_allclose(classes.recall(matrix)[:4], recall)
    np.testing.assert_allclose(classes.f1(matrix)[:4], f1)
    assert classes.macro_f1(matrix) == pytest.approx(sklearn.f1_score(y, found, average="macro"))
    assert classes.balanced_accuracy(matrix) == pytest.approx(sklearn.balanced_accuracy_score(y, found))
    assert classes.kappa(matrix) == pytest.approx(sklearn.cohen_kappa_score(y, found))


def test_classes_that_are_not_there():
    """By hand: class 0 is recognised once of two times, class 1 never there but predicted once, class 2 neither."""
    matrix = np.array([[1, 1, 0], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(classes.precision(matrix), [1, 0, np.nan])
    np.testing.assert_array_equal(classes.recall(matrix), [0.5, np.nan, np.nan])
    np.testing.assert_allclose(classes.f1(matrix), [2 / 3, 0, np.nan])
    assert classes.macro_f1(matrix) == pytest.approx(1 / 3) and classes.balanced_accuracy(matrix) == 0.5
    assert classes.kappa(matrix) == 0  # observed 1/2, expected (1·2 + 1·0) / 4 = 1/2
    assert math.isnan(classes.kappa(np.array([[3, 0], [0, 0]])))  # all windows of one class, and predicted as it
    assert all(math.isnan(share(np.zeros((2, 2)))) for share in (classes.kappa, classes.macro_f1))


def test_the_tables_pool_clients_and_average_over_seeds(tmp_path):
    folders = [make_run(tmp_path / f"{name}{seed}", name, seed) for name in ("FedAvg", "FedKDX") for seed in (0, 1)]
    (section,) = sections_of(*folders)
    runs = section.methods[0].runs
    matrices = [run.confusion["served"].sum(0) for run in runs]
    together, by_class = classes.together(section), classes.by_class(section)
    assert [row[0].text for row in together.rows] == [method.name for method in section.methods]
    values = [100 * classes.macro_f1(matrix) for matrix in matrices]
    assert together.rows[0][1].value == pytest.approx(np.mean(values))
    assert together.rows[0][1].std == pytest.approx(np.std(values, ddof=1))
    assert [row[1].text for row in by_class.rows] == list(CLASSES) * 2
    assert matrices[0].sum(1).tolist() != matrices[1].sum(1).tolist()
    assert [row[2].value for row in by_class.rows[:3]] == np.mean([matrix.sum(1) for matrix in matrices], 0).tolist()
    expected = 100 * np.mean([classes.recall(matrix)[1] for matrix in matrices])
    assert by_class.rows[1][4].value == pytest.approx(expected)
    assert not any("sensitivity" in head for _, head in together.columns)


def test_a_mean_that_leaves_seeds_out_says_of_how_many_it_is(tmp_path):
    """By hand: 'b' is predicted with the first seed of three alone, 10 times, of which 7 are right.

    Its precision is 7/10 of that seed, its recall (7/10 + 0 + 0)/3, its F1 (14/20 + 0 + 0)/3. All of 'c' is missing
    with the last seed: two of three recalls.
    """
    (section,) = sections_of(*(make_run(tmp_path / str(seed), "FedAvg", seed) for seed in range(3)))
    matrices = (
        [[17, 3, 0], [3, 7, 0], [0, 0, 5]],
        [[20, 0, 0], [10, 0, 0], [1, 0, 4]],
        [[20, 0, 0], [10, 0, 0], [0, 0, 0]],
    )
    for run, matrix in zip(section.methods[0].runs, matrices, strict=True):
        object.__setattr__(run, "confusion", {"served": np.array([matrix])})
    table = classes.by_class(section)
    _, b, c = table.rows
    assert [cell.text for cell in b[3:]] == ["70.00 (1 of 3 seeds)", "23.33 ± 40.41", "23.33 ± 40.41"]
    assert [cell.text for cell in c[3:5]] == ["100.00 ± 0.00 (2 of 3 seeds)", "90.00 ± 14.14 (2 of 3 seeds)"]
    head, *lines = to_csv(table).splitlines()
    names = ["precision %", "precision % std", "precision % seeds", "recall %", "recall % std", "recall % seeds"]
    f1 = ["F1 %", "F1 % std", "F1 % seeds"]  # of 'c' in two seeds
    assert head.split(",") == ["method", "class", "windows", *names, *f1]
    assert [line.split(",")[5] for line in lines] == ["3", "1", "2"]
    assert [line.split(",")[8] for line in lines] == ["3", "3", "2"]


def test_two_classes_have_sensitivity_and_specificity(tmp_path, monkeypatch):
    """Of the second class: recall of it, and of the first."""
    (section,) = sections_of(make_run(tmp_path / "a"), make_run(tmp_path / "b", "FedKDX"))
    for method in section.methods:
        for run in method.runs:
            object.__setattr__(run, "classes", ("healthy", "seizure"))
            object.__setattr__(run, "confusion", {"served": np.array([[[90, 10], [5, 15]]])})
    table = classes.together(section)
    found = {head: cell.value for (_, head), cell in zip(table.columns, table.rows[0], strict=True)}
    assert found["sensitivity % (seizure)"] == pytest.approx(75)
    assert found["specificity % (seizure)"] == pytest.approx(90)


def test_calibration_is_of_all_windows_and_missing_from_older_runs(tmp_path):
    folders = [make_run(tmp_path / f"FedAvg{seed}", "FedAvg", seed) for seed in (0, 1)]
    with h5py.File(folders[0] / "results.h5", "a") as file:
        right = 100 * file["views/served/ece"][-1]
        assert 0 < right < 100
    (section,) = sections_of(*folders, make_run(old := tmp_path / "old", "FedKDX"))
    values = [100 * run.evaluated[-1].metrics["served"].ece for run in section.methods[0].runs]
    place = [head for _, head in classes.together(section).columns].index("calibration error %")
    assert values[0] == right and values[0] != values[1]
    assert classes.together(section).rows[0][place].value == pytest.approx(np.mean(values))
    with h5py.File(old / "results.h5", "a") as file:
        del file["views/served/ece"]
    (section,) = sections_of(*folders, old)
    assert [row[place].text for row in classes.together(section).rows][1] == "–"


@pytest.mark.parametrize(("fraction", "says"), [(0.25, "0.25 of each client's"), (1, None)])
def test_the_data_card_says_what_share_of_the_training_windows_is_used(shard_folder, fraction, says):
    """Else it says '3605 windows cut, nothing left out' beside a table of 1441."""
    manifest = read_manifest(shard_folder)
    manifest["spec"] = {**(manifest.get("spec") or {}), "train_fraction": fraction}
    text = data._made(manifest).get("training windows")
    assert text is None if says is None else text.startswith(says)
