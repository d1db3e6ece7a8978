"""FedAvg: McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, 2017."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from registry.aggregation import sample_weights
from registry.interface import Batch, Client, Message, Round, Server

CHUNK = 512  # windows in a forward pass, to bound memory


class FedAvgClient(Client):
    """Minimises cross-entropy on its own windows, starting from the global model."""

    windows_meet = ""

    def losses(
        self, nets: Mapping[str, Callable[[Tensor], Any]], batch: Batch, context: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the cross-entropy."""
        logits = nets["model"](batch.x).logits
        return {"model": batch.cross_entropy(logits)}

    @torch.no_grad()
    def loss_on(self, windows: Batch, model: Mapping[str, Tensor]) -> Tensor:
        """Load a model and return its mean cross-entropy on windows, (), by running statistics of batch norm.

        Args:
            windows: of this client; means over parts of them count by their windows, or these windows' weights.
            model: full name -> tensor; local batch norm is this client's own.
        """
        self.load(model)
        self.nets["model"].eval()
        total = torch.zeros((), device=windows.y.device)
        for part in windows.split(CHUNK):
            total = total + self.losses(self.nets, part, {})["model"] * part.weight()
        return total / windows.weight()


class FedAvg(Server):
    """Averages the clients' models, weighted by number of samples: W ← Σ (n_k/n) W_k."""

    paper = "McMahan et al. 2017, arXiv:1602.05629"
    sends = "model down, model up; one common model"
    Client = FedAvgClient
    averages = True
    beyond_average = ""
    sums = True

    def message(self, client: int, round: Round) -> Message:
        """Return the global model."""
        return Message(self.weights)

    def aggregate(self, replies: Mapping[int, Message], round: Round) -> None:
        """Replace the global model by the mean."""
        states = [reply.tensors for reply in replies.values()]
        self.weights = self.average(states, sample_weights(replies), around=self.weights)
