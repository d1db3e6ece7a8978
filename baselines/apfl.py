"""APFL: Deng, Kamani and Mahdavi, Adaptive Personalized Federated Learning, 2020."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from baselines.beside import Beside, PersonalClient
from registry.interface import Batch, Message, Task, outputs
from registry.parameters import Params, option

ALPHA = "mix.alpha"


@dataclass(frozen=True)
class APFLParams(Params):
    """Hyper-parameters of APFL."""

    alpha: float = option(0.5, "share α of the own model in the mix, at first; fixed: 0 FedAvgFT, 1 Local", 0.0, 1.0)
    adaptive: bool = option(True, "let each client learn its α")


class Mix(nn.Module):
    """Share α of the own model, (1,), as a parameter that `update` moves."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1))


class APFLClient(PersonalClient):
    """Trains the shared model w as FedAvg does, and its own model v so that the mix v̄ = α v + (1 − α) w predicts well.

    In each step, with both gradients at the models before it (Algorithm 1):

        w ← w − η ∇F(w),   v ← v − η α ∇F(v̄),   v̄ ← α v + (1 − α) w

    and in the first step of a round, if α is adaptive, α ← α − η ⟨v − w, ∇F(v̄)⟩, kept in [0, 1]. v, v̄ and α
    stay on the client. v̄ is a network of its own, with running statistics of its own; clipping bounds both gradients.
    """

    private = ("own.*", "mix.*")
    windows_meet = ""

    @classmethod
    def build(cls, task: Task) -> dict[str, nn.Module]:
        """Return w, v̄, v (in a list, as it predicts nothing) and α; v starts as w does."""
        nets = super().build(task)
        return {**nets, "own": nn.ModuleList([copy.deepcopy(nets["model"])]), "mix": Mix()}

    def receive(self, message: Message) -> None:
        """Install w, and mix v̄ anew."""
        self.load(message.tensors)
        state = self.state()
        if not self.trained:
            self.load({ALPHA: torch.full_like(state[ALPHA], self.params.alpha)})
        alpha = state[ALPHA]
        for name, mixed in self.nets["personal"].named_parameters():
            mixed.detach().copy_(alpha * state[f"own.0.{name}"] + (1 - alpha) * state[f"model.{name}"])

    def losses(
        self, nets: Mapping[str, Callable[[Tensor], Any]], batch: Batch, context: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return F(w) and F(v̄)."""
        both = zip(("model", "personal"), outputs(nets, batch.x, "model", "personal"), strict=True)
        return {name: batch.cross_entropy(output.logits) for name, output in both}

    def update(
        self,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        rate: Tensor,
        step: Tensor,
        context: Mapping[str, Tensor],
    ) -> Mapping[str, Tensor]:
        """Return w, v, v̄ and α after a step."""
        w, v, slope, alpha = weights["model"], weights["own"], gradients["personal"], weights["mix"][:1]
        moved = (alpha - rate * ((v - w) * slope).sum()).clamp(0, 1)
        new = torch.where(step == 0, moved, alpha) if self.params.adaptive else alpha
        w, v = w - rate * gradients["model"], v - rate * alpha * slope
        # the row of `mix` may be longer than its one value
        return {"model": w, "own": v, "personal": new * v + (1 - new) * w, "mix": torch.cat([new, weights["mix"][1:]])}


class APFL(Beside):
    """Averages models as FedAvg does, beside which each client trains one of its own; a learnt mix of both predicts.

    α is learnt once a round, as in the authors' code; the paper's analysis has it in every step. Their code also adds
    0.02 α to its gradient, and mixes logits; as in the paper, there is no such term here, and weights are mixed. The v̄
    that predicts mixes v with w as the client's last round left it, not with what the server has made of it since. A
    client that has never trained predicts with the shared model.
    """

    paper = "Deng et al. 2020, arXiv:2003.13461"
    sends = "model down, model up; own mix of the model and a model of one's own"
    Client = APFLClient
    Params = APFLParams
