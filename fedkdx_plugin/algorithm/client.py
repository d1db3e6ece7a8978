"""FedKDX's client: a private teacher and a shared student that teach each other (paper §3, eq. 3-8)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from fedkdx_plugin.algorithm import losses
from fedkdx_plugin.algorithm.student import StudentClient, StudentParams
from fedkdx_plugin.native import losses as fused
from registry.interface import Batch, Output, Task, outputs
from registry.parameters import hyper

compiled = fused.compiled(losses)  # not in the class, where `losses` is a method


@dataclass(frozen=True)
class FedKDXParams(StudentParams):
    """Hyper-parameters of FedKDX; the defaults are the paper's (§4.3)."""

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


class FedKDXClient(StudentClient):
    """Minimises CE + KD + NKD + CTL for teacher and student, each over its own weights."""

    private = ("teacher.*", "projection.*")

    @classmethod
    def build(cls, task: Task) -> dict[str, nn.Module]:
        """Teacher and student; between features of different size, a projection of the teacher's to the student's."""
        nets: dict[str, nn.Module] = {"teacher": task.model(), "student": task.student()}
        sizes = nets["teacher"].feature_size, nets["student"].feature_size
        if sizes[0] != sizes[1]:
            nets["projection"] = nn.Linear(*sizes, bias=False)
        return nets

    def losses(self, nets: Mapping, batch: Batch, context: Mapping[str, Tensor]) -> dict[str, Tensor]:
        teacher, student = outputs(nets, batch.x, "teacher", "student")
        if "ctl" in self.params.use:
            teacher = teacher._replace(features=self._to_student_size(nets, teacher))
        return self.distil(teacher, student, batch)

    @compiled
    def distil(self, teacher: Output, student: Output, batch: Batch) -> dict[str, Tensor]:
        """What teacher and student minimise, each learning from the other (eq. 3-8).

        Where a compiled operation gives the same as what is written here, it runs instead (docs/performance.md).
        """
        p = self.params
        loss_t = F.cross_entropy(teacher.logits, batch.y, reduction="none")
        loss_s = F.cross_entropy(student.logits, batch.y, reduction="none")
        log_t, log_s = losses.soften(teacher.logits, p.tau), losses.soften(student.logits, p.tau)
        if "kd" in p.use:
            loss_t = loss_t + p.kd_weight * losses.kd(log_t, log_s, p.tau)
            loss_s = loss_s + p.kd_weight * losses.kd(log_s, log_t, p.tau)
        if "nkd" in p.use:
            apart_t, apart_s = losses.apart(log_t, batch.y), losses.apart(log_s, batch.y)
            of_teacher = losses.nkd if p.nkd_direction == "mutual" else losses.nkd_teacher_literal
            loss_t = loss_t + p.nkd_weight * of_teacher(apart_t, apart_s, p.gamma, p.tau)
            loss_s = loss_s + p.nkd_weight * losses.nkd(apart_s, apart_t, p.gamma, p.tau)
        if "ctl" in p.use:
            h_t, h_s, tau = teacher.features, student.features, self._tau_ctl()
            loss_t = loss_t + p.ctl_weight * losses.contrastive(h_t, h_s.detach(), tau, batch.mask)
            loss_s = loss_s + p.ctl_weight * losses.contrastive(h_t.detach(), h_s, tau, batch.mask)
        return {"teacher": batch.mean(loss_t), "student": batch.mean(loss_s)}

    def terms(self) -> fused.Terms | None:
        """What the compiled losses are told to do; None where they cannot do what the parameters ask for."""
        p = self.params
        if not p.use or p.nkd_direction != "mutual":
            return None
        weights = {"kd": p.kd_weight, "nkd": p.nkd_weight, "ctl": p.ctl_weight}
        used = {name: weight if name in p.use else 0.0 for name, weight in weights.items()}
        return fused.Terms(tau=p.tau, gamma=p.gamma, tau_ctl=self._tau_ctl(), shortest=losses.SHORTEST_FEATURE, **used)

    def _tau_ctl(self) -> float:
        return self.params.tau if self.params.tau_ctl is None else self.params.tau_ctl

    @staticmethod
    def _to_student_size(nets: Mapping, teacher: Output) -> Tensor:
        return nets["projection"](teacher.features) if "projection" in nets else teacher.features
