"""FedKD: Wu et al., Communication-efficient federated learning via knowledge distillation, 2022.

The paper's mentor and mentee are called teacher and student here, as in FedKDX. Deviations from the paper: the models
have no attention maps, so the hidden loss (after eq. 4) has no term for them; hidden states are a model's features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from fedkdx_plugin.algorithm.student import StudentClient, StudentParams, StudentServer
from registry.functional import kd, soften
from registry.interface import Batch, Task, outputs
from registry.parameters import option

SMALLEST_TASK_LOSS = 1e-2  # bounds the weight of distillation by 100 for a batch that both networks have memorised


@dataclass(frozen=True)
class FedKDParams(StudentParams):
    """Hyper-parameters of FedKD: T_start and T_end of its dynamic approximation are `epsilon_start` and `_end`."""

    epsilon_start: float = option(0.95, "share of energy kept in the first round (the paper's T_start)", 0.0, 1.0)
    epsilon_end: float = option(0.98, "share of energy kept in the last round (the paper's T_end)", 0.0, 1.0)


class FedKDClient(StudentClient):
    """Minimises CE + (KD + hidden MSE) / (CE_T + CE_S) for teacher and student, each over its own weights.

    The denominator weights the distillation by the losses of both networks ("to control the intensity"). It is a
    constant weight without gradient: otherwise it would add -(KD + MSE) / (CE_T + CE_S)² times the gradient of
    cross-entropy, which trains both networks to be wrong wherever they disagree. It is computed over the batch, as in
    the authors' code: computed for each sample, windows already classified correctly would get an unbounded weight. It
    is at most 100, where theirs has no bound.
    """

    private: ClassVar[tuple[str, ...]] = ("teacher.*", "projection.*")
    windows_meet = "weighs distillation by the losses of a whole batch"

    @classmethod
    def build(cls, task: Task) -> dict[str, nn.Module]:
        """Return teacher, student, and W_h, which maps the student's features to the size of the teacher's."""
        teacher, student = task.model(), task.student()
        projection = nn.Linear(student.feature_size, teacher.feature_size, bias=False)
        return {"teacher": teacher, "student": student, "projection": projection}

    def losses(
        self, nets: Mapping[str, Callable[[Tensor], Any]], batch: Batch, context: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return L_T and L_S, means over the batch."""
        teacher, student = outputs(nets, batch.x, "teacher", "student")
        task_t = batch.cross_entropy(teacher.logits)  # eq. 1
        task_s = batch.cross_entropy(student.logits)  # eq. 2
        intensity = 1 / (task_t + task_s).detach().clamp(min=SMALLEST_TASK_LOSS)

        mapped = nets["projection"](student.features)  # W_h H_s: trained by the student's loss
        log_t, log_s = soften(teacher.logits, 1.0), soften(student.logits, 1.0)
        of_teacher = kd(log_t, log_s, 1.0) + _mse(teacher.features, mapped.detach())
        of_student = kd(log_s, log_t, 1.0) + _mse(mapped, teacher.features.detach())
        return {
            "teacher": task_t + intensity * batch.mean(of_teacher),
            "student": task_s + intensity * batch.mean(of_student),
        }


def _mse(one: Tensor, other: Tensor) -> Tensor:
    """Return the mean squared difference of each row: (n, d), (n, d) -> (n,)."""
    return (one - other).square().mean(1)


class FedKD(StudentServer):
    """Distils between private teachers and a small shared student; only compressed student updates are sent.

    Clients count by their samples; the authors' code weighs them equally, as `weights=uniform` does.
    """

    paper = "Wu et al. 2022, doi:10.1038/s41467-022-29763-x"
    sends = "compressed student updates down and up; own teacher"
    Client = FedKDClient
    Params = FedKDParams
