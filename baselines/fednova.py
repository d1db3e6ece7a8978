"""FedNova: Wang et al., Tackling the Objective Inconsistency Problem in Heterogeneous Federated Optimization, 2020."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from baselines.fedavg import FedAvg, FedAvgClient
from registry.aggregation import sample_weights
from registry.interface import BadMessage, Message, Round, Task, parameter_names
from registry.messages import check_state
from registry.text import shown

MOST_STEPS = 10**9  # that one client may state


class FedNovaClient(FedAvgClient):
    """Trains as FedAvg's does, and states its number of steps τ_i."""

    windows_meet = ""

    def reply(self) -> Message:
        """Return the model, `samples`, and `steps`."""
        return Message(self.shared(), {"samples": self.samples, "steps": self.steps})


class FedNova(FedAvg):
    """Averages the clients' updates per step, so that clients with more steps do not count twice.

    W ← W + τ_eff Σ p_i (W_i − W) / τ_i with p_i = n_i / n, the number of steps τ_i of each client, and
    τ_eff = Σ p_i τ_i. That is the paper's normalised averaging for plain SGD, the only local optimiser here, whose
    a_i is a vector of ones. A rate that has decayed further for clients that trained more often is part of their
    updates and is not normalised. The server believes a client's number of steps, as it does its number of samples.

    Running statistics of batch norm are no sums of steps; they are averaged by number of samples. With equal
    numbers of steps this is FedAvg. Stragglers, which make fewer steps, are what the paper is about (`--stragglers`).
    """

    paper = "Wang et al. 2020, arXiv:2007.07481"
    sends = "model down, model and number of steps up; one common model"
    Client = FedNovaClient
    beyond_average = "numbers of steps"
    assumes_sgd = True
    accepts_partial_work = True

    def __init__(self, task: Task, params: object, initial: Mapping[str, Tensor]) -> None:
        super().__init__(task, params, initial)
        self.stepped = [name for name in parameter_names(self.Client.build(task)) if name in initial]

    def check_reply(self, client: int, reply: Message) -> None:
        """Require a model with `samples`, and a positive whole number of steps."""
        check_state(reply, self.weights)
        steps = reply.meta.get("steps")
        if type(steps) is not int or not 1 <= steps <= MOST_STEPS:
            raise BadMessage(f"'steps' must be a whole number from 1 to {MOST_STEPS}, not {shown(repr(steps))}")

    def aggregate(self, replies: Mapping[int, Message], round: Round) -> None:
        """Replace the model by the mean of models that all have gone τ_eff steps."""
        steps = {id: reply.meta["steps"] for id, reply in replies.items()}
        effective = sum(share * own for share, own in zip(sample_weights(replies), steps.values(), strict=True))
        super().aggregate(
            {
                id: Message(self._gone(reply.tensors, effective / steps[id]), reply.meta)
                for id, reply in replies.items()
            },
            round,
        )

    def _gone(self, model: Mapping[str, Tensor], times: float) -> dict[str, Tensor]:
        """Return a model whose parameters have gone so many times as far from the server's; statistics are the same."""
        moved = {name: self.weights[name] + times * (model[name] - self.weights[name]) for name in self.stepped}
        return {**model, **moved}
