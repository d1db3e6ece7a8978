"""What FedKDX and FedKD share: private teachers and one student, whose updates travel compressed (Algorithm 1).

A client trains a teacher of its own and a copy of the student. It uploads what training made of the student as an
accumulated gradient (W^t - W_k)/η_k, compressed; the server averages these, and the student gets back to the clients by
a `downlink`, which is the paper's broadcast (eq. 2).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedkdx_plugin.algorithm.compression import decompress, linear
from fedkdx_plugin.algorithm.downlink.broadcast import BroadcastClient, BroadcastServer
from fedkdx_plugin.algorithm.downlink.ends import FIGURES, VERSION, ClientEnd, ServerEnd
from fedkdx_plugin.algorithm.updates import Sender, State, difference, group, labelled
from registry.aggregation import sample_weights, weighted_sum
from registry.interface import BadMessage, Client, Message, Round, Server
from registry.messages import check_state
from registry.parameters import Params, hyper
from registry.tensors import copied, first_nonfinite

FLOAT = torch.finfo(torch.float32)


@dataclass(frozen=True)
class StudentParams(Params):
    """Hyper-parameters of the pair of teacher and student, and of the compressed exchange."""

    epsilon_start: float = hyper(0.9, "share of energy kept in the first round (eq. 10)", 0.0, 1.0)
    epsilon_end: float = hyper(0.98, "share of energy kept in the last round (eq. 10)", 0.0, 1.0)
    weights: str = hyper(
        "samples", "how updates are averaged: by number of samples, or all alike", choices=("samples", "uniform")
    )
    serve: str = hyper("teacher", "who predicts where a client has trained", choices=("teacher", "student"))


class StudentClient(Sender, Client):
    """Trains a private teacher and a copy of the student; sends the student's compressed update.

    Attributes:
        downlink: this client's end of it.
        epsilon: ε of the round.
        start: the student it was brought to, W^t.
        base: the student it goes back to after training, as only the server moves it.
        prepared: what it will send, where it is already compressed.
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
        """Make this client's end of the downlink."""
        return BroadcastClient()

    def serves(self) -> str | Mapping[str, float]:
        """Name whom `serve` says once the client has trained; until then the student."""
        return self.params.serve if self.trained else "student"

    def receive(self, message: Message) -> None:
        """Bring the student to W^t."""
        self.base = self.downlink.receive(self, message)
        self.start = copied(self.shared())
        self.epsilon, self.prepared = message.meta["epsilon"], {}

    @classmethod
    def before_replies(cls, clients: Sequence[StudentClient], states: Sequence[Mapping[str, Tensor]]) -> None:
        """Compress all gradients at once, but those that will be refused for NaN or infinity."""
        gradients = [client._accumulated(state) for client, state in zip(clients, states, strict=True)]
        sound = list(range(len(gradients)))
        if first_nonfinite({f"{place}/{name}": t for place in sound for name, t in gradients[place].items()}):
            sound = [place for place in sound if first_nonfinite(gradients[place]) is None]
        # the server's ε is the same for all in a round
        made = clients[0].compress([gradients[place] for place in sound], clients[0].epsilon)
        for place, compressed in zip(sound, made, strict=True):
            clients[place].prepared = compressed.payload

    def _accumulated(self, trained: Mapping[str, Tensor]) -> State:
        return self.gradient(difference(self.start, trained), self.learning_rate)

    def reply(self) -> Message:
        """Return the update since W^t as a compressed gradient; the student goes back."""
        gradient = self._accumulated(self.shared())
        payload = self.prepared or self.compress([gradient], self.epsilon)[0].payload
        self.sent(gradient, payload, self.learning_rate)
        self.load(self.base)
        return Message(payload, {"samples": self.samples, "rate": self.learning_rate})


