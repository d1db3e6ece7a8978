"""FedKDX: Federated Learning with Negative Knowledge Distillation for Enhanced Healthcare AI Systems, 2026.

The method as the paper has it: hyper-parameters (§4.3), losses (eq. 3-8), client and server. What it shares with FedKD,
the exchange of compressed updates (eq. 2, 9, 10; Algorithm 1), is in `student`. What this project added to the paper's
method is an algorithm of its own, `fedkdx_plus`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkdx_plugin.algorithm.student import StudentClient, StudentParams, StudentServer
from fedkdx_plugin.native import losses as fused
from registry import functional
from registry.functional import kd, soften, unit
from registry.interface import Batch, Output, Task, outputs
from registry.parameters import hyper


@dataclass(frozen=True)
class FedKDXParams(StudentParams):
    """Hyper-parameters of FedKDX; the defaults are the paper's (§4.3), which weighs all terms alike (eq. 3-4)."""

    gamma: float = hyper(0.9, "share of non-target knowledge in NKD (eq. 8)", 0.0, 1.0)
    tau: float = hyper(0.8, "temperature of KD, NKD and the contrastive term", 1e-3)
    tau_ctl: float | None = hyper(None, "temperature of the contrastive term, where it is another than tau", 1e-3)
    kd_weight: float = hyper(1.0, "weight of KD beside cross-entropy", 0.0)
    nkd_weight: float = hyper(1.0, "weight of NKD", 0.0)
    ctl_weight: float = hyper(1.0, "weight of the contrastive term", 0.0)
    use: tuple[str, ...] = hyper(
        ("kd", "nkd", "ctl"), "terms beside cross-entropy (Table 2's ablation)", choices=("kd", "nkd", "ctl")
    )
    nkd_direction: str = hyper(
        "mutual",
        "NKD of the teacher: learning from the student, or eq. 8 as printed",
        choices=("mutual", "literal"),
    )


# Losses: one value a sample, without state. Eq. 5-6 and KD (§3.2) are `soften` and `kd`. No gradient reaches the fixed
# side of `kd`, `nkd` and `nkd_teacher_literal`; `contrastive` detaches nothing, for the reason it gives.


def contrastive(h_teacher: Tensor, h_student: Tensor, tau: float, mask: Tensor | None = None) -> Tensor:
    """Return InfoNCE over the batch on cosine similarity, the teacher's features as anchors (eq. 7).

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


class Apart(NamedTuple):
    """Softened predictions p, the true class apart from the others.

    Attributes:
        true: log p of the true class, (n,).
        others: log N(p): p renormalised over all other classes, (n, classes - 1).
    """

    true: Tensor
    others: Tensor


def apart(log_p: Tensor, y: Tensor) -> Apart:
    """Split softened predictions (n, classes) by the true classes (n,), int64, into what eq. 8 compares.

    N(p) is a softmax of its own over what is not the true class, so it is stable where p of the true class is 1.
    """
    true = y.unsqueeze(1)
    index = torch.arange(log_p.shape[1] - 1, device=log_p.device)
    others = log_p.gather(1, index + (index >= true))
    return Apart(log_p.gather(1, true).squeeze(1), F.log_softmax(others, dim=1))


def nkd(learner: Apart, target: Apart, gamma: float, tau: float) -> Tensor:
    """Return negative knowledge distillation (eq. 8), the learner as S and the target as T, the target fixed.

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
    """Return eq. 8 to the letter as a loss of the teacher: p_T is both weight and variable, the student is fixed.

    Its gradient lowers the probability that the teacher gives to the true class. Arguments and result as of
    `nkd`.
    """
    return _equation_8(teacher, Apart(student.true.detach(), student.others.detach()), gamma, tau)


def _equation_8(teacher: Apart, student: Apart, gamma: float, tau: float) -> Tensor:
    """Return eq. 8 as it stands, (n,)."""
    others = (teacher.others.exp() * student.others).sum(1)
    return -(1 - gamma) * teacher.true.exp() * student.true - gamma * tau**2 * others


