"""Base of FedKDX and FedKD: private teachers and a shared student, whose updates are sent compressed (Algorithm 1).

A client trains its own teacher and a copy of the student. It uploads the student's update as an accumulated gradient
(W^t - W_k)/η_k, compressed. The server averages these, and a `downlink` sends the student's change to the clients: the
paper's broadcast (eq. 2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedkdx_plugin.algorithm.compression import compress_like, decompress, linear
from fedkdx_plugin.algorithm.downlink.broadcast import BroadcastClient, BroadcastServer
from fedkdx_plugin.algorithm.downlink.ends import METRICS, VERSION, ClientEnd, ServerEnd
from fedkdx_plugin.algorithm.updates import Sender, State, difference, group, labelled
from registry.aggregation import sample_weights
from registry.interface import BadMessage, Client, Message, Round, Server
from registry.messages import VARIANCE, check_samples, check_tensors, check_variances
from registry.parameters import Params, option
from registry.tensors import copied, first_nonfinite
from registry.text import shown

if TYPE_CHECKING:
    from typing_extensions import Self

LEAST_RATE = torch.finfo(torch.float32).tiny
MOST_RATE = 2.0**64  # see `check_rate`


@dataclass(frozen=True)
class StudentParams(Params):
    """Hyper-parameters of teacher and student, and of the compressed exchange."""

    epsilon_start: float = option(0.9, "share of energy kept in the first round (eq. 10)", 0.0, 1.0)
    epsilon_end: float = option(0.98, "share of energy kept in the last round (eq. 10)", 0.0, 1.0)
    weights: str = option(
        "samples", "weights of the averaged updates: by number of samples, or all equal", choices=("samples", "uniform")
    )
    serve: str = option(
        "teacher", "which network predicts for a client that has trained", choices=("teacher", "student")
    )


class StudentClient(Sender, Client):
    """Trains a private teacher and a copy of the student; sends the student's compressed update.

    Attributes:
        downlink: this client's end of the downlink.
        epsilon: ε of the round.
        start: the student at the start of the round, W^t.
        base: the student to restore after training, since only the server's messages change it.
        prepared: the compressed payload, if `before_replies` made it; else {}.
    """

    kept = ("student.*",)

    def __init__(self, id: int, task: Any, params: Any, samples: int) -> None:
        super().__init__(id, task, params, samples)
        self.downlink = self.client_end()
        self.epsilon = 1.0
        self.start: State = {}
        self.base: State = {}
        self.prepared: State = {}

    def client_end(self) -> ClientEnd:
        """Return this client's end of the downlink."""
        return BroadcastClient()

    def serves(self) -> str | Mapping[str, float]:
        """Return the network that `serve` names once the client has trained; until then the student."""
        return self.params.serve if self.trained else "student"

    def receive(self, message: Message) -> None:
        """Update the student to W^t."""
        self.base = self.downlink.receive(self, message)
        self.start = copied(self.shared())
        self.epsilon, self.prepared = message.meta["epsilon"], {}

    @classmethod
    def before_replies(cls, clients: Sequence[Self], states: Sequence[Mapping[str, Tensor]]) -> None:
        """Compress the gradients of all clients at once, except those with NaN or infinity, which `reply` refuses."""
        gradients = [client._accumulated(state) for client, state in zip(clients, states, strict=True)]
        sound = list(range(len(gradients)))
        if first_nonfinite({f"{place}/{name}": t for place in sound for name, t in gradients[place].items()}):
            sound = [place for place in sound if first_nonfinite(gradients[place]) is None]
        # the server's ε is the same for all in a round
        made = clients[0].compress([gradients[place] for place in sound], clients[0].epsilon)
        for place, compressed in zip(sound, made, strict=True):
            clients[place].prepared = compressed.payload

    def _accumulated(self, trained: Mapping[str, Tensor]) -> State:
        """Return the accumulated gradient, from the student's state after training."""
        return self.gradient(difference(self.start, trained), self.learning_rate)

    def reply(self) -> Message:
        """Return the update since W^t as a compressed gradient, and restore the student."""
        gradient = self._accumulated(self.shared())
        payload = self.prepared or self.compress([gradient], self.epsilon)[0].payload
        self.sent(gradient, payload, self.learning_rate)
        self.load(self.base)
        return Message(payload, {"samples": self.samples, "rate": self.learning_rate})


