"""The distillation losses of FedKDX (paper eq. 5-8): per-sample values of logits and features, without state.

`kd`, `nkd` and `nkd_teacher_literal` detach the fixed side themselves: no gradient reaches it. `contrastive`
does not, for the reason it gives.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SHORTEST_FEATURE = 1e-6  # a feature vector shorter than this has no direction worth comparing


def kd(z_learner: Tensor, z_target: Tensor, tau: float) -> Tensor:
    """τ² KL(p_target ‖ p_learner) of the softened predictions, the target fixed (paper §3.2, eq. 5-6).

    Args:
        z_learner, z_target: logits (n, classes).
        tau: temperature τ > 0.

    Returns:
        (n,), one value a sample.
    """
    log_learner = F.log_softmax(z_learner / tau, dim=1)
    log_target = F.log_softmax(z_target.detach() / tau, dim=1)
    return tau**2 * (log_target.exp() * (log_target - log_learner)).sum(1)  # torch.vmap has no rule for F.kl_div


def nkd(z_learner: Tensor, z_target: Tensor, y: Tensor, gamma: float, tau: float) -> Tensor:
    """Negative knowledge distillation (eq. 8), the learner as S and the target as T, the target fixed.

    With the teacher as learner and the student as target it is the mutual reading of eq. 8, as KD is mutual.

    Args:
        z_learner, z_target: logits (n, classes).
        y: true classes (n,), int64.
        gamma: share γ of the second term, which compares what is not the true class, in [0, 1].
        tau: temperature τ > 0.

    Returns:
        (n,), one value a sample.
    """
    return _equation_8(z_target.detach(), z_learner, y, gamma, tau)


def nkd_teacher_literal(z_teacher: Tensor, z_student: Tensor, y: Tensor, gamma: float, tau: float) -> Tensor:
    """Eq. 8 to the letter as a loss of the teacher: p_T is both weight and variable, the student is fixed.

    Its gradient lowers the probability that the teacher gives to the true class. Arguments and result as of
    `nkd`.
    """
    return _equation_8(z_teacher, z_student.detach(), y, gamma, tau)


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


def _equation_8(z_teacher: Tensor, z_student: Tensor, y: Tensor, gamma: float, tau: float) -> Tensor:
    """Eq. 8 as it stands, (n,). N(p) is a softmax over the other logits, so it is stable where p[c*] is 1."""
    z_teacher, z_student = z_teacher / tau, z_student / tau
    true = y.unsqueeze(1)
    p_teacher = F.softmax(z_teacher, dim=1).gather(1, true)
    log_student = F.log_softmax(z_student, dim=1).gather(1, true)
    target = (p_teacher * log_student).squeeze(1)

    n_teacher = F.softmax(_others(z_teacher, true), dim=1)
    log_n_student = F.log_softmax(_others(z_student, true), dim=1)
    others = (n_teacher * log_n_student).sum(1)
    return -(1 - gamma) * target - gamma * tau**2 * others


def _others(z: Tensor, true: Tensor) -> Tensor:
    """The logits of all classes but the true one: (n, classes), (n, 1) -> (n, classes - 1)."""
    index = torch.arange(z.shape[1] - 1, device=z.device)
    return z.gather(1, index + (index >= true).long())


def unit(h: Tensor) -> Tensor:
    """(n, size) -> rows scaled to length 1; without a direction, 0 with gradient 0, unlike in F.normalize."""
    length = torch.linalg.vector_norm(h, dim=1, keepdim=True)
    return h / length.masked_fill(length < SHORTEST_FEATURE, torch.inf)