class FedKDXClient(StudentClient):
    """Minimises CE + KD + NKD + CTL for teacher and student, each over its own weights."""

    private = ("teacher.*", "projection.*")

    @classmethod
    def build(cls, task: Task) -> dict[str, nn.Module]:
        """Make teacher and student; between features of different size, a projection to the student's."""
        nets: dict[str, nn.Module] = {"teacher": task.model(), "student": task.student()}
        sizes = nets["teacher"].feature_size, nets["student"].feature_size
        if sizes[0] != sizes[1]:
            nets["projection"] = nn.Linear(*sizes, bias=False)
        return nets

    def losses(self, nets: Mapping, batch: Batch, context: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return L_T and L_S, means over the batch."""
        teacher, student = outputs(nets, batch.x, "teacher", "student")
        if "ctl" in self.params.use:
            teacher = teacher._replace(features=self._to_student_size(nets, teacher))
        return self.distil(teacher, student, batch)

    @fused.compiled
    def distil(self, teacher: Output, student: Output, batch: Batch) -> dict[str, Tensor]:
        """Return what teacher and student minimise, each learning from the other (eq. 3-4).

        Where a compiled operation gives the same as these lines, it runs instead (docs/reference/performance.md).
        """
        p = self.params
        loss_t = F.cross_entropy(teacher.logits, batch.y, reduction="none")
        loss_s = F.cross_entropy(student.logits, batch.y, reduction="none")
        log_t, log_s = soften(teacher.logits, p.tau), soften(student.logits, p.tau)
        if "kd" in p.use:
            loss_t = loss_t + p.kd_weight * kd(log_t, log_s, p.tau)
            loss_s = loss_s + p.kd_weight * kd(log_s, log_t, p.tau)
        if "nkd" in p.use:
            apart_t, apart_s = apart(log_t, batch.y), apart(log_s, batch.y)
            of_teacher = nkd if p.nkd_direction == "mutual" else nkd_teacher_literal
            loss_t = loss_t + p.nkd_weight * of_teacher(apart_t, apart_s, p.gamma, p.tau)
            loss_s = loss_s + p.nkd_weight * nkd(apart_s, apart_t, p.gamma, p.tau)
        if "ctl" in p.use:
            h_t, h_s, tau = teacher.features, student.features, self._tau_ctl()
            loss_t = loss_t + p.ctl_weight * contrastive(h_t, h_s.detach(), tau, batch.mask)
            loss_s = loss_s + p.ctl_weight * contrastive(h_t.detach(), h_s, tau, batch.mask)
        return {"teacher": batch.mean(loss_t), "student": batch.mean(loss_s)}

    def terms(self) -> fused.Terms | None:
        """Return what the compiled losses are told to do; None where they cannot do what the parameters ask for."""
        p = self.params
        if not p.use or p.nkd_direction != "mutual":
            return None
        weights = {"kd": p.kd_weight, "nkd": p.nkd_weight, "ctl": p.ctl_weight}
        used = {name: weight if name in p.use else 0.0 for name, weight in weights.items()}
        shortest = functional.SHORTEST_FEATURE
        return fused.Terms(tau=p.tau, gamma=p.gamma, tau_ctl=self._tau_ctl(), shortest=shortest, **used)

    def _tau_ctl(self) -> float:
        return self.params.tau if self.params.tau_ctl is None else self.params.tau_ctl

    @staticmethod
    def _to_student_size(nets: Mapping, teacher: Output) -> Tensor:
        return nets["projection"](teacher.features) if "projection" in nets else teacher.features


class FedKDX(StudentServer):
    """Private teachers and a shared student distil into each other; only compressed student updates travel."""

    paper = "Vu et al. 2026, FedKDX (Algorithm 1)"
    sends = "compressed student updates down and up; own teacher"
    Client = FedKDXClient
    Params = FedKDXParams
