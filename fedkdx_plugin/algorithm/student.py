"""A student that all clients hold in common, moved only by compressed updates (paper eq. 2, 9, 10; Algorithm 1).

FedKDX and FedKD share this. A client uploads its accumulated gradient (W^t - W_k)/η_k, compressed. The server averages,
compresses the average with the same threshold, and moves its student by what it is about to send, so that its copy
and the clients' stay the same. A client is told on contact which steps it missed; where those would be larger than the
student itself, or the client is new, the whole student is sent instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkdx_plugin.algorithm.aggregation import sample_weights, weighted_sum
from fedkdx_plugin.algorithm.compression import (
    compress,
    compress_with_feedback,
    decompress,
    energy_kept,
    energy_threshold,
    rank_share,
)
from registry.errors import UserError
from registry.interface import BadMessage, Client, Message, Round, Server, Task, float_state, mixture
from registry.messages import check_state
from registry.parameters import hyper

VERSION = "version"
RESIDUAL = "residual/"
SERVES = "serves"
FIGURES = ("epsilon", "rank_share", "energy_kept", "bytes_share")
HELD_OUT = 0.1  # of the training windows, where validation decides who predicts
CHUNK = 512  # windows in a forward pass
FLOAT = torch.finfo(torch.float32)
PREDICTORS: dict[str, str | dict[str, float]] = {
    "teacher": "teacher",
    "student": "student",
    "ensemble": {"teacher": 0.5, "student": 0.5},
}


@dataclass(frozen=True)
class CompressionParams:
    """Hyper-parameters of the compressed exchange."""

    epsilon_start: float = hyper(0.9, "share of energy kept in the first round (eq. 10)", 0.0, 1.0)
    epsilon_end: float = hyper(0.98, "share of energy kept in the last round (eq. 10)", 0.0, 1.0)
    error_feedback: bool = hyper(False, "add what compression dropped to the next update, on both sides")
    quantise: bool = hyper(False, "send what is left of a matrix as 8-bit integers")
    weights: str = hyper(
        "samples", "how updates are averaged: by number of samples, or all alike", choices=("samples", "uniform")
    )


@dataclass(frozen=True)
class StudentParams(CompressionParams):
    """Hyper-parameters of the pair of teacher and student."""

    serve: str = hyper(
        "teacher",
        "who predicts where a client has trained: one of the two, their mean, or what does best on held-out windows",
        choices=(*PREDICTORS, "validation"),
    )
    teacher_init: str = hyper(
        "own",
        "where a client's teacher starts: weights of its own, or the student it is sent",
        choices=("own", "student"),
    )
    teacher_pull: float = hyper(
        0.0, "how far a teacher goes towards the student it is sent, each time before it trains", 0.0, 1.0
    )


class StudentClient(Client):
    """Trains a private teacher and a copy of the student; sends the student's compressed update.

    With `serve` = validation, a tenth of its windows is never trained on, and after each training the client notes
    which of teacher, shared student and the mean of both has the least loss there. The student is the one it was
    sent: what its own training made of it is not what it will be served.
    """

    kept = ("student.*",)

    def __init__(self, id: int, task: Any, params: Any, samples: int) -> None:
        super().__init__(id, task, params, samples)
        self.epsilon = 1.0
        self.start: dict[str, Tensor] = {}  # the student as the server has it, W^t

    def holdout(self) -> float:
        return HELD_OUT if self.params.serve == "validation" else 0.0

    def serves(self) -> str | Mapping[str, float]:
        """As `serve` says, once the client has trained; until then the student."""
        if not self.trained:
            return "student"
        if self.params.serve == "validation":
            return list(PREDICTORS.values())[int(self.memory[SERVES])]
        return PREDICTORS[self.params.serve]

    def receive(self, message: Message) -> None:
        if message.meta["full"]:
            self.load(message.tensors)
        else:
            self._catch_up(message)
        self.memory[VERSION] = torch.tensor(message.meta[VERSION])
        self.epsilon = message.meta["epsilon"]
        self.start = {name: tensor.clone() for name, tensor in self.shared().items()}
        self._pull()

    def _pull(self) -> None:
        """The teacher goes to the student, all the way where it starts there, else as far as `teacher_pull` says."""
        starts = self.params.teacher_init == "student" and not self.trained
        share = 1.0 if starts else self.params.teacher_pull
        if share > 0:
            own, target = (float_state({"teacher": self.nets[name]}) for name in ("teacher", "student"))
            self.load({name: tensor.lerp(target[name], share) for name, tensor in own.items()})

    def _catch_up(self, message: Message) -> None:
        own = int(self.memory[VERSION]) if VERSION in self.memory else None
        if own is None or own < message.meta["since"]:
            raise BadMessage(
                f"client {self.id}: student is at step {own}, the server's steps start at {message.meta['since']}"
            )
        for version, rate in message.meta["rates"]:
            if version > own:
                move(self.shared(), _group(message.tensors, version), rate)

    def reply(self) -> Message:
        """The update since W^t as a gradient; the student goes back to W^t, as only the server moves it."""
        rate, trained = self.learning_rate, self.shared()
        change = {name: start - trained[name] for name, start in self.start.items()}
        residual = _residual(self.memory) if self.params.error_feedback else None
        payload, left = _send(change, rate, self.epsilon, residual, self.params.quantise)
        self.memory = {VERSION: self.memory[VERSION]} | {RESIDUAL + name: tensor for name, tensor in left.items()}
        self.load(self.start)
        if self.params.serve == "validation":
            self.memory[SERVES] = self._best_on_validation()
        return Message(payload, {"samples": self.samples, "rate": rate})

    @torch.no_grad()
    def _best_on_validation(self) -> Tensor:
        """Which of `PREDICTORS` has the least cross-entropy on the held-out windows, by its place."""
        x, y, _ = self.validation
        logits = {}
        for name in ("teacher", "student"):
            net = self.nets[name].eval()
            logits[name] = torch.cat([net(chunk).logits for chunk in x.split(CHUNK)])
        losses = [F.cross_entropy(mixture(logits, serves), y) for serves in PREDICTORS.values()]
        return torch.stack(losses).argmin()


@dataclass
class Step:
    """One movement of the student: W ← W - rate · decompress(payload)."""

    version: int
    rate: float
    payload: dict[str, Tensor] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes sent."""
        return _bytes(self.payload)


