"""Tables by class, and metrics of all clients' windows together, from the confusion matrices of the last round."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fedkdx_plugin.engine.evaluation import SERVED
from fedkdx_plugin.reports.sections import Method, Section
from fedkdx_plugin.reports.statistics import spread
from fedkdx_plugin.reports.tables import Cell, Table, number
from fedkdx_plugin.results.runs import Run

Share = Callable[[np.ndarray], float]


def confusion(run: Run) -> np.ndarray:
    """Return the matrix of all clients together in the last round: (true class, predicted class), counts."""
    pooled: np.ndarray = run.confusion[SERVED].sum(axis=0)
    return pooled


def precision(pooled: np.ndarray) -> np.ndarray:
    """Return of each class the share of right ones among what was predicted as it; NaN where nothing was.

    0, as scikit-learn has by default, would be the precision of predictions that are all wrong.
    """
    return _divided(pooled.diagonal(), pooled.sum(axis=0))


def recall(pooled: np.ndarray) -> np.ndarray:
    """Return of each class the share that was recognised; NaN of a class without windows."""
    return _divided(pooled.diagonal(), pooled.sum(axis=1))


def f1(pooled: np.ndarray) -> np.ndarray:
    """Return of each class 2 TP / (2 TP + FP + FN); NaN of a class that is neither there nor predicted."""
    return _divided(2 * pooled.diagonal(), pooled.sum(axis=0) + pooled.sum(axis=1))


def macro_f1(pooled: np.ndarray) -> float:
    """Return the mean of `f1` over the classes that are there or predicted."""
    return _mean(f1(pooled))


def balanced_accuracy(pooled: np.ndarray) -> float:
    """Return the mean of `recall` over the classes that are there."""
    return _mean(recall(pooled))


def kappa(pooled: np.ndarray) -> float:
    """Return Cohen's κ: (observed − expected agreement) / (1 − expected); NaN where chance alone agrees always."""
    total = pooled.sum()
    if not total:
        return float("nan")
    observed = pooled.trace() / total
    expected = float(pooled.sum(axis=0) @ pooled.sum(axis=1)) / total**2
    return float((observed - expected) / (1 - expected)) if expected < 1 else float("nan")


def together(section: Section) -> Table:
    """Return the table of metrics of all clients' windows together; beside macro F1 its mean over clients."""
    heads: dict[str, Share] = {"macro F1 %": macro_f1, "balanced accuracy %": balanced_accuracy, "Cohen's κ": kappa}
    classes = section.first.classes
    if len(classes) == 2:
        positive = classes[1]
        heads |= {
            f"sensitivity % ({positive})": lambda pooled: float(recall(pooled)[1]),
            f"specificity % ({positive})": lambda pooled: float(recall(pooled)[0]),
        }
    rows = []
    for method in section.methods:
        matrices = [confusion(run) for run in method.runs]
        cells = [
            number(spread([share(matrix) for matrix in matrices]), 100 if "%" in head else 1)
            for head, share in heads.items()
        ]
        calibration = spread([run.evaluated[-1].metrics[SERVED].ece for run in method.runs])
        by_client = spread([run.evaluated[-1].metrics[SERVED].f1 for run in method.runs])
        rows.append([Cell(method.name), *cells, number(calibration, 100), number(by_client, 100)])
    pooled = [("all windows together", head) for head in (*heads, "calibration error %")]
    columns = [("", "method"), *pooled, ("mean over clients", "macro F1 %")]
    caption = (
        f"{section.title}: {section.on} windows of all clients together, last round, mean ± standard deviation over "
        "seeds. A client with few of the classes has a low macro F1 of its own where its model also predicts others."
    )
    return Table(f"{section.slug}-together", caption + _left_out(section), columns, rows)


def by_class(section: Section) -> Table:
    """Return the table of precision, recall and F1 of each class."""
    rows = [row for method in section.methods for row in _rows(method)]
    heads = ("method", "class", "windows", "precision %", "recall %", "F1 %")
    caption = (
        f"{section.title}: by class, {section.on} windows of all clients together, last round, mean ± standard "
        "deviation over seeds, of windows the mean alone. A class that is never predicted has no precision and an F1 "
        "of 0, one that is not there no recall; seeds in which that is so are left out of the mean, which then says of "
        "how many it is."
    )
    return Table(f"{section.slug}-by-class", caption + _left_out(section), [("", head) for head in heads], rows)


def _rows(method: Method) -> list[list[Cell]]:
    matrices = [confusion(run) for run in method.runs]
    shares = [np.array([share(matrix) for matrix in matrices]) for share in (precision, recall, f1)]
    windows = np.mean([matrix.sum(axis=1) for matrix in matrices], axis=0)  # each seed may have others
    return [
        [
            Cell(method.name),
            Cell(name),
            Cell(f"{windows[index]:.0f}", float(windows[index])),
            *(number(spread(list(values[:, index])), 100) for values in shares),
        ]
        for index, name in enumerate(method.runs[0].classes)
    ]


def _left_out(section: Section) -> str:
    """Return how many predictions were not finite, and so are in no matrix; '' if all were."""
    missing = sum(run.evaluated[-1].metrics[SERVED].nonfinite for run in section.runs)
    return f" Left out: {missing} predictions that were NaN or infinite." if missing else ""


def _divided(numbers: np.ndarray, by: np.ndarray) -> np.ndarray:
    quotients: np.ndarray = np.divide(numbers, by, out=np.full(len(by), np.nan), where=by > 0)
    return quotients


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")