class StudentServer(Server):
    """Averages compressed student updates.

    A reply is decompressed once: `check_reply` calls `_gradient` first, `aggregate` calls it again for the same reply.

    Attributes:
        version: number of steps that the student has made.
        downlink: the server's end of the downlink.
        recorded: result of `figures`, before rounding.
    """

    Client = StudentClient
    Params = StudentParams
    averages = True
    beyond_average = ""

    def __init__(self, task: Any, params: Any, initial: Mapping[str, Tensor]) -> None:
        super().__init__(task, params, initial)
        self.version = 0
        self.downlink = self.server_end()
        self.recorded: dict[str, float | Tensor] = dict.fromkeys(("epsilon", *METRICS), math.nan)
        self._decompressed: dict[int, tuple[Message, State]] = {}  # client -> (last reply, its gradient)

    def server_end(self) -> ServerEnd:
        """Return the server's end of the downlink."""
        return BroadcastServer()

    def epsilon(self, round: Round) -> float:
        """Return ε(ρ), eq. 10."""
        return linear(round.progress, self.params.epsilon_start, self.params.epsilon_end)

    def messages(self, clients: Sequence[int], round: Round) -> dict[int, Message]:
        """Return the messages to several clients, compressed together."""
        self.downlink.prepare(clients, self.weights, self.version, self.epsilon(round))
        return super().messages(clients, round)

    def message(self, client: int, round: Round) -> Message:
        """Return the downlink's message for W^t, with ε, ρ, and the expected number of rounds in which a client trains.

        Clients of the paper's method use only ε.
        """
        epsilon = self.epsilon(round)
        down = self.downlink.message(client, self.weights, self.version, epsilon)
        schedule = {"epsilon": epsilon, "progress": round.progress, "expected": round.expected}
        return Message(down.tensors, {**down.meta, VERSION: self.version, **schedule})

    def check_reply(self, client: int, reply: Message) -> None:
        """Require a payload that gives a finite update of the student's shape, also multiplied by its rate."""
        gradient = self._gradient(client, reply)
        check_tensors(gradient, self.weights)
        check_samples(reply)
        rate = check_rate(reply)
        step = self.contribution(client, reply)
        if first_nonfinite(step) is not None:
            raise BadMessage(f"the update at a rate of {rate:g} is not finite")
        check_variances({name: self.weights[name] - step[name] for name in step if name.endswith(VARIANCE)})

    def contribution(self, client: int, reply: Message) -> Mapping[str, Tensor]:
        """Return the update that a reply asks for: its decompressed gradient times its rate."""
        gradient = self._gradient(client, reply)
        steps = torch._foreach_mul(list(gradient.values()), float(reply.meta["rate"]))
        return dict(zip(gradient, steps, strict=True))

    def idle(self, sent: Message) -> Mapping[str, Tensor]:
        """Return nothing: a client that gives back what it was sent has no update."""
        return {}

    def forged(self, reply: Message, contribution: Mapping[str, Tensor]) -> Message:
        """Return a reply that asks for another update, compressed to the ranks of the first, and so of its size."""
        rate = float(reply.meta["rate"])
        return Message(compress_like(reply.tensors, {n: t / rate for n, t in contribution.items()}), reply.meta)

    def _gradient(self, client: int, reply: Message) -> State:
        """Return the decompressed gradient of a reply; it is kept until the next `aggregate`."""
        known, gradient = self._decompressed.get(client, (None, {}))
        if known is not reply:
            gradient = decompress(reply.tensors, {name: tensor.shape for name, tensor in self.weights.items()})
            self._decompressed[client] = reply, gradient
        return gradient

    def aggregate(self, replies: Mapping[int, Message], round: Round) -> None:
        """Average the updates; the downlink applies the mean to the student.

        A private mean must not depend on clients' rates, so that its step counts as one at a rate of 1: the change is
        the same, compressed or not, as compression knows no scale.
        """
        uniform = [1 / max(len(replies), 1)] * len(replies)
        given = uniform if self.params.weights == "uniform" else sample_weights(replies)
        shares = self.average.shares(given)
        rates = [reply.meta["rate"] for reply in replies.values()]
        gradients = [self._gradient(client, reply) for client, reply in replies.items()]
        self._decompressed.clear()
        unchanged = {name: torch.zeros_like(own) for name, own in self.weights.items()}
        change = self.average(gradients, shares, rates, around=unchanged)
        rate = 1.0 if self.average.private else sum(s * rate for s, rate in zip(shares, rates, strict=True))
        epsilon = self.epsilon(round)
        self.weights, metrics = self.downlink.step(self.weights, self.version, epsilon, change, rate, replies)
        self.version += 1
        self.recorded = {"epsilon": epsilon, **{name: _mean([one[name] for one in metrics]) for name in METRICS}}

    def figures(self) -> Mapping[str, float]:
        """Return ε, and the mean `METRICS` of the payloads of the last round.

        Rounded to six digits: the last bits of a sum depend on memory layout, which is different after a restart.
        """
        return {name: float(f"{float(value):.6g}") for name, value in self.recorded.items()}

    def save(self) -> Message:
        """Return the student and the state of the downlink."""
        down = self.downlink.save()
        tensors = labelled(self.weights, "weights") | labelled(down.tensors, "downlink")
        return Message(tensors, {VERSION: self.version, "downlink": down.meta})

    def restore(self, saved: Message) -> None:
        """Restore what `save` returned."""
        self.weights = group(saved.tensors, "weights")
        self.version = saved.meta[VERSION]
        self.downlink.restore(Message(group(saved.tensors, "downlink"), saved.meta["downlink"]))


def check_rate(reply: Message) -> float:
    """Return the learning rate that a reply states. Raises BadMessage if it is missing or out of range.

    The mean change divided by the mean rate is the gradient of eq. 2, for all clients. With rates up to `MOST_RATE`,
    float32 holds it in all digits for changes of 1e-18 and more; a single rate near the largest number would round the
    others' changes to 0. A small rate needs no such bound: it takes no digits from others.
    """
    rate = reply.meta.get("rate")
    if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not LEAST_RATE <= rate <= MOST_RATE:
        raise BadMessage(f"'rate' must be a number from {LEAST_RATE:.3g} to {MOST_RATE:.3g}, not {shown(repr(rate))}")
    return float(rate)


def _mean(values: list[float | Tensor]) -> float | Tensor:
    """Return the mean of the values; NaN without any."""
    return sum(values) / len(values) if values else math.nan
