"""The distillation losses of FedKDX (paper eq. 5-8): per-sample values of predictions and features, without state.

`kd`, `nkd` and `nkd_teacher_literal` take softened predictions, made once for all of them by `soften` and `apart`, and
detach the fixed side themselves: no gradient reaches it. `contrastive` does not, for the reason it gives.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

SHORTEST_FEATURE = 1e-6  # a feature vector shorter than this has no direction worth comparing


class Apart(NamedTuple):
    """Softened predictions p, the true class apart from the others.

    Attributes:
        true: log p of the true class, (n,).
        others: log N(p): p renormalised over all other classes, (n, classes - 1).
    """

    true: Tensor
    others: Tensor


def soften(z: Tensor, tau: float) -> Tensor:
    """log p at temperature τ > 0 (eq. 5-6): logits (n, classes) -> (n, classes)."""
    return F.log_softmax(z / tau, dim=1)


def apart(log_p: Tensor, y: Tensor) -> Apart:
    """What eq. 8 compares of softened predictions (n, classes) with the true classes (n,), int64.

    N(p) is a softmax of its own over what is not the true class, so it is stable where p of the true class is 1.
    """
    true = y.unsqueeze(1)
    index = torch.arange(log_p.shape[1] - 1, device=log_p.device)
    others = log_p.gather(1, index + (index >= true))
    return Apart(log_p.gather(1, true).squeeze(1), F.log_softmax(others, dim=1))


def kd(log_learner: Tensor, log_target: Tensor, tau: float) -> Tensor:
    """τ² KL(p_target ‖ p_learner) of softened predictions, the target fixed (paper §3.2).

    Args:
        log_learner, log_target: as of `soften`, (n, classes).
        tau: the temperature they were softened with.

    Returns:
        (n,), one value a sample.
    """
    log_target = log_target.detach()
    return tau**2 * (log_target.exp() * (log_target - log_learner)).sum(1)  # torch.vmap has no rule for F.kl_div


def nkd(learner: Apart, target: Apart, gamma: float, tau: float) -> Tensor:
    """Negative knowledge distillation (eq. 8), the learner as S and the target as T, the target fixed.

    With the teacher as learner and the student as target it is the mutual reading of eq. 8, as KD is mutual.

    Args:
        learner, target: as of `apart`.
        gamma: share γ of the second term, which compares what is not the true class, in [0, 1].
        tau: the temperature they were softened with.

    Returns:
        (n,), one value a sample.
    """
    return _equation_8(Apart(target.true.detach(), target.others.detach()), learner, gamma, tau)


def nkd_teacher_literal(teacher: Apart, student: Apart, gamma: float, tau: float) -> Tensor:
    """Eq. 8 to the letter as a loss of the teacher: p_T is both weight and variable, the student is fixed.

    Its gradient lowers the probability that the teacher gives to the true class. Arguments and result as of
    `nkd`.
    """
    return _equation_8(teacher, Apart(student.true.detach(), student.others.detach()), gamma, tau)


def contrastive(h_teacher: Tensor, h_student: Tensor, tau: float, mask: Tensor | None = None) -> Tensor:
    """InfoNCE over the batch on cosine similarity, the teacher's features as anchors (eq. 7).

    Nothing is detached here. Both networks minimise this same expression, each with the other's features
    fixed, and the gradient that reaches each side is just that: one evaluation serves both. Detach a side to
    train the other alone.

    Args:
        h_teacher, h_student: features (n, size). A vector of zeros is similar to nothing (0) and gets no
            gradient.
        tau: temperature τ > 0.
        mask: (n,), bool, False for rows that only fill the batch up: they are no negatives, and their own
            value is 0.

    Returns:
        (n,), one value a sample.
    """
    similarity = unit(h_teacher) @ unit(h_student).T / tau
    own = torch.arange(len(similarity), device=similarity.device)
    if mask is None:
        return F.cross_entropy(similarity, own, reduction="none")
    # The least finite number rather than -inf: a batch without any real row stays free of NaN.
    similarity = similarity.masked_fill(~mask, torch.finfo(similarity.dtype).min)
    return F.cross_entropy(similarity, own, reduction="none").masked_fill(~mask, 0)


def _equation_8(teacher: Apart, student: Apart, gamma: float, tau: float) -> Tensor:
    """Eq. 8 as it stands, (n,)."""
    others = (teacher.others.exp() * student.others).sum(1)
    return -(1 - gamma) * teacher.true.exp() * student.true - gamma * tau**2 * others


def unit(h: Tensor) -> Tensor:
    """(n, size) -> rows scaled to length 1; without a direction, 0 with gradient 0, unlike in F.normalize."""
    length = torch.linalg.vector_norm(h, dim=1, keepdim=True)
    return h / length.masked_fill(length < SHORTEST_FEATURE, torch.inf)
