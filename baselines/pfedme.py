"""pFedMe: Dinh, Tran and Nguyen, Personalized Federated Learning with Moreau Envelopes, NeurIPS 2020."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baselines.beside import PERSONAL, Beside, PersonalClient, of_model, renamed
from registry.interface import Batch, Message, outputs
from registry.parameters import Params, option


@dataclass(frozen=True)
class PFedMeParams(Params):
    """Hyper-parameters of pFedMe: the paper's experiments have λ = 15 and K = 5."""

    lam: float = option(
        15.0, "pull λ of the personal model to the shared one; λ times the learning rate stays below 2", 0.0
    )
    inner_steps: int = option(5, "steps K of the personal model on each batch", 1)


class PFedMeClient(PersonalClient):
    """Finds, on each batch, θ ≈ argmin F_k(θ) + λ/2 ‖θ − w‖² by K steps, and moves w towards it: w ← w − η λ (w − θ).

    θ, the personal model, starts a round as w and each batch as the batch before left it; it is never sent. Clipping
    bounds the gradient of F_k, not the pull. The shared model w has no gradient of its own; it sees the windows for its
    running statistics alone. The authors' models have no batch norm; here the running statistics of θ and of w follow
    the first of the K steps on each batch, so that each batch counts once, as in FedAvg.
    """

    windows_meet = ""

    def repeats(self) -> int:
        """Return K."""
        return int(self.params.inner_steps)

    def receive(self, message: Message) -> None:
        """Install w, and start θ there."""
        self.load(message.tensors)
        self.load(renamed(of_model(self.state()), PERSONAL))

    def losses(
        self, nets: Mapping[str, Callable[[Tensor], Any]], batch: Batch, context: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return F_k(θ)."""
        personal, _ = outputs(nets, batch.x, "personal", "model")
        return {"personal": batch.cross_entropy(personal.logits)}

    def update(
        self,
        weights: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        rate: Tensor,
        step: Tensor,
        context: Mapping[str, Tensor],
    ) -> Mapping[str, Tensor]:
        """Return θ after a step, and w, which moves with the last of K steps."""
        lam, steps, w = self.params.lam, self.params.inner_steps, weights["model"]
        theta = weights["personal"] - rate * (gradients["personal"] + lam * (weights["personal"] - w))
        moved = torch.where(step % steps == steps - 1, w - rate * lam * (w - theta), w)
        return {"model": moved, "personal": theta}


class PFedMe(Beside):
    """Averages models that clients move towards personal ones, which stay near them: F_k(θ) + λ/2 ‖θ − w‖².

    Both rates of the paper, of θ and of w, are the learning rate η of the run; with it, η λ is the share of the way
    that w goes on each batch, and from 2 on both run away. The paper's β, by which the server may go beyond the mean,
    is 1. Clients count by their samples. In the paper, and its authors' code, every client trains in every round, and
    selection decides whose model is averaged; here only selected clients train, as in every other algorithm, so that
    the personal model is near the w of a client's last round, an old one for clients that are rarely selected.
    """

    paper = "Dinh et al. 2020, arXiv:2006.08848"
    sends = "model down, model up; own personal model"
    Client = PFedMeClient
    Params = PFedMeParams