class StudentServer(Server):
    """Averages compressed student updates and sends the compressed average (eq. 2)."""

    Client = StudentClient
    Params = StudentParams

    @classmethod
    def check(cls, task: Task, params: Any) -> None:
        """A teacher that starts from the student, or is pulled towards it, must be of its kind."""
        if task.model_class is task.student_class:
            return
        for name, apart in (("teacher_init", "own"), ("teacher_pull", 0.0)):
            if (asked := getattr(params, name)) != apart:
                raise UserError(
                    f"{name}={asked}: the student is a {task.student_class.__name__}, the teacher a "
                    f"{task.model_class.__name__}; leave -sm out, or use {name}={apart}"
                )

    def __init__(self, task: Any, params: Any, initial: Mapping[str, Tensor]) -> None:
        super().__init__(task, params, initial)
        self.version = 0
        self.steps: list[Step] = []
        self.synced: dict[int, int] = {}  # client -> the version it is known to hold
        self.residual: dict[str, Tensor] = {}
        self.told: dict[str, float | Tensor] = dict.fromkeys(FIGURES, math.nan)

    def epsilon(self, round: Round) -> float:
        """ε(ρ), eq. 10."""
        return energy_threshold(round.progress, self.params.epsilon_start, self.params.epsilon_end)

    def message(self, client: int, round: Round) -> Message:
        meta = {"full": False, VERSION: self.version, "epsilon": self.epsilon(round)}
        since = self.synced.get(client, -1)
        missed = [step for step in self.steps if step.version > since]
        known = since >= self.version - len(self.steps)
        if not known or sum(step.size for step in missed) > _bytes(self.weights):
            return Message(self.weights, meta | {"full": True})
        tensors = {f"{step.version}/{name}": tensor for step in missed for name, tensor in step.payload.items()}
        rates = [[step.version, step.rate] for step in missed]
        return Message(tensors, meta | {"since": since, "rates": rates})

    def check_reply(self, client: int, reply: Message) -> None:
        """A payload that gives an update of the student's shape, and a rate by which it stays finite."""
        gradient = decompress(reply.tensors, {name: tensor.shape for name, tensor in self.weights.items()})
        check_state(Message(gradient, reply.meta), self.weights)
        rate = reply.meta.get("rate")
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not FLOAT.tiny <= rate <= FLOAT.max:
            raise BadMessage(f"'rate' must be a positive number, not {rate!r}")
        finite = [(rate * tensor).isfinite().all() for tensor in gradient.values()]
        if finite and not torch.stack(finite).all():
            raise BadMessage(f"the update at a rate of {rate:g} is not finite")

    def aggregate(self, replies: Mapping[int, Message], round: Round) -> None:
        # what a client holds is learnt from its replies alone: one whose reply was lost may be ahead, never behind
        self.synced.update(dict.fromkeys(replies, self.version))
        uniform = [1 / len(replies)] * len(replies)
        shares = uniform if self.params.weights == "uniform" else sample_weights(replies)
        rates = [reply.meta["rate"] for reply in replies.values()]
        shapes = {name: tensor.shape for name, tensor in self.weights.items()}
        gradients = [decompress(reply.tensors, shapes) for reply in replies.values()]
        change = weighted_sum(gradients, [share * rate for share, rate in zip(shares, rates, strict=True)])
        rate = sum(share * rate for share, rate in zip(shares, rates, strict=True))
        residual = self.residual if self.params.error_feedback else None
        payload, left = _send(change, rate, self.epsilon(round), residual, self.params.quantise)
        self.told = self._tell(payload, change, rate, round)
        self.residual = left
        self.weights = {name: tensor.clone() for name, tensor in self.weights.items()}
        move(self.weights, payload, rate)
        self.version += 1
        self.steps.append(Step(self.version, rate, payload))
        while sum(step.size for step in self.steps) > _bytes(self.weights):
            del self.steps[0]

    def _tell(
        self, payload: Mapping[str, Tensor], change: Mapping[str, Tensor], rate: float, round: Round
    ) -> dict[str, float | Tensor]:
        """`FIGURES` of the payload about to be sent, which was made of `change` and what is left of earlier ones."""
        whole = {name: (t + self.residual[name] if name in self.residual else t) / rate for name, t in change.items()}
        shapes = {name: tensor.shape for name, tensor in change.items()}
        figures = (
            self.epsilon(round),
            rank_share(payload, shapes),
            energy_kept(payload, whole),
            _bytes(payload) / _bytes(change),
        )
        return dict(zip(FIGURES, figures, strict=True))

    def figures(self) -> Mapping[str, float]:
        """ε, and of the last broadcast: mean R / min(P, Q), share of the energy kept, bytes as a share of dense.

        To six digits: the last bits of a sum depend on how tensors lie in memory, which is not kept over a restart.
        """
        return {name: float(f"{float(value):.6g}") for name, value in self.told.items()}

    def save(self) -> Message:
        tensors = {f"weights/{name}": tensor for name, tensor in self.weights.items()}
        tensors |= {RESIDUAL + name: tensor for name, tensor in self.residual.items()}
        for step in self.steps:
            tensors |= {f"{step.version}/{name}": tensor for name, tensor in step.payload.items()}
        synced = sorted(self.synced.items())
        return Message(
            tensors, {VERSION: self.version, "synced": synced, "rates": [[s.version, s.rate] for s in self.steps]}
        )

    def restore(self, saved: Message) -> None:
        self.weights = _group(saved.tensors, "weights")
        self.residual = _residual(saved.tensors)
        self.version = saved.meta[VERSION]
        self.synced = dict(map(tuple, saved.meta["synced"]))
        self.steps = [Step(version, rate, _group(saved.tensors, version)) for version, rate in saved.meta["rates"]]


