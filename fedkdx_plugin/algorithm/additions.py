"""What this project adds to FedKDX and FedKD; the algorithms with it are called FedKDX+ and FedKD+.

- Both networks predict, the student as far as it suits the client (`serve`).
- A teacher starts from the student (`teacher_init`) and is pulled towards each student that it is sent, less and less
  (`pull_start`, `pull_end`).
- The student gets to each client as the difference to what that client holds (`downlink`; see `downlink.differences`).
- What compression drops is part of the next update (`error_feedback`); factors travel as 8-bit integers (`quantise`).

All are on by default. With all of them off (`OFF`), an algorithm is what it adds to, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkdx_plugin.algorithm.compression import Compressed, compress_together, left_out, linear
from fedkdx_plugin.algorithm.downlink.broadcast import BroadcastServer
from fedkdx_plugin.algorithm.downlink.differences import DifferencesClient, DifferencesServer
from fedkdx_plugin.algorithm.downlink.ends import ClientEnd, ServerEnd
from fedkdx_plugin.algorithm.student import StudentClient, StudentServer
from fedkdx_plugin.algorithm.updates import Sender, State, group, labelled
from registry.errors import UserError
from registry.interface import Message, Task, float_state
from registry.parameters import Params, hyper

RESIDUAL = "residual"
SHARE = "share"
SHARPNESS = 4.0  # of `student_share`: chosen on validation windows
SMALLEST_SHARE = 1e-6  # a mixture has no logarithm of 0
CHUNK = 512  # windows in a forward pass
OFF: dict[str, Any] = {
    "serve": "teacher",
    "teacher_init": "own",
    "pull_start": 0.0,
    "pull_end": 0.0,
    "error_feedback": False,
    "quantise": False,
    "downlink": "broadcast",
}


@dataclass(frozen=True)
class AdditionsParams(Params):
    """Hyper-parameters of the additions, to be put before those of the algorithm that they are added to."""

    serve: str = hyper(
        "both",
        "who predicts where a client has trained: one of the two, or both, the student as far as it suits the client",
        choices=("teacher", "student", "both"),
    )
    teacher_init: str = hyper(
        "student",
        "where a client's teacher starts: weights of its own, or the student it is sent",
        choices=("own", "student"),
    )
    pull_start: float = hyper(
        1.0, "how far a teacher goes towards the student it is sent before it trains, in the first round", 0.0, 1.0
    )
    pull_end: float = hyper(
        0.0, "the same in the last round; a straight line between, later for a client that is rarely reached", 0.0, 1.0
    )
    error_feedback: bool = hyper(True, "add what compression dropped to the next update, on both sides")
    quantise: bool = hyper(True, "send what is left of a matrix as 8-bit integers")
    downlink: str = hyper(
        "differences",
        "what a client is sent: every step it missed (eq. 2), or what its own student lacks, compressed for it alone",
        choices=("broadcast", "differences"),
    )


class Feedback(Sender):
    """Makes compressed updates with error feedback and 8-bit factors, each where the parameters ask for it.

    Error feedback: Seide et al. 2014; Karimireddy et al., arXiv:1901.09847.

    Attributes:
        params: an `AdditionsParams`.
        residual: the change that earlier updates left out, of the tensors of which something was; begins as {}.
    """

    params: Any
    residual: State

    def gradient(self, change: State, rate: float) -> State:
        """Return the gradient to send: `change` and the residual, which is kept as a change as rates decay."""
        return super().gradient(owed(change, self.residual), rate)

    def compress(self, gradients: Sequence[State], epsilon: float) -> list[Compressed]:
        """Compress several gradients, each by itself."""
        return compress_together(gradients, epsilon, self.params.quantise)

    def sent(self, gradient: State, payload: State, rate: float) -> None:
        """Keep what the payload leaves out."""
        self.residual = residual_of(gradient, payload, rate) if self.params.error_feedback else {}


class FeedbackBroadcast(Feedback, BroadcastServer):
    """The server's end of the broadcast, which remembers a residual, too."""

    def __init__(self, params: Any) -> None:
        super().__init__()
        self.params, self.residual = params, {}

    def save(self) -> Message:
        """Return the steps, who is at which, and the residual."""
        saved = super().save()
        return Message(labelled(self.residual, RESIDUAL) | dict(saved.tensors), saved.meta)

    def restore(self, saved: Message) -> None:
        """Become what `save` described."""
        super().restore(saved)
        self.residual = group(saved.tensors, RESIDUAL)


