"""The client of FedKDX and FedKD: a private teacher, and a student that is the server's (paper eq. 2; Algorithm 1).

It uploads what training made of the student as an accumulated gradient (W^t - W_k)/η_k, compressed. What comes down is
one of the two ways of `downlink`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fedkdx_plugin.algorithm.compression import compress, compress_together, linear
from fedkdx_plugin.algorithm.updates import difference, group, labelled, move, owed, residual_of
from registry.interface import BadMessage, Client, Message, float_state
from registry.parameters import Params, hyper
from registry.tensors import copied, first_nonfinite

VERSION = "version"
RESIDUAL = "residual"
PENDING = "pending"
SAME_SUM = 1e-5  # of the sum of absolute values: initial weights may differ in their last bits between machines
SHARE = "share"
SHARPNESS = 4.0  # of `student_share`: chosen on validation windows
SMALLEST_SHARE = 1e-6  # a mixture has no logarithm of 0
CHUNK = 512  # windows in a forward pass


@dataclass(frozen=True)
class CompressionParams(Params):
    """Hyper-parameters of the compressed exchange."""

    epsilon_start: float = hyper(0.9, "share of energy kept in the first round (eq. 10)", 0.0, 1.0)
    epsilon_end: float = hyper(0.98, "share of energy kept in the last round (eq. 10)", 0.0, 1.0)
    error_feedback: bool = hyper(False, "add what compression dropped to the next update, on both sides")
    quantise: bool = hyper(False, "send what is left of a matrix as 8-bit integers")
    downlink: str = hyper(
        "broadcast",
        "what a client is sent: every step it missed (eq. 2), or what its own student lacks, compressed for it alone",
        choices=("broadcast", "differences"),
    )
    weights: str = hyper(
        "samples", "how updates are averaged: by number of samples, or all alike", choices=("samples", "uniform")
    )


@dataclass(frozen=True)
class StudentParams(CompressionParams):
    """Hyper-parameters of the pair of teacher and student."""

    serve: str = hyper(
        "teacher",
        "who predicts where a client has trained: one of the two, or both, the student as far as it suits the client",
        choices=("teacher", "student", "both"),
    )
    teacher_init: str = hyper(
        "own",
        "where a client's teacher starts: weights of its own, or the student it is sent",
        choices=("own", "student"),
    )
    pull_start: float = hyper(
        0.0, "how far a teacher goes towards the student it is sent before it trains, in the first round", 0.0, 1.0
    )
    pull_end: float = hyper(
        0.0, "the same in the last round; a straight line between, later for a client that is rarely reached", 0.0, 1.0
    )


class StudentClient(Client):
    """Trains a private teacher and a copy of the student; sends the student's compressed update.

    With `serve` = both, the client notes after each training how well the student that it was sent suits it (see
    `student_share`). What its own training made of the student is not what it will be served.
    """

    kept = ("student.*",)

    def __init__(self, id: int, task: Any, params: Any, samples: int) -> None:
        super().__init__(id, task, params, samples)
        self.epsilon = 1.0
        self.start: dict[str, Tensor] = {}  # the student it was brought to, W^t
        self.base: dict[str, Tensor] = {}  # the student it goes back to after training
        self.prepared: dict[str, Tensor] = {}  # what it will send, where it is already compressed

    def serves(self) -> str | Mapping[str, float]:
        """As `serve` says, once the client has trained; until then the student."""
        if not self.trained:
            return "student"
        if self.params.serve == "both":
            share = float(self.memory[SHARE])
            return {"teacher": 1 - share, "student": share}
        return self.params.serve

    def receive(self, message: Message) -> None:
        meta = message.meta
        if "since" not in meta:
            self.load(message.tensors)
            self._hold(meta[VERSION])
        elif "rates" in meta:
            self._catch_up(message)
            self._hold(meta[VERSION])
        else:
            self._settle(meta["since"], meta.get("sums"))
            move(self.shared(), message.tensors, 1.0)
            self.memory |= {PENDING: torch.tensor(meta[VERSION])} | labelled(message.tensors, PENDING)
        self.epsilon, self.prepared = meta["epsilon"], {}
        self.start = copied(self.shared())
        progress = own_progress(meta["progress"], self.trained, meta["expected"])
        self._pull(linear(progress, self.params.pull_start, self.params.pull_end))

    def _hold(self, version: int) -> None:
        """The student as it is now is the one to go back to."""
        self.memory = {name: t for name, t in self.memory.items() if not name.startswith(PENDING)}
        self.memory[VERSION] = torch.tensor(version)
        self.base = copied(self.shared())

    def _settle(self, since: int, initial: Mapping[str, float] | None) -> None:
        """Become the student that the server knows of: with the last difference where that counted, else without.

        One that the server has had no reply of is still at its first student, whose sums it is told.
        """
        held = {name: int(self.memory[name]) for name in (VERSION, PENDING) if name in self.memory}
        if initial is not None and VERSION not in held:
            self._check_initial(initial)
        elif held.get(PENDING) == since:
            move(self.shared(), group(self.memory, PENDING), 1.0)
        elif held.get(VERSION) != since:
            has = " and ".join(map(str, held.values())) or "none"
            raise BadMessage(f"client {self.id}: students held are of steps {has}, the server's difference of {since}")
        self._hold(since)

    def _check_initial(self, sums: Mapping[str, float]) -> None:
        for name, tensor in self.shared().items():
            off = abs(float(tensor.double().sum()) - sums.get(name, math.nan))
            if not off <= SAME_SUM * (1 + float(tensor.double().abs().sum())):
                raise BadMessage(f"client {self.id}: '{name}' does not begin as the server's: another seed or model?")

    def _pull(self, share: float) -> None:
        """The teacher goes that share of the way to the student; all of it where it starts there."""
        if self.params.teacher_init == "student" and not self.trained:
            share = 1.0
        if share > 0:
            own, target = (float_state({"teacher": self.nets[name]}) for name in ("teacher", "student"))
            torch._foreach_lerp_(list(own.values()), [target[name] for name in own], share)

    def _catch_up(self, message: Message) -> None:
        own = int(self.memory[VERSION]) if VERSION in self.memory else None
        if own is None or own < message.meta["since"]:
            raise BadMessage(
                f"client {self.id}: student is at step {own}, the server's steps start at {message.meta['since']}"
            )
        for version, rate in message.meta["rates"]:
            if version > own:
                move(self.shared(), group(message.tensors, version), rate)

    @classmethod
    def before_replies(cls, clients: Sequence[StudentClient], states: Sequence[Mapping[str, Tensor]]) -> None:
        """Compress all gradients at once, but those that will be refused for NaN or infinity."""
        gradients = [client._gradient(state) for client, state in zip(clients, states, strict=True)]
        sound = list(range(len(gradients)))
        if first_nonfinite({f"{place}/{name}": t for place in sound for name, t in gradients[place].items()}):
            sound = [place for place in sound if first_nonfinite(gradients[place]) is None]
        epsilon, quantise = clients[0].epsilon, clients[0].params.quantise  # the server's, the same for all in a round
        made = compress_together([gradients[place] for place in sound], epsilon, quantise)
        for place, compressed in zip(sound, made, strict=True):
            clients[place].prepared = compressed.payload

    def _gradient(self, trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The accumulated gradient to send, with what earlier ones left out where that is fed back."""
        return owed(difference(self.start, trained), self.learning_rate, group(self.memory, RESIDUAL))

    def reply(self) -> Message:
        """The update since W^t as a gradient; the student goes back, as only the server moves it."""
        gradient, rate = self._gradient(self.shared()), self.learning_rate
        payload = self.prepared or compress(gradient, self.epsilon, self.params.quantise).payload
        left = residual_of(gradient, payload, rate) if self.params.error_feedback else {}
        kept = {name: t for name, t in self.memory.items() if name.startswith((VERSION, PENDING))}
        self.memory = kept | labelled(left, RESIDUAL)
        if self.params.serve == "both":
            self.load(self.start)
            self.memory[SHARE] = student_share(self._student_loss())
        self.load(self.base)
        return Message(payload, {"samples": self.samples, "rate": rate})

    @torch.no_grad()
    def _student_loss(self) -> Tensor:
        """Mean cross-entropy of the student on the client's training windows."""
        x, y, _ = self.data
        student = self.nets["student"].eval()
        return F.cross_entropy(torch.cat([student(chunk).logits for chunk in x.split(CHUNK)]), y)


def student_share(loss: Tensor) -> Tensor:
    """The student's share in a client's prediction with `serve` = both, in (0, 1/2].

    It counts exp(-4 L) times as much as the teacher: as much where it explains the client's training windows, which
    the teacher was fitted to, and hardly at all where it does not.

    Args:
        loss: L, the student's mean cross-entropy on the client's training windows, before it trained on them: a scalar.
    """
    weight = torch.exp(-SHARPNESS * loss)
    return (weight / (1 + weight)).clamp(min=SMALLEST_SHARE)


def own_progress(progress: float, trained: int, expected: float) -> float:
    """How far a client is on the schedule of its pull, in (0, 1]: as far as the round, unless it is rarely reached.

    One that trains in less than half the rounds it was to expect is only as far as these have taken it. Its teacher is
    old, and what it has learnt by itself is little, so that it goes on starting from the student.

    Args:
        progress: ρ of the round.
        trained: rounds it has trained in before.
        expected: rounds of a whole run in which a client takes part on average.
    """
    return min(progress, (trained + 1) / (expected / 2))
