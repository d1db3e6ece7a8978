"""FedKDX: Federated Learning with Negative Knowledge Distillation for Enhanced Healthcare AI Systems, 2026.

The method of the paper: hyper-parameters (§4.3), losses (eq. 3-8), client and server. The part shared with FedKD, the
exchange of compressed updates (eq. 2, 9, 10; Algorithm 1), is in `student`. This project's additions to the method are
an algorithm of their own, in `fedkdx_plus`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkdx_plugin.algorithm.student import StudentClient, StudentParams, StudentServer
from fedkdx_plugin.native import losses as fused
from registry import functional
from registry.functional import kd, soften, unit
from registry.interface import Batch, Output, Task, outputs
from registry.parameters import option


@dataclass(frozen=True)
class FedKDXParams(StudentParams):
    """Hyper-parameters of FedKDX; the defaults are the paper's (§4.3), with equal weights of all terms (eq. 3-4).

    But for `epsilon_end`: the paper gives ε = 0.9 alone. 0.98 is from its reference scripts, and FedKD's T_end.
    """

    gamma: float = option(0.9, "share of non-target knowledge in NKD (eq. 8)", 0.0, 1.0)
    tau: float = option(0.8, "temperature of KD, NKD and the contrastive term", 1e-3)
    tau_ctl: float | None = option(None, "temperature of the contrastive term; tau by default", 1e-3)
    kd_weight: float = option(1.0, "weight of KD; cross-entropy has weight 1", 0.0)
    nkd_weight: float = option(1.0, "weight of NKD", 0.0)
    ctl_weight: float = option(1.0, "weight of the contrastive term", 0.0)
    use: tuple[str, ...] = option(
        ("kd", "nkd", "ctl"), "terms added to cross-entropy (ablation of Table 2)", choices=("kd", "nkd", "ctl")
    )
    nkd_direction: str = option(
        "mutual",
        "NKD of the teacher: with the student as its target, or eq. 8 as printed",
        choices=("mutual", "literal"),
    )


# Losses: functions that return one value for each sample. Eq. 5-6 and KD (§3.2) are `soften` and `kd`. `kd`, `nkd` and
# `nkd_teacher_literal` detach the fixed side; `contrastive` detaches nothing, for the reason given there.


def contrastive(h_teacher: Tensor, h_student: Tensor, tau: float, mask: Tensor | None = None) -> Tensor:
    """Return InfoNCE over the batch on cosine similarity, the teacher's features as anchors (eq. 7).

    Nothing is detached: both networks minimise the same expression, each with the other's features fixed, and these are
    the gradients of the two sides, so one evaluation is enough for both. Detach one side to train only the other.

    Args:
        h_teacher, h_student: features (n, size). A vector of zeros has similarity 0 to all others and no gradient.
        tau: temperature τ > 0.
        mask: (n,), bool, False for rows that only pad the batch: they are not negatives, and their value is 0.

    Returns:
        (n,), one value for each sample.
    """
    similarity = unit(h_teacher) @ unit(h_student).T / tau
    own = torch.arange(len(similarity), device=similarity.device)
    if mask is None:
        return F.cross_entropy(similarity, own, reduction="none")
    # The smallest finite number instead of -inf, which would give NaN for a batch without real rows.
    similarity = similarity.masked_fill(~mask, torch.finfo(similarity.dtype).min)
    return F.cross_entropy(similarity, own, reduction="none").masked_fill(~mask, 0)


class Apart(NamedTuple):
    """Softened predictions p, split into the true class and the others.

    Attributes:
        true: log p of the true class, (n,).
        others: log N(p): p renormalised over all other classes, (n, classes - 1).
    """

    true: Tensor
    others: Tensor


def apart(log_p: Tensor, y: Tensor) -> Apart:
    """Split softened predictions (n, classes) by the true classes (n,), int64, into the two parts of eq. 8.

    N(p) is computed as a softmax over the other classes, so it is stable if p of the true class is 1.
    """
    true = y.unsqueeze(1)
    index = torch.arange(log_p.shape[1] - 1, device=log_p.device)
    others = log_p.gather(1, index + (index >= true))
    return Apart(log_p.gather(1, true).squeeze(1), F.log_softmax(others, dim=1))


def nkd(learner: Apart, target: Apart, gamma: float, tau: float) -> Tensor:
    """Return negative knowledge distillation (eq. 8) with the learner as S and the target as T, which is fixed.

    With the teacher as learner and the student as target it is the mutual version of eq. 8, as KD is mutual.

    Args:
        learner, target: results of `apart`.
        gamma: share γ of the second term, which compares the other classes, in [0, 1].
        tau: temperature with which they were softened.

    Returns:
        (n,), one value for each sample.
    """
    return _equation_8(Apart(target.true.detach(), target.others.detach()), learner, gamma, tau)


def nkd_teacher_literal(teacher: Apart, student: Apart, gamma: float, tau: float) -> Tensor:
    """Return eq. 8 as printed as a loss of the teacher: p_T is both weight and variable, the student is fixed.

    Its gradient lowers the teacher's probability of the true class. Arguments and result as in `nkd`.
    """
    return _equation_8(teacher, Apart(student.true.detach(), student.others.detach()), gamma, tau)


def _equation_8(teacher: Apart, student: Apart, gamma: float, tau: float) -> Tensor:
    """Return eq. 8, (n,)."""
    others = (teacher.others.exp() * student.others).sum(1)
    return -(1 - gamma) * teacher.true.exp() * student.true - gamma * tau**2 * others


class FedKDXClient(StudentClient):
    """Minimises CE + KD + NKD + CTL for teacher and student, each with respect to its own weights."""

    private: ClassVar[tuple[str, ...]] = ("teacher.*", "projection.*")

    @classmethod
    def meeting(cls, params: Any) -> str:
        """Return that the contrastive term, if there is one, is over all windows of a batch."""
        if "ctl" not in params.use:
            return ""
        return "contrasts the windows of a batch (ctl); --set use=kd,nkd leaves that term out"

    @classmethod
    def build(cls, task: Task) -> dict[str, nn.Module]:
        """Return teacher and student; if feature sizes differ, also a projection to the student's size."""
        teacher, student = task.model(), task.student()
        nets: dict[str, nn.Module] = {"teacher": teacher, "student": student}
        sizes = teacher.feature_size, student.feature_size
        if sizes[0] != sizes[1]:
            nets["projection"] = nn.Linear(*sizes, bias=False)
        return nets

    def losses(
        self, nets: Mapping[str, Callable[[Tensor], Any]], batch: Batch, context: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return L_T and L_S, means over the batch."""
        teacher, student = outputs(nets, batch.x, "teacher", "student")
        if "ctl" in self.params.use:
            teacher = teacher._replace(features=self._to_student_size(nets, teacher))
        return self.distil(teacher, student, batch)

    @fused.compiled
    def distil(self, teacher: Output, student: Output, batch: Batch) -> dict[str, Tensor]:
        """Return the losses of teacher and student, each with the other as target (eq. 3-4).

        A compiled operation runs instead if it gives the same result (docs/reference/performance.md).
        """
        p = self.params
        loss_t = batch.cross_entropies(teacher.logits)
        loss_s = batch.cross_entropies(student.logits)
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
        """Return the arguments of the compiled losses; None if they do not support these hyper-parameters."""
        p = self.params
        if not p.use or p.nkd_direction != "mutual":
            return None
        weights = {"kd": p.kd_weight, "nkd": p.nkd_weight, "ctl": p.ctl_weight}
        used = {name: weight if name in p.use else 0.0 for name, weight in weights.items()}
        shortest = functional.SHORTEST_FEATURE
        return fused.Terms(tau=p.tau, gamma=p.gamma, tau_ctl=self._tau_ctl(), shortest=shortest, **used)

    def _tau_ctl(self) -> float:
        """Return the temperature of the contrastive term."""
        return float(self.params.tau if self.params.tau_ctl is None else self.params.tau_ctl)

    @staticmethod
    def _to_student_size(nets: Mapping[str, Callable[[Tensor], Any]], teacher: Output) -> Tensor:
        """Return the teacher's features, projected if the student's have another size."""
        features: Tensor = nets["projection"](teacher.features) if "projection" in nets else teacher.features
        return features


class FedKDX(StudentServer):
    """Distils between private teachers and a shared student; only compressed student updates are sent.

    Clients count by their samples, as §3.7 of the paper says; its eq. 2 weighs them equally, as `weights=uniform` does.
    """

    paper = "Vu et al. 2026, FedKDX (Algorithm 1)"
    sends = "compressed student updates down and up; own teacher"
    Client = FedKDXClient
    Params = FedKDXParams