class StudentServer(Server):
    """Averages compressed student updates.

    A reply is decompressed once, by `_gradient`: `check_reply` asks first, `aggregate` asks again for the same reply.

    Attributes:
        version: number of steps that the student has made.
        downlink: the server's end of it.
        told: figures of the last round.
    """

    Client = StudentClient
    Params = StudentParams

    def __init__(self, task: Any, params: Any, initial: Mapping[str, Tensor]) -> None:
        super().__init__(task, params, initial)
        self.version = 0
        self.downlink = self.server_end()
        self.told: dict[str, float | Tensor] = dict.fromkeys(("epsilon", *FIGURES), math.nan)
        self._decompressed: dict[int, tuple[Message, State]] = {}  # client -> its last reply, what that says

    def server_end(self) -> ServerEnd:
        """Make the server's end of the downlink."""
        return BroadcastServer()

    def epsilon(self, round: Round) -> float:
        """Return ε(ρ), eq. 10."""
        return linear(round.progress, self.params.epsilon_start, self.params.epsilon_end)

    def messages(self, clients: Sequence[int], round: Round) -> dict[int, Message]:
        """Return what each is sent, all made together."""
        self.downlink.prepare(clients, self.weights, self.version, self.epsilon(round))
        return super().messages(clients, round)

    def message(self, client: int, round: Round) -> Message:
        """Return what brings a client to W^t, with ε, ρ, and the rounds that a client is expected to take part in.

        Clients of the paper's method need ε alone.
        """
        epsilon = self.epsilon(round)
        down = self.downlink.message(client, self.weights, self.version, epsilon)
        told = {VERSION: self.version, "epsilon": epsilon, "progress": round.progress}
        return Message(down.tensors, down.meta | told | {"expected": round.total * round.share})

    def check_reply(self, client: int, reply: Message) -> None:
        """Refuse a payload that gives no update of the student's shape, and a rate by which it does not stay finite."""
        gradient = self._gradient(client, reply)
        check_state(Message(gradient, reply.meta), self.weights)
        rate = reply.meta.get("rate")
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not FLOAT.tiny <= rate <= FLOAT.max:
            raise BadMessage(f"'rate' must be a positive number, not {rate!r}")
        steps = torch._foreach_mul(list(gradient.values()), rate)
        if first_nonfinite(dict(zip(gradient, steps, strict=True))) is not None:
            raise BadMessage(f"the update at a rate of {rate:g} is not finite")

    def _gradient(self, client: int, reply: Message) -> State:
        """Return what a reply says: decompressed at the first call, remembered until the next `aggregate`."""
        known, gradient = self._decompressed.get(client, (None, {}))
        if known is not reply:
            gradient = decompress(reply.tensors, {name: tensor.shape for name, tensor in self.weights.items()})
            self._decompressed[client] = reply, gradient
        return gradient

    def aggregate(self, replies: Mapping[int, Message], round: Round) -> None:
        """Average the updates, by which the downlink moves the student."""
        uniform = [1 / len(replies)] * len(replies)
        shares = uniform if self.params.weights == "uniform" else sample_weights(replies)
        rates = [reply.meta["rate"] for reply in replies.values()]
        gradients = [self._gradient(client, reply) for client, reply in replies.items()]
        self._decompressed.clear()
        change = weighted_sum(gradients, [share * rate for share, rate in zip(shares, rates, strict=True)])
        rate = sum(share * rate for share, rate in zip(shares, rates, strict=True))
        epsilon = self.epsilon(round)
        self.weights, told = self.downlink.step(self.weights, self.version, epsilon, change, rate, replies)
        self.version += 1
        self.told = {"epsilon": epsilon} | {name: _mean([one[name] for one in told]) for name in FIGURES}

    def figures(self) -> Mapping[str, float]:
        """Return ε, and of what was last compressed mean R / min(P, Q), share of energy kept, bytes as share of dense.

        To six digits: the last bits of a sum depend on how tensors lie in memory, which is not kept over a restart.
        """
        return {name: float(f"{float(value):.6g}") for name, value in self.told.items()}

    def save(self) -> Message:
        """Return the student and what the downlink remembers."""
        down = self.downlink.save()
        tensors = labelled(self.weights, "weights") | labelled(down.tensors, "downlink")
        return Message(tensors, {VERSION: self.version, "downlink": down.meta})

    def restore(self, saved: Message) -> None:
        """Become the server that `save` described."""
        self.weights = group(saved.tensors, "weights")
        self.version = saved.meta[VERSION]
        self.downlink.restore(Message(group(saved.tensors, "downlink"), saved.meta["downlink"]))


def _mean(values: list[float | Tensor]) -> float | Tensor:
    return sum(values) / len(values) if values else math.nan
