"""Test metrics of all clients at once, from their logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

FIGURES = ("samples", "accuracy", "f1", "recall", "auc", "auc_macro", "loss")  # as `Metrics.client_...`
BINS = 15  # of confidence, as in Guo et al. 2017


@dataclass(frozen=True)
class Metrics:
    """Metrics of the clients' models on the clients' own test windows.

    Shares are in [0, 1]. Clients without test samples are NaN in the arrays and count in no mean; a metric that is
    defined for no client is NaN. A sample with a NaN or infinite logit counts as wrong for every class: its prediction
    is wrong, all its probabilities are taken as 0, and losses that include it are NaN.

    Attributes:
        accuracy: over all test samples.
        f1: macro F1 of a client as scikit-learn has it (over the classes present in labels or predictions, 0
            where undefined), mean over clients.
        recall: macro recall, likewise.
        auc: area under the ROC curve of all (sample, class) pairs of a client, one class against the rest
            (micro-average), mean over clients weighted by test size.
        auc_macro: mean over the classes of which a client has positives and negatives, weighted likewise
            over the clients that have such a class.
        loss: cross-entropy, mean over all test samples.
        ece: expected calibration error of all samples together, Σ_b |Σ_{i in b} (right_i − confidence_i)| / n, with
            15 bins of equal width (Guo et al. 2017, arXiv:1706.04599); without the non-finite samples.
        accuracy_std: standard deviation of accuracy over clients (of the population, ddof 0).
        accuracy_worst, worst_client: the lowest accuracy of a client, and its id (the first such; -1 for none).
        nonfinite: samples with a NaN or infinite logit.
        client_samples: (clients,), int64, test samples.
        client_accuracy, client_f1, client_recall, client_auc, client_auc_macro, client_loss: (clients,),
            float64.
        client_gaps: (clients, bins), float64: Σ (right_i − confidence_i) over a client's samples in a bin.
        confusion: (clients, classes, classes), int64: true class by predicted class, without the non-finite
            samples.
    """

    accuracy: float
    f1: float
    recall: float
    auc: float
    auc_macro: float
    loss: float
    ece: float
    accuracy_std: float
    accuracy_worst: float
    worst_client: int
    nonfinite: int
    client_samples: np.ndarray
    client_accuracy: np.ndarray
    client_f1: np.ndarray
    client_recall: np.ndarray
    client_auc: np.ndarray
    client_auc_macro: np.ndarray
    client_loss: np.ndarray
    client_gaps: np.ndarray
    confusion: np.ndarray

    @property
    def not_finite(self) -> str:
        """Say how many predictions were NaN or infinite; '' where none was."""
        if not self.nonfinite:
            return ""
        return f"{self.nonfinite} of {self.client_samples.sum()} predictions were NaN or infinite and count as wrong"

    def accuracy_of(self, clients: Sequence[int]) -> float:
        """Return the accuracy over all test samples of some clients; NaN if they have none."""
        ids = [id for id in clients if self.client_samples[id]]
        return _mean(self.client_accuracy[ids], self.client_samples[ids])


def evaluate(logits: Tensor, y: Tensor, client: Tensor, clients: int) -> Metrics:
    """Compute all `Metrics` on the device of the logits, and fetch them together.

    Args:
        logits: (n, classes), each row by the model that its client would use.
        y: (n,), int64, true classes in [0, classes).
        client: (n,), int64, client of each row, in [0, clients), in any order.
        clients: number of clients.
    """
    return evaluate_views([logits], y, client, clients)[0]


def evaluate_views(views: Sequence[Tensor], y: Tensor, client: Tensor, clients: int) -> list[Metrics]:
    """Compute the `Metrics` of several models' logits on the same samples together (see `evaluate`).

    The clients of each view are treated as separate clients until the results are divided by view.
    """
    count = len(views)
    logits, y = torch.cat(list(views)), y.repeat(count)
    offset = clients * torch.arange(count, device=client.device)
    client = (client + offset.unsqueeze(1)).flatten()
    table, confusion, nonfinite = _tables(logits, y, client, count * clients)
    own = nonfinite.reshape(count, clients).sum(1)
    return [
        summary(table[:, part], confusion[part], int(missing))
        for part, missing in zip((slice(k * clients, (k + 1) * clients) for k in range(count)), own, strict=True)
    ]


def _tables(logits: Tensor, y: Tensor, client: Tensor, clients: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return each client's metrics, confusion, and number of samples with a non-finite logit (see `summary`)."""
    classes = logits.shape[1]
    finite = logits.isfinite().all(1)
    known = torch.where(finite.unsqueeze(1), logits, 0).double()

    own_class = client * classes + y
    support = _count(own_class, clients * classes).view(clients, classes)
    samples = support.sum(1)
    cells = own_class * classes + known.argmax(1)
    pairs = _count(cells, clients * classes**2, finite).view(clients, classes, classes)
    hits = pairs.diagonal(dim1=1, dim2=2).double()
    seen = support + pairs.sum(1)  # in labels and predictions
    present = (seen > 0).sum(1)
    f1 = (2 * hits / seen.clamp(min=1)).sum(1) / present
    recall = (hits / support.clamp(min=1)).sum(1) / present

    # Single precision, as in published tables: two probabilities that round to 1 tie.
    probabilities = known.softmax(1)
    score = torch.where(finite.unsqueeze(1), probabilities, 0).float()
    of_client = client.unsqueeze(1).expand(-1, classes)
    auc = _auc(score, y, of_client, clients)
    of_class = of_client * classes + torch.arange(classes, device=logits.device)
    auc_macro = _auc(score, y, of_class, clients * classes).view(clients, classes).nanmean(1)

    losses = torch.where(finite, F.cross_entropy(known, y, reduction="none"), torch.nan)

    confidence, predicted = probabilities.max(1)
    bins = ((confidence * BINS).ceil() - 1).clamp(min=0)  # the m-th holds what is above (m − 1) / 15 and up to m / 15
    gaps = torch.where(finite, (predicted == y).double() - confidence, 0)

    # Everything is fetched here. Losses and gaps are summed in the order of samples, which index_add on a GPU does not
    # keep.
    columns = (samples.double(), hits.sum(1) / samples, f1, recall, auc, auc_macro)
    table = torch.stack(columns).cpu().numpy()
    whose, of_samples, bin, gap = torch.stack([client.double(), losses, bins, gaps]).cpu().numpy()
    loss = np.bincount(whose.astype(np.int64), of_samples, clients)
    loss = np.divide(loss, table[0], out=np.full(clients, np.nan), where=table[0] > 0)
    confusion: np.ndarray = pairs.cpu().numpy()
    by_bin = np.bincount((whose * BINS + bin).astype(np.int64), gap, clients * BINS).reshape(clients, BINS).T
    return np.vstack([table, loss, by_bin]), confusion, table[0].astype(np.int64) - confusion.sum((1, 2))


