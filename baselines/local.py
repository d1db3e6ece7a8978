"""Local: every client trains alone, a lower bound for personalised methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from baselines.fedavg import FedAvg, FedAvgClient
from registry.interface import Message, Task
from registry.memory import MEMORY, Remembering, remember
from registry.messages import check_state
from registry.parameters import Params, option

ALL, SELECTED = "all", "selected"


@dataclass(frozen=True)
class LocalParams(Params):
    """Hyper-parameters of training alone."""

    local_rounds: str = option(
        ALL,
        "who trains in a round: all clients, as none waits for a server; or the selected ones, for equal work",
        choices=(ALL, SELECTED),
    )
    memory: bool = option(False, "predict with a memory of the client's windows, as kNN-Per does")


class OwnModelClient(FedAvgClient):
    """Keeps its whole model private, so that FedAvg has nothing to average."""

    private: ClassVar[tuple[str, ...]] = ("model.*",)


class LocalClient(OwnModelClient):
    """Trains its own model, and may predict with a memory of its windows."""

    private = (*OwnModelClient.private, f"{MEMORY}.*")

    @classmethod
    def meeting(cls, params: Any) -> str:
        """Return that a memory holds features of its windows, if there is one."""
        return "remembers its windows' features; --set memory=false does not" if params.memory else cls.windows_meet

    @classmethod
    def build(cls, task: Task) -> dict[str, nn.Module]:
        """Return the model, and one with a memory if the hyper-parameters ask for it, which `reply` fills."""
        nets = super().build(task)
        return {**nets, MEMORY: Remembering(task.model())} if task.params.memory else nets

    def reply(self) -> Message:
        """Return the number of windows; with a memory, remember them under the model that was trained on them."""
        if self.params.memory:
            remember(self, "model")
        return super().reply()

    def serves(self) -> str:
        """Return the name of the model, or of the one with a memory once the client has trained."""
        return MEMORY if self.trained and self.params.memory else "model"


class Local(FedAvg):
    """Trains each client alone, without sharing any weights: a lower bound for personalised methods.

    A client that needs no server trains in every round. With a join ratio of 0.4 it makes 2.5 times the training steps
    of a client of another method; `local_rounds=selected` compares at equal work.
    """

    paper = "training alone; see McMahan et al. 2017, arXiv:1602.05629"
    sends = "no weights: empty messages down, only the number of windows up; own model"
    Client = LocalClient
    Params = LocalParams
    averages = False

    def check_reply(self, client: int, reply: Message) -> None:
        """Require the number of windows alone; see `Server.check_reply`, which leaves it to those who make replies."""
        check_state(reply, self.weights)

    @classmethod
    def trains_everyone(cls, params: Any) -> bool:
        """Return whether clients do not wait until they are selected."""
        return bool(params.local_rounds == ALL)
