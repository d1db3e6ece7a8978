"""Every figure against scikit-learn, and the cases that scikit-learn leaves undefined."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score, log_loss, recall_score, roc_auc_score

from fedkdx_plugin.engine.metrics import evaluate
from tests.bounds import gamma


def make(sizes, classes, seed=0, digits=None, present=None):
    """Unequal clients in mixed order; `digits` rounds logits so that they tie; `present` limits a client's classes."""
    rng = np.random.default_rng(seed)
    client = np.repeat(np.arange(len(sizes)), sizes)
    y = np.array([rng.integers(present[k] if present else classes) for k in client], dtype=np.int64)
    logits = rng.normal(size=(len(y), classes)).astype(np.float32)
    logits[np.arange(len(y)), y] += 0.8
    if digits is not None:
        logits = logits.round(digits)
    order = rng.permutation(len(y))
    return logits[order], y[order], client[order]


def of(logits, y, client, clients):
    return evaluate(torch.from_numpy(logits), torch.from_numpy(y), torch.from_numpy(client), clients)


def by_scikit_learn(logits, y, classes):
    """accuracy, F1, recall, micro AUC, macro AUC, loss and confusion matrix of one client."""
    predicted = logits.argmax(1)
    p = torch.softmax(torch.from_numpy(logits).double(), 1).numpy()
    score, one_hot = p.astype(np.float32), np.eye(classes, dtype=int)[y]
    mixed = [c for c in range(classes) if 0 < one_hot[:, c].sum() < len(y)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # labels missing on one side, which is the point
        return (
            accuracy_score(y, predicted),
            f1_score(y, predicted, average="macro", zero_division=0),
            recall_score(y, predicted, average="macro", zero_division=0),
            roc_auc_score(one_hot, score, average="micro"),
            np.mean([roc_auc_score(one_hot[:, c], score[:, c]) for c in mixed]) if mixed else np.nan,
            log_loss(y, p, labels=range(classes)),
            confusion_matrix(y, predicted, labels=range(classes)),
        )


CASES = {
    "unequal": {"sizes": [40, 7, 120, 23], "classes": 6},
    "two classes": {"sizes": [30, 11], "classes": 2},
    "three classes": {"sizes": [30, 1, 2], "classes": 3},
    "ties": {"sizes": [50, 60, 9], "classes": 5, "digits": 0},
    "absent classes": {"sizes": [40, 30, 20, 25], "classes": 12, "present": [1, 2, 5, 12]},
    "single samples": {"sizes": [1, 1, 1, 5], "classes": 4},
}


@pytest.mark.parametrize("case", CASES)
def test_all_figures_are_scikit_learns(case):
    sizes, classes = np.array(CASES[case]["sizes"]), CASES[case]["classes"]
    logits, y, client = make(**CASES[case])
    got = of(logits, y, client, len(sizes))
    rows = [by_scikit_learn(logits[client == k], y[client == k], classes) for k in range(len(sizes))]
    accuracy, f1, recall, auc, auc_macro, loss, confusion = (np.array(column) for column in zip(*rows, strict=True))
    ranked = ~np.isnan(auc_macro)

    per_client = {"accuracy": accuracy, "f1": f1, "recall": recall, "auc": auc, "auc_macro": auc_macro, "loss": loss}
    for name, expected in per_client.items():
        np.testing.assert_allclose(getattr(got, f"client_{name}"), expected, rtol=1e-9, err_msg=name)
    np.testing.assert_array_equal(got.confusion, confusion)
    np.testing.assert_array_equal(got.client_samples, sizes)
    overall = {
        "accuracy": accuracy_score(y, logits.argmax(1)),
        "f1": f1.mean(),
        "recall": recall.mean(),
        "auc": np.average(auc, weights=sizes),
        "auc_macro": np.average(auc_macro[ranked], weights=sizes[ranked]),
        "loss": np.average(loss, weights=sizes),
        "accuracy_std": accuracy.std(),
        "accuracy_worst": accuracy.min(),
    }
    for name, expected in overall.items():
        np.testing.assert_allclose(getattr(got, name), expected, rtol=1e-9, err_msg=name)
    assert got.worst_client == accuracy.argmin() and got.nonfinite == 0


def by_guo(logits, y):
    """Σ_m |B_m| / n · |acc(B_m) − conf(B_m)| over 15 bins ((m − 1)/15, m/15]."""
    p = torch.softmax(torch.from_numpy(logits).double(), 1).numpy()
    confidence, right = p.max(1), p.argmax(1) == y
    error = 0.0
    for m in range(1, 16):
        inside = (confidence > (m - 1) / 15) & (confidence <= m / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    return error


@pytest.mark.parametrize("case", CASES)
def test_calibration_error_is_its_formula_over_all_samples_together(case):
    logits, y, client = make(**CASES[case])
    got = of(2 * logits, y, client, len(CASES[case]["sizes"]))
    assert got.ece == pytest.approx(by_guo(2 * logits, y), rel=1e-9) and got.ece > 0
    assert got.client_gaps.shape == (len(CASES[case]["sizes"]), 15)
    for k in range(len(got.client_gaps)):
        own = client == k
        assert np.abs(got.client_gaps[k]).sum() / own.sum() == pytest.approx(by_guo(2 * logits[own], y[own]), rel=1e-9)


def test_calibration_error_by_hand():
    """Ten predictions at 0.8 of which eight are right are calibrated; of which five are right, they are off by 0.3."""
    logits = torch.tensor([[0.8, 0.2]]).log().expand(10, 2)
    for right, expected in ((8, 0.0), (5, 0.3)):
        y = (torch.arange(10) >= right).long()
        assert evaluate(logits, y, torch.zeros(10).long(), 1).ece == pytest.approx(expected, abs=1e-6)
    bad = torch.cat([logits, torch.tensor([[torch.nan, 0.0]])])
    left_out = evaluate(bad, torch.cat([y, torch.tensor([0])]), torch.zeros(11).long(), 1)
    assert left_out.ece == pytest.approx(0.3, abs=1e-6) and left_out.nonfinite == 1
    assert np.isnan(evaluate(logits[:0], y[:0], y[:0], 1).ece)


def test_large_logits_tie_as_single_precision_probabilities_do():
    logits, y, client = make([200, 50], 6, digits=1)
    got = of(logits * 40, y, client, 2)
    for k in range(2):
        expected = by_scikit_learn(logits[client == k] * 40, y[client == k], 6)
        np.testing.assert_allclose([got.client_auc[k], got.client_auc_macro[k]], expected[3:5], rtol=1e-9)


def test_a_client_without_test_samples_counts_in_no_mean():
    logits, y, client = make([20, 30], 4)
    plain = of(logits, y, client, 2)
    spaced = of(logits, y, client * 2, 4)
    for name in ("accuracy", "f1", "recall", "auc", "auc_macro", "loss", "ece", "accuracy_std", "accuracy_worst"):
        assert getattr(spaced, name) == getattr(plain, name), name
    assert np.isnan(spaced.client_accuracy[[1, 3]]).all() and np.isnan(spaced.client_loss[[1, 3]]).all()
    assert spaced.worst_client == plain.worst_client * 2


def test_clients_of_one_class_have_no_macro_auc():
    logits = torch.randn(4, 3)
    only = evaluate(logits, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 1]), 2)
    assert np.isnan(only.client_auc_macro).all() and np.isnan(only.auc_macro)
    assert np.isfinite(only.auc)
    half = evaluate(logits, torch.tensor([0, 0, 1, 2]), torch.tensor([0, 0, 1, 1]), 2)
    assert half.auc_macro == half.client_auc_macro[1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_logits_are_wrong_and_counted(bad):
    logits, y, client = make([20, 30], 4)
    logits[np.arange(len(y)), y] += 10  # all right
    worst = int(np.flatnonzero(client == 1)[0])
    assert of(logits, y, client, 2).accuracy == 1
    logits[worst, 2] = bad
    got = of(logits, y, client, 2)
    assert got.nonfinite == 1
    assert got.not_finite == f"1 of {len(y)} predictions were NaN or infinite and count as wrong"
    assert got.client_accuracy.tolist() == [1, 29 / 30] and got.worst_client == 1
    assert np.isnan(got.loss) and np.isnan(got.client_loss[1]) and np.isfinite(got.client_loss[0])
    assert got.client_recall[1] < 1 and got.client_f1[1] < 1 and got.client_auc[1] < 1
    assert got.confusion.sum() == 49


def test_nothing_finite_and_nothing_at_all():
    broken = evaluate(torch.full((6, 3), torch.nan), torch.tensor([0, 1, 2, 0, 1, 2]), torch.zeros(6).long(), 1)
    assert (broken.accuracy, broken.f1, broken.recall, broken.nonfinite) == (0, 0, 0, 6)
    assert broken.auc == 0.5 and broken.auc_macro == 0.5 and np.isnan(broken.loss)
    empty = evaluate(torch.zeros(0, 3), torch.zeros(0).long(), torch.zeros(0).long(), 2)
    assert np.isnan([empty.accuracy, empty.f1, empty.auc, empty.loss, empty.accuracy_std]).all()
    assert empty.worst_client == -1 and empty.nonfinite == 0 and empty.not_finite == ""


def test_order_of_samples_changes_nothing_but_rounding_of_the_loss():
    logits, y, client = make([20, 30, 9], 4)
    back = np.arange(len(y))[::-1].copy()
    first, second = of(logits, y, client, 3), of(logits[back], y[back], client[back], 3)
    for name in ("accuracy", "f1", "recall", "auc", "auc_macro"):
        assert getattr(first, name) == getattr(second, name)
    roundings = 2 * (len(y) + 8)  # of two sums of numbers above 0, each of which has some of its own
    assert first.loss == pytest.approx(second.loss, rel=gamma(roundings, torch.float64))