class AdditionsClient(Feedback, StudentClient):
    """A client with the additions, to be put before the class of the client that they are added to.

    With `serve` = both, the client notes after each training how well the student that it was sent suits it (see
    `student_share`). What its own training made of the student is not what it will be served.
    """

    def client_end(self) -> ClientEnd:
        """Make this client's end of the downlink that `downlink` names."""
        return DifferencesClient() if self.params.downlink == "differences" else super().client_end()

    @property
    def residual(self) -> State:
        """Return what is kept of it in `memory`, which is what outlives a round."""
        return group(self.memory, RESIDUAL)

    @residual.setter
    def residual(self, residual: State) -> None:
        others = {name: tensor for name, tensor in self.memory.items() if not name.startswith(RESIDUAL)}
        self.memory = others | labelled(residual, RESIDUAL)

    def serves(self) -> str | Mapping[str, float]:
        """Name whom `serve` says, once the client has trained; until then the student."""
        if self.trained and self.params.serve == "both":
            share = float(self.memory[SHARE])
            return {"teacher": 1 - share, "student": share}
        return super().serves()

    def receive(self, message: Message) -> None:
        """Bring the student to W^t, and the teacher towards it."""
        super().receive(message)
        progress = own_progress(message.meta["progress"], self.trained, message.meta["expected"])
        self._pull(linear(progress, self.params.pull_start, self.params.pull_end))

    def _pull(self, share: float) -> None:
        """Move the teacher that share of the way to the student; all of it where it starts there."""
        if self.params.teacher_init == "student" and not self.trained:
            share = 1.0
        if share > 0:
            own, target = (float_state({"teacher": self.nets[name]}) for name in ("teacher", "student"))
            torch._foreach_lerp_(list(own.values()), [target[name] for name in own], share)

    def sent(self, gradient: State, payload: State, rate: float) -> None:
        """Keep what the payload leaves out, and how well the student W^t suits this client."""
        super().sent(gradient, payload, rate)
        if self.params.serve == "both":
            self.load(self.start)
            self.memory = self.memory | {SHARE: student_share(self._student_loss())}

    @torch.no_grad()
    def _student_loss(self) -> Tensor:
        """Return the mean cross-entropy of the student on the client's training windows."""
        x, y, _ = self.data
        student = self.nets["student"].eval()
        return F.cross_entropy(torch.cat([student(chunk).logits for chunk in x.split(CHUNK)]), y)


class AdditionsServer(StudentServer):
    """A server with the additions, to be put before the class of the server that they are added to."""

    @classmethod
    def check(cls, task: Task, params: Any) -> None:
        """Raise UserError where a teacher starts from, or is pulled towards, a student of another kind."""
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
        """Make the server's end of the downlink that `downlink` names."""
        if self.params.downlink == "differences":
            return DifferencesServer(self.weights, self.params.quantise)
        return FeedbackBroadcast(self.params)


def owed(change: State, residual: State) -> State:
    """Return a change and what earlier updates left out; a residual names only tensors of which something was."""
    return {name: tensor + residual[name] if name in residual else tensor for name, tensor in change.items()}


def residual_of(gradient: State, payload: State, rate: float) -> State:
    """Return the change that a payload leaves out, to be owed next time."""
    return {name: rate * tensor for name, tensor in left_out(gradient, payload).items()}


def student_share(loss: Tensor) -> Tensor:
    """Return the student's share in a client's prediction with `serve` = both, in (0, 1/2].

    It counts exp(-4 L) times as much as the teacher: as much where it explains the client's training windows, which
    the teacher was fitted to, and hardly at all where it does not.

    Args:
        loss: L, the student's mean cross-entropy on the client's training windows, before it trained on them: a scalar.
    """
    weight = torch.exp(-SHARPNESS * loss)
    return (weight / (1 + weight)).clamp(min=SMALLEST_SHARE)


def own_progress(progress: float, trained: int, expected: float) -> float:
    """Return how far a client is on the schedule of its pull, in (0, 1]: as far as the round, unless rarely reached.

    One that trains in less than half the rounds it was to expect is only as far as these have taken it. Its teacher is
    old, and what it has learnt by itself is little, so that it goes on starting from the student.

    Args:
        progress: ρ of the round.
        trained: rounds it has trained in before.
        expected: rounds of a whole run in which a client takes part on average.
    """
    return min(progress, (trained + 1) / (expected / 2))
