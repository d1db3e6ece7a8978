"""FedAMP: Huang et al., Personalized Cross-Silo Federated Learning on Non-IID Data, AAAI 2021; its HeurFedAMP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baselines.fedprox import FedProxClient
from registry.aggregation import by_client, labelled, weighted_sum
from registry.interface import Message, Round, Server, Task, parameter_names
from registry.messages import check_state
from registry.parameters import Params, option


@dataclass(frozen=True)
class FedAMPParams(Params):
    """Hyper-parameters of FedAMP; the paper tunes them for each data set, these suit models of a few layers."""

    mu: float = option(0.01, "pull towards the own cloud model, λ/α of the paper", 0.0)
    self_weight: float = option(
        0.5,
        "share ξ_ii of a client's own model in its cloud model; 1 is Local with local_rounds=selected, but for mu",
        0.0,
        1.0,
    )
    sigma: float = option(100.0, "how much more models of larger cosine count, σ; 0: all others alike", 0.0)


class FedAMPClient(FedProxClient):
    """Starts from its cloud model u, and minimises F_k(w) + λ/(2α) ‖w − u‖² over it; it keeps its model.

    A client that is new to the server is sent no cloud model; its own, the initial one, is in its place.
    """

    kept = ("model.*",)


class FedAMP(Server):
    """Sends each client a mix of all models, in which those like its own count most: attentive message passing.

    u_i = ξ_ii w_i + Σ_{j≠i} ξ_ij w_j with ξ_ij = (1 − ξ_ii) e^{σ cos(w_i, w_j)} / Σ_{h≠i} e^{σ cos(w_i, w_h)}. That is
    the paper's HeurFedAMP, which it proposes for deep networks: distances, which FedAMP itself weighs by, grow
    with the number of parameters and say little there. The cosine is over parameters; running statistics of batch norm
    are mixed by the same weights.

    The server keeps the latest model of each client, where the paper has all clients in every round. Training starts
    from u_i, as a few steps of SGD would not come near the minimum that the paper asks for. Each client predicts with
    its own model; the server learns models alone.
    """

    paper = "Huang et al. 2021, arXiv:2007.03797"
    sends = "own mix of all models down, model up; own model"
    beyond_average = "single models"
    Client = FedAMPClient
    Params = FedAMPParams

    def __init__(self, task: Task, params: Any, initial: Mapping[str, Tensor]) -> None:
        super().__init__(task, params, initial)
        self.compared = [name for name in parameter_names(self.Client.build(task)) if name in initial]
        self.models: dict[int, Mapping[str, Tensor]] = {}

    def message(self, client: int, round: Round) -> Message:
        """Return the cloud model of a client; nothing if it has not replied yet."""
        if client not in self.models:
            return Message()
        shares = self.attention(client)
        return Message(weighted_sum([self.models[id] for id in shares], list(shares.values())))

    def attention(self, client: int) -> dict[int, float]:
        """Return ξ_ij of all models for a client, by id; they add up to 1."""
        others = [id for id in self.models if id != client]
        if not others:
            return {client: 1.0}
        own, *rest = (self._direction(id) for id in (client, *others))
        cosines = torch.stack([own @ other for other in rest])
        rest_shares = (1 - self.params.self_weight) * (self.params.sigma * cosines).softmax(0)
        shares = {client: float(self.params.self_weight)} | dict(zip(others, rest_shares.tolist(), strict=True))
        return dict(sorted(shares.items()))

    def _direction(self, client: int) -> Tensor:
        """Return a client's parameters as a vector of length 1, in float64, in which their squares are finite."""
        flat = torch.cat([self.models[client][name].double().flatten() for name in self.compared])
        unit: Tensor = flat / torch.linalg.vector_norm(flat).clamp(min=torch.finfo(torch.float64).tiny)
        return unit

    def check_reply(self, client: int, reply: Message) -> None:
        """Require a model with `samples`."""
        check_state(reply, self.weights)

    def aggregate(self, replies: Mapping[int, Message], round: Round) -> None:
        """Store the models."""
        self.models = dict(sorted((self.models | {id: reply.tensors for id, reply in replies.items()}).items()))

    def networks(self) -> Mapping[str, Tensor]:
        """Return no state: every client predicts with its own model."""
        return {}

    def save(self) -> Message:
        """Return all models."""
        return Message(labelled(self.models))

    def restore(self, saved: Message) -> None:
        """Restore what `save` returned."""
        self.models = dict(by_client(saved.tensors))
