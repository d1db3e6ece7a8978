"""Additions of this project to FedKDX and FedKD; the algorithms with additions are called FedKDX+ and FedKD+.

- Both networks predict; the student's weight depends on its loss on the client's windows (`serve`). Or one of them with
  a memory of the client's windows, as in kNN-Per.
- A teacher starts from the student (`teacher_init`) and is moved towards each student received, by a share that changes
  over the rounds (`pull_start`, `pull_end`).
- Each client receives the difference between its student and the server's (`downlink`; see `downlink.differences`).
- What compression leaves out is added to the next update (`error_feedback`); factors are sent as 8-bit integers
  (`quantise`).

All are on by default. With all of them off (`OFF`), the results are those of the base algorithm, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkdx_plugin.algorithm.compression import Compressed, compress_together, left_out
from fedkdx_plugin.algorithm.downlink.broadcast import BroadcastServer
from fedkdx_plugin.algorithm.downlink.differences import DifferencesClient, DifferencesServer
from fedkdx_plugin.algorithm.downlink.ends import ClientEnd, ServerEnd
from fedkdx_plugin.algorithm.pull import PullParams, pull, pull_share
from fedkdx_plugin.algorithm.student import StudentClient, StudentServer
from fedkdx_plugin.algorithm.updates import Sender, State, group, labelled
from registry.errors import UserError
from registry.interface import Message, Task, float_state
from registry.memory import MEMORY, Remembering, remember
from registry.parameters import option

RESIDUAL = "residual"
SHARE = "share"
SHARPNESS = 4.0  # of `student_share`: chosen on validation windows
WITH_MEMORY = "+memory"  # end of those values of `serve`
SMALLEST_SHARE = 1e-6  # above 0, since a mixture takes the logarithm of the weights
CHUNK = 512  # windows in a forward pass, to bound memory
OFF: dict[str, Any] = {
    "pull_start": 0.0,
    "pull_end": 0.0,
    "serve": "teacher",
    "teacher_init": "own",
    "error_feedback": False,
    "quantise": False,
    "downlink": "broadcast",
}


@dataclass(frozen=True)
class AdditionsParams(PullParams):
    """Hyper-parameters of the additions; inherit from this class before the parameters of the base algorithm."""

    serve: str = option(
        "both",
        "which network predicts for a client that has trained: one, alone or with a memory of the client's windows, or "
        "both, weighted by the student's loss there",
        choices=("teacher", "student", "both", "teacher+memory", "student+memory"),
    )
    teacher_init: str = option(
        "student",
        "initial weights of a client's teacher: random, or those of the first student received",
        choices=("own", "student"),
    )
    error_feedback: bool = option(True, "add what compression left out to the next update, on clients and server")
    quantise: bool = option(True, "send the factors of a matrix as 8-bit integers")
    downlink: str = option(
        "differences",
        "what a client receives: every step since its last one (eq. 2), or the difference to its own student",
        choices=("broadcast", "differences"),
    )


class Feedback(Sender):
    """Makes compressed updates with error feedback and 8-bit factors, as the hyper-parameters say.

    Error feedback: Seide et al. 2014; Karimireddy et al., arXiv:1901.09847.

    Attributes:
        params: an `AdditionsParams`.
        residual: the change that earlier updates left out, of tensors that were sent as factors; {} at first.
    """

    params: Any
    residual: State

    def gradient(self, change: State, rate: float) -> State:
        """Return the gradient to send: (`change` + residual) / `rate`; the residual is a change, since rates decay."""
        return super().gradient(owed(change, self.residual), rate)

    def compress(self, gradients: Sequence[State], epsilon: float) -> list[Compressed]:
        """Compress several gradients, each separately."""
        return compress_together(gradients, epsilon, self.params.quantise)

    def sent(self, gradient: State, payload: State, rate: float) -> None:
        """Keep what the payload leaves out as the residual."""
        self.residual = residual_of(gradient, payload, rate) if self.params.error_feedback else {}


class FeedbackBroadcast(Feedback, BroadcastServer):
    """Server's end of the broadcast, with a residual of its own."""

    def __init__(self, params: Any) -> None:
        super().__init__()
        self.params, self.residual = params, {}

    def save(self) -> Message:
        """Return the steps, the step of each client, and the residual."""
        saved = super().save()
        return Message(labelled(self.residual, RESIDUAL) | dict(saved.tensors), saved.meta)

    def restore(self, saved: Message) -> None:
        """Restore what `save` returned."""
        super().restore(saved)
        self.residual = group(saved.tensors, RESIDUAL)


