"""FedOpt: Reddi et al., Adaptive Federated Optimization, ICLR 2021; what its server optimisers share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baselines.fedavg import FedAvg
from registry.interface import Message, Round, Task, parameter_names
from registry.parameters import Params, option

FIRST, SECOND = "first/", "second/"


@dataclass(frozen=True)
class AdaptiveParams(Params):
    """Hyper-parameters of FedAdam and FedYogi: β1, β2 and τ are the paper's; it tunes the rate for each data set."""

    server_rate: float = option(0.01, "the server's learning rate η", above=0)
    beta1: float = option(0.9, "decay β1 of the mean of the updates", 0.0, below=1)
    beta2: float = option(0.99, "decay β2 of the mean of their squares", 0.0, below=1)
    tau: float = option(1e-3, "adaptivity τ: the smaller, the more each parameter's step is of the same size", above=0)


class FedOpt(FedAvg):
    """Takes the mean of the clients' updates, Δ = Σ (n_k/n) (W_k − W), for a gradient: W ← W + η·step(Δ) (Algorithm 1).

    Only parameters are optimised. Running statistics of batch norm are no parameters (a negative variance could
    come out), so the new ones are the clients' mean, as in FedAvg. Clients are averaged by number of samples, which
    the authors do in their experiments.

    Moments are kept in float64, in which the square of every update that clients can send is finite.
    """

    beyond_average = ""
    sums = True

    def __init__(self, task: Task, params: Any, initial: Mapping[str, Tensor]) -> None:
        super().__init__(task, params, initial)
        self.optimised = [name for name in parameter_names(self.Client.build(task)) if name in initial]
        self.moments: dict[str, Tensor] = {}  # prefix and full name -> of the shape of the parameter; none before Δ_1

    @abstractmethod
    def step(self, name: str, change: Tensor) -> Tensor:
        """Return the step of a parameter at a server rate of 1, and update its moments.

        Args:
            name: its full name.
            change: Δ in float64.
        """

    def aggregate(self, replies: Mapping[int, Message], round: Round) -> None:
        """Replace statistics by their means, and move the parameters by the optimiser's step."""
        before = self.weights
        super().aggregate(replies, round)
        self.moments = dict(self.moments)
        for name in self.optimised:
            own = before[name].double()
            moved = own + self.params.server_rate * self.step(name, self.weights[name].double() - own)
            self.weights[name] = moved.to(before[name].dtype)

    def moment(self, prefix: str, name: str, like: Tensor, initial: float = 0.0) -> Tensor:
        """Return a moment; before the first update its initial value."""
        return self.moments.get(prefix + name, torch.full_like(like, initial))

    def save(self) -> Message:
        """Return the model and the moments."""
        return Message(self.weights | self.moments)

    def restore(self, saved: Message) -> None:
        """Restore what `save` returned."""
        self.moments = {name: tensor for name, tensor in saved.tensors.items() if name.startswith((FIRST, SECOND))}
        self.weights = {name: tensor for name, tensor in saved.tensors.items() if name not in self.moments}


class Adaptive(FedOpt):
    """Divides the mean of the updates by the root of the mean of their squares: m / (√v + τ) (Algorithm 2)."""

    Params = AdaptiveParams

    def step(self, name: str, change: Tensor) -> Tensor:
        """Return m / (√v + τ), with m ← β1 m + (1 − β1) Δ and v as of `second`; v starts as τ²."""
        beta, tau = self.params.beta1, self.params.tau
        first = beta * self.moment(FIRST, name, change) + (1 - beta) * change
        second = self.second(self.moment(SECOND, name, change, tau**2), change.square())
        self.moments |= {FIRST + name: first, SECOND + name: second}
        step: Tensor = first / (second.sqrt() + tau)
        return step

    @abstractmethod
    def second(self, before: Tensor, square: Tensor) -> Tensor:
        """Return the new v from the one before and Δ²."""