def summary(table: np.ndarray, confusion: np.ndarray, nonfinite: int) -> Metrics:
    """Summarise the clients' metrics.

    Args:
        table: (metrics, clients), float64, a row for each of `FIGURES` and each bin of `client_gaps`; a client without
            samples has 0 and NaN.
        confusion: (clients, classes, classes).
        nonfinite: samples with a NaN or infinite logit.
    """
    size, accuracy, f1, recall, auc, auc_macro, loss = table[: len(FIGURES)]
    gaps, counted = table[len(FIGURES) :], confusion.sum()
    tested = size > 0
    ranked = ~np.isnan(auc_macro)
    worst = int(np.nanargmin(accuracy)) if tested.any() else -1
    return Metrics(
        accuracy=_mean(accuracy[tested], size[tested]),
        f1=_mean(f1[tested]),
        recall=_mean(recall[tested]),
        auc=_mean(auc[tested], size[tested]),
        auc_macro=_mean(auc_macro[ranked], size[ranked]),
        loss=_mean(loss[tested], size[tested]),
        ece=float(np.abs(gaps[:, tested].sum(1)).sum() / counted) if counted else np.nan,
        accuracy_std=float(accuracy[tested].std()) if tested.any() else np.nan,
        accuracy_worst=float(accuracy[worst]) if tested.any() else np.nan,
        worst_client=worst,
        nonfinite=nonfinite,
        client_samples=size.astype(np.int64),
        client_accuracy=accuracy,
        client_f1=f1,
        client_recall=recall,
        client_auc=auc,
        client_auc_macro=auc_macro,
        client_loss=loss,
        client_gaps=gaps.T,
        confusion=confusion,
    )


def _mean(values: np.ndarray, weights: np.ndarray | None = None) -> float:
    """Return the (weighted) mean; NaN if there are no values."""
    return float(np.average(values, weights=weights)) if len(values) else float("nan")


def _auc(score: Tensor, y: Tensor, segment: Tensor, segments: int) -> Tensor:
    """Compute the area under the ROC curve within each segment, NaN where positives or negatives are missing.

    It is the Mann-Whitney statistic: the share of (positive, negative) pairs in the right order, with ties counted
    half.

    Args:
        score: (n, classes), float32, at least 0; (i, y[i]) are the positives, all others the negatives.
        y: (n,), int64.
        segment: (n, classes), int64, in [0, segments).

    Returns:
        (segments,), float64.
    """
    # The bits of non-negative floats sort like the floats: one sort orders by segment, then score.
    key = (segment << 32) + score.view(torch.int32)
    ordered = key.flatten().sort().values
    size = _count(segment.flatten(), segments)
    start = size.cumsum(0) - size

    own = y.unsqueeze(1)
    own_key, own_segment = key.gather(1, own).flatten(), segment.gather(1, own).flatten()
    twice_below = torch.searchsorted(ordered, own_key) + torch.searchsorted(ordered, own_key, right=True)
    twice_below = _count(own_segment, segments, twice_below - 2 * start[own_segment])
    positives = _count(own_segment, segments)
    negatives = size - positives
    # Pairs and ties among the positives themselves contribute positives² to the doubled count.
    return (twice_below - positives**2).double() / (2 * positives * negatives)


def _count(index: Tensor, length: int, weight: Tensor | None = None) -> Tensor:
    """Count how often each of 0 ... length - 1 occurs, int64; unlike `bincount`, without waiting for the device."""
    weight = torch.ones_like(index) if weight is None else weight.to(index.dtype)
    return torch.zeros(length, dtype=index.dtype, device=index.device).index_add(0, index, weight)
