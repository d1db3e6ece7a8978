"""Per-FedAvg: Fallah et al., Personalized Federated Learning: A Meta-Learning Approach, NeurIPS 2020."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.beside import PERSONAL, Beside, PersonalClient, of_model, renamed
from baselines.fedavg import CHUNK
from registry.interface import Message
from registry.parameters import Params, option

STEPS = "steps"


@dataclass(frozen=True)
class PerFedAvgParams(Params):
    """Hyper-parameters of Per-FedAvg; the paper's β is the learning rate of the run."""

    alpha: float = option(0.01, "rate α of the adaptation step", 0.0)


class PerFedAvgClient(PersonalClient):
    """Trains a start for adaptation, by pairs of batches D, D': w ← w − β ∇F(w − α ∇F(w; D); D'), to first order.

    The first batch of a pair is a step of α away from w, the second one a step of β from w, along the gradient found
    there; in between, the personal network holds w. A last batch without a partner is a step of β, as in FedAvg.

    The client predicts with W − α ∇F_k(W), where W is the model it was sent last and the gradient is over all its
    windows by W's running statistics.
    """

    windows_meet = "adapts the model that predicts to its windows, without noise"

    def receive(self, message: Message) -> None:
        """Install the model, and work out the personal one."""
        self.load(message.tensors)
        self.adapted = self._adapted()

    def _adapted(self) -> dict[str, Tensor]:
        """Return the state of the personal model: one step from the model received."""
        assert self.data is not None  # the engine sets it while the client works
        model, count = self.nets["model"].eval(), len(self.data.y)
        named = dict(model.named_parameters())
        total = {name: torch.zeros_like(own) for name, own in named.items()}
        for part in self.data.split(CHUNK):
            loss = self.losses(self.nets, part, {})["model"] * (len(part.y) / count)
            for name, own in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
                total[name] += own
        state = renamed(of_model(self.state()), PERSONAL)
        steps = {PERSONAL + name: self.params.alpha * own for name, own in total.items()}
        return {name: own.detach() - steps[name] if name in steps else own.clone() for name, own in state.items()}

    def context(self) -> Mapping[str, Tensor]:
        """Return the number of steps, ()."""
        return {STEPS: torch.tensor(self.steps)}

    def update(
        self,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        rate: Tensor,
        step: Tensor,
        context: Mapping[str, Tensor],
    ) -> Mapping[str, Tensor]:
        """Return w − α ∇F(w) and w after the first batch of a pair, and w − β ∇F after the second."""
        w, gradient = weights["model"], gradients["model"]
        first = (step % 2 == 0) & (step + 1 < context[STEPS])
        origin = torch.where(step % 2 == 0, w, weights["personal"])
        return {"model": origin - torch.where(first, self.params.alpha, rate) * gradient, "personal": origin}

    def reply(self) -> Message:
        """Return the model, after putting the personal one in its place."""
        self.load(self.adapted)
        return super().reply()


class PerFedAvg(Beside):
    """Averages models that are trained to be good one step of α later, on each client's own windows.

    This is the paper's first-order variant, Per-FedAvg (FO), which leaves out the product with the Hessian of the
    meta-gradient (its batch D'' then has no use). Clients count by their samples. What a client predicts with is its
    step from the model that it was sent, so in its first round from the initial one; clients that are rarely selected
    have an old one. Clipping bounds the gradients of both batches.
    """

    paper = "Fallah et al. 2020, arXiv:2002.07948"
    sends = "model down, model up; the model after a step of one's own"
    Client = PerFedAvgClient
    Params = PerFedAvgParams
