"""The server of FedKDX and FedKD: averages compressed updates of the shared student (paper, Algorithm 1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedkdx_plugin.algorithm.aggregation import sample_weights, weighted_sum
from fedkdx_plugin.algorithm.compression import decompress, linear
from fedkdx_plugin.algorithm.downlink import FIGURES, Broadcast, Differences, Downlink
from fedkdx_plugin.algorithm.student import VERSION, StudentClient, StudentParams
from fedkdx_plugin.algorithm.updates import group, labelled
from registry.errors import UserError
from registry.interface import BadMessage, Message, Round, Server, Task
from registry.messages import check_state
from registry.tensors import first_nonfinite

FLOAT = torch.finfo(torch.float32)
DOWNLINKS: dict[str, type[Downlink]] = {"broadcast": Broadcast, "differences": Differences}


class StudentServer(Server):
    """Averages compressed student updates; how the student gets back is `downlink`'s."""

    Client = StudentClient
    Params = StudentParams

    @classmethod
    def check(cls, task: Task, params: Any) -> None:
        """A teacher that starts from the student, or is pulled towards it, must be of its kind."""
        if task.model_class is task.student_class:
            return
        for name, apart in (("teacher_init", "own"), ("pull_start", 0.0), ("pull_end", 0.0)):
            if (asked := getattr(params, name)) != apart:
                raise UserError(
                    f"{name}={asked}: the student is a {task.student_class.__name__}, the teacher a "
                    f"{task.model_class.__name__}; leave -sm out, or use {name}={apart}"
                )

    def __init__(self, task: Any, params: Any, initial: Mapping[str, Tensor]) -> None:
        super().__init__(task, params, initial)
        self.version = 0
        self.downlink = DOWNLINKS[params.downlink](params, initial)
        self._decompressed: dict[int, tuple[Message, dict[str, Tensor]]] = {}
        self.told: dict[str, float] = dict.fromkeys(("epsilon", *FIGURES), math.nan)

    def epsilon(self, round: Round) -> float:
        """ε(ρ), eq. 10."""
        return linear(round.progress, self.params.epsilon_start, self.params.epsilon_end)

    def messages(self, clients: Sequence[int], round: Round) -> dict[int, Message]:
        self.downlink.prepare(clients, self.weights, self.version, self.epsilon(round))
        return super().messages(clients, round)

    def message(self, client: int, round: Round) -> Message:
        epsilon = self.epsilon(round)
        down = self.downlink.message(client, self.weights, self.version, epsilon)
        told = {VERSION: self.version, "epsilon": epsilon, "progress": round.progress}
        return Message(down.tensors, down.meta | told | {"expected": round.total * round.share})

    def check_reply(self, client: int, reply: Message) -> None:
        """A payload that gives an update of the student's shape, and a rate by which it stays finite."""
        gradient = self._gradient(client, reply)
        check_state(Message(gradient, reply.meta), self.weights)
        rate = reply.meta.get("rate")
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not FLOAT.tiny <= rate <= FLOAT.max:
            raise BadMessage(f"'rate' must be a positive number, not {rate!r}")
        steps = torch._foreach_mul(list(gradient.values()), rate)
        if first_nonfinite(dict(zip(gradient, steps, strict=True))) is not None:
            raise BadMessage(f"the update at a rate of {rate:g} is not finite")

    def _gradient(self, client: int, reply: Message) -> dict[str, Tensor]:
        """What a reply says; a reply that is checked and then taken in is decompressed once."""
        known, gradient = self._decompressed.get(client, (None, {}))
        if known is not reply:
            gradient = decompress(reply.tensors, {name: tensor.shape for name, tensor in self.weights.items()})
            self._decompressed[client] = reply, gradient
        return gradient

    def aggregate(self, replies: Mapping[int, Message], round: Round) -> None:
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
        """ε, and of what was last compressed: mean R / min(P, Q), share of the energy kept, bytes as a share of dense.

        To six digits: the last bits of a sum depend on how tensors lie in memory, which is not kept over a restart.
        """
        return {name: float(f"{float(value):.6g}") for name, value in self.told.items()}

    def save(self) -> Message:
        down = self.downlink.save()
        tensors = labelled(self.weights, "weights") | labelled(down.tensors, "downlink")
        return Message(tensors, {VERSION: self.version, "downlink": down.meta})

    def restore(self, saved: Message) -> None:
        self.weights = group(saved.tensors, "weights")
        self.version = saved.meta[VERSION]
        self.downlink.restore(Message(group(saved.tensors, "downlink"), saved.meta["downlink"]))


def _mean(values: list[float | Tensor]) -> float | Tensor:
    return sum(values) / len(values) if values else math.nan