class AdditionsClient(Feedback, StudentClient):
    """Client with the additions; inherit from this class before the client of the base algorithm.

    What the prediction needs is made after each training (see `_prepare_prediction`), for the teacher as trained, and
    the student as received: the student that the client trained itself is not the one that will predict.
    """

    private: ClassVar[tuple[str, ...]] = (f"{MEMORY}.*",)

    @classmethod
    def build(cls, task: Task) -> dict[str, nn.Module]:
        """Return the networks of the base algorithm, and one with a memory if `serve` asks for it."""
        nets = super().build(task)
        if remembered := of_memory(task.params):
            nets[MEMORY] = Remembering(task.model() if remembered == "teacher" else task.student())
        return nets

    @classmethod
    def meeting(cls, params: Any) -> str:
        """Return what the base algorithm does, or how windows meet in the predictions that `serve` asks for."""
        if params.serve in ("teacher", "student"):
            return super().meeting(params)
        how = "remembers its windows' features" if of_memory(params) else "weighs predictions by a loss on its windows"
        return super().meeting(params) or f"{how}; --set serve=teacher does not"

    def client_end(self) -> ClientEnd:
        """Return this client's end of the downlink that `downlink` names."""
        return DifferencesClient() if self.params.downlink == "differences" else super().client_end()

    @property
    def residual(self) -> State:
        """Residual, kept in `memory` between rounds."""
        return group(self.memory, RESIDUAL)

    @residual.setter
    def residual(self, residual: State) -> None:
        others = {name: tensor for name, tensor in self.memory.items() if not name.startswith(RESIDUAL)}
        self.memory = others | labelled(residual, RESIDUAL)

    def serves(self) -> str | Mapping[str, float]:
        """Return the networks that `serve` names, with their weights; the student until the client has trained."""
        if not self.trained:
            return "student"
        if of_memory(self.params):
            return MEMORY
        if self.params.serve == "both":
            share = float(self.memory[SHARE])
            return {"teacher": 1 - share, "student": share}
        return str(self.params.serve)

    def receive(self, message: Message) -> None:
        """Update the student to W^t, and move the teacher towards it."""
        super().receive(message)
        self._pull(pull_share(self.params, message.meta["progress"], self.trained, message.meta["expected"]))

    def _pull(self, share: float) -> None:
        """Move the teacher by a share of the way to the student; the whole way at first for one that starts there."""
        if self.params.teacher_init == "student" and not self.trained:
            share = 1.0
        if share > 0:
            own, target = (float_state({"teacher": self.nets[name]}) for name in ("teacher", "student"))
            pull(own, target, share)

    def sent(self, gradient: State, payload: State, rate: float) -> None:
        """Keep what the payload leaves out, and what this client's prediction needs."""
        super().sent(gradient, payload, rate)
        self._prepare_prediction()

    def _prepare_prediction(self) -> None:
        """Store the student's share in the prediction (see `student_share`), or fill the memory, as `serve` asks."""
        if self.params.serve in ("both", "student+memory"):
            self.load(self.start)
        if self.params.serve == "both":
            self.memory = self.memory | {SHARE: student_share(self._student_loss())}
        elif remembered := of_memory(self.params):
            remember(self, remembered)

    @torch.no_grad()
    def _student_loss(self) -> Tensor:
        """Return the mean cross-entropy of the student on the client's training windows."""
        assert self.data is not None  # the engine sets it while the client works
        x, y, _ = self.data
        student = self.nets["student"].eval()
        return F.cross_entropy(torch.cat([student(chunk).logits for chunk in x.split(CHUNK)]), y)


class AdditionsServer(StudentServer):
    """Server with the additions; inherit from this class before the server of the base algorithm."""

    @classmethod
    def check(cls, task: Task, params: Any) -> None:
        """Raise UserError if a teacher would start from, or be moved towards, a student of another architecture."""
        super().check(task, params)
        mixing = ("teacher_init", "pull_start", "pull_end")
        asked = [name for name in mixing if getattr(params, name) != OFF[name]]
        if asked and task.model_class is not task.student_class:
            off = " ".join(f"--set {name}={OFF[name]}" for name in asked)
            raise UserError(
                f"{asked[0]}={getattr(params, asked[0])}: the student is a {task.student_class.__name__}, the teacher "
                f"a {task.model_class.__name__}; leave -sm out, or use {off}"
            )

    def server_end(self) -> ServerEnd:
        """Return the server's end of the downlink that `downlink` names."""
        if self.params.downlink == "differences":
            return DifferencesServer(self.weights, self.params.quantise)
        return FeedbackBroadcast(self.params)


def of_memory(params: Any) -> str:
    """Return the network that predicts with a memory, '' if none does."""
    return str(params.serve).removesuffix(WITH_MEMORY) if params.serve.endswith(WITH_MEMORY) else ""


def owed(change: State, residual: State) -> State:
    """Return the change plus the residual, which may hold only some of the tensors."""
    return {name: tensor + residual[name] if name in residual else tensor for name, tensor in change.items()}


def residual_of(gradient: State, payload: State, rate: float) -> State:
    """Return the change that a payload leaves out, to be added to the next one."""
    return {name: rate * tensor for name, tensor in left_out(gradient, payload).items()}


def student_share(loss: Tensor) -> Tensor:
    """Return the student's share in a client's prediction with `serve` = both, in (0, 1/2].

    Its weight is exp(-4 L) times the teacher's: equal if the student fits the client's training windows, to which the
    teacher was fitted, and close to 0 if it does not.

    Args:
        loss: L, the student's mean cross-entropy on the client's training windows, before it trained on them: a scalar.
    """
    weight = torch.exp(-SHARPNESS * loss)
    return (weight / (1 + weight)).clamp(min=SMALLEST_SHARE)