def move(weights: Mapping[str, Tensor], payload: Mapping[str, Tensor], rate: float) -> None:
    """Eq. 2 in place: W ← W - rate · G. Server and clients call this alone, so that their copies stay the same."""
    gradient = decompress(payload, {name: tensor.shape for name, tensor in weights.items()})
    for name, tensor in weights.items():
        tensor.sub_(gradient[name], alpha=rate)


def _send(
    change: Mapping[str, Tensor],
    rate: float,
    epsilon: float,
    residual: Mapping[str, Tensor] | None,
    quantise: bool,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The payload for the gradient `change`/`rate`, and the change it leaves out, to be added next time.

    Without a residual, no error feedback: nothing is left over. Residuals are kept as changes, since rates decay.
    """
    gradient = {name: tensor / rate for name, tensor in change.items()}
    if residual is None:
        return compress(gradient, epsilon, quantise).payload, {}
    waiting = {name: tensor / rate for name, tensor in residual.items()}
    compressed, left = compress_with_feedback(gradient, waiting, epsilon, quantise)
    return compressed.payload, {name: rate * tensor for name, tensor in left.items()}


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _group(tensors: Mapping[str, Tensor], key: int | str) -> dict[str, Tensor]:
    """The tensors below `key/`, without it."""
    prefix = f"{key}/"
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _residual(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _group(tensors, RESIDUAL.rstrip("/"))
