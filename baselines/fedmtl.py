"""FedMTL: Smith et al., Federated Multi-Task Learning, NeurIPS 2017 (MOCHA), for deep networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from baselines.fedavg import FedAvgClient
from registry.aggregation import by_client, labelled, weighted_sum
from registry.interface import Batch, Message, Round, Server, Task
from registry.messages import check_tensors
from registry.parameters import Params, hyper

CENTRE = "centre/"
STIFFNESS = "stiffness"
SHRINKAGE = 0.1  # share of I/m in Ω: bounds the penalty's curvature by 2λm/SHRINKAGE, which SGD needs


@dataclass(frozen=True)
class FedMTLParams(Params):
    """Hyper-parameters of FedMTL; MOCHA chooses its λ by cross-validation."""

    lam: float = hyper(1e-3, "weight λ of the relationship penalty; 0 is Local", 0.0)


class FedMTLClient(FedAvgClient):
    """Minimises F_k(w_k) + λ tr(W Ω⁻¹ Wᵀ) over its own column w_k, the others fixed.

    As a function of w_k the penalty is λ Ω⁻¹_kk ‖w_k − c_k‖² and a constant, with the centre
    c_k = −Σ_{j≠k} (Ω⁻¹_kj / Ω⁻¹_kk) w_j. The server sends c_k, as large as one model, and the stiffness Ω⁻¹_kk; before
    a client's first upload it sends nothing, and there is no penalty.
    """

    kept = ("model.*",)

    def __init__(self, id: int, task: Task, params: Any, samples: int) -> None:
        super().__init__(id, task, params, samples)
        self.told: dict[str, Tensor] = {}

    def receive(self, message: Message) -> None:
        self.told = dict(message.tensors)

    def context(self) -> Mapping[str, Tensor]:
        told, self.told = self.told, {}  # no second model a client in memory between rounds
        return told

    def losses(self, nets: Mapping, batch: Batch, context: Mapping[str, Tensor]) -> dict[str, Tensor]:
        losses = super().losses(nets, batch, context)
        if STIFFNESS in context:
            pairs = [(w, context.get(CENTRE + name)) for name, w in _parameters(nets).items()]
            distance = sum((w - centre).square().sum() for w, centre in pairs if centre is not None)
            losses["relations"] = self.params.lam * context[STIFFNESS] * distance
        return losses

    def reply(self) -> Message:
        """The parameters; batch-norm statistics are no part of W and stay."""
        shared = self.shared()
        return Message({name: shared[name] for name in _parameters(self.nets) if name in shared})


class FedMTL(Server):
    """Every client trains its own model, drawn towards those of clients that are related, as learnt by the server.

    W has the latest parameters of each client seen so far as its columns. After each round the relationship matrix
    is set to what minimises the penalty, Ω = (WᵀW)^{1/2} / tr (WᵀW)^{1/2} (positive semi-definite, trace 1), and the
    penalty takes its inverse, as in MOCHA's own code: two clients of positive Ω_ij attract each other.

    Deviations: clients take SGD steps on their networks, where MOCHA solves a dual that only linear models have; for
    that Ω is shrunk towards I/m, where MOCHA keeps its eigenvalues off 0. Sen and Borcea (ECAI 2024), whom the FedKDX
    paper cites, let clients differ in what they predict, which cannot be where all have the same classes.
    """

    paper = "Smith et al. 2017, arXiv:1705.10467; see Sen and Borcea 2024, doi:10.3233/FAIA240715"
    sends = "centre of related models down, model up; own model"
    Client = FedMTLClient
    Params = FedMTLParams

    def __init__(self, task: Task, params: Any, initial: Mapping[str, Tensor]) -> None:
        super().__init__(task, params, initial)
        self.models: dict[int, Mapping[str, Tensor]] = {}
        self.omega = torch.empty(0, 0)
        names = _parameters(self.Client.build(task))
        self.column = {name: tensor for name, tensor in initial.items() if name in names}

    def message(self, client: int, round: Round) -> Message:
        if client not in self.models:
            return Message()
        k = list(self.models).index(client)
        row = torch.linalg.inv(self.omega)[k]
        pull = -row / row[k]
        pull[k] = 0
        centre = weighted_sum(list(self.models.values()), pull.tolist())
        return Message({CENTRE + name: c for name, c in centre.items()} | {STIFFNESS: row[k].float()})

    def check_reply(self, client: int, reply: Message) -> None:
        """A column of W: all parameters that may travel."""
        check_tensors(reply.tensors, self.column)

    def aggregate(self, replies: Mapping[int, Message], round: Round) -> None:
        updates = {id: reply.tensors for id, reply in replies.items()}
        self.models = dict(sorted((self.models | updates).items()))
        self.omega = relationships(list(self.models.values()))

    def networks(self) -> Mapping[str, Tensor]:
        """Nothing: every client predicts with its own model."""
        return {}

    def save(self) -> Message:
        return Message(labelled(self.models))

    def restore(self, saved: Message) -> None:
        self.models = by_client(saved.tensors)
        self.omega = relationships(list(self.models.values())) if self.models else torch.empty(0, 0)


def relationships(models: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Ω = (WᵀW)^{1/2} / tr (WᵀW)^{1/2}, shrunk towards I/m: (m, m), float64, positive definite, trace 1."""
    m = len(models)
    layers = (torch.stack([model[name] for model in models]).flatten(1).double() for name in models[0])
    gram = sum(layer @ layer.T for layer in layers)
    energy, vectors = torch.linalg.eigh(gram)
    root = (vectors * energy.clamp(min=0).sqrt()) @ vectors.T
    identity = torch.eye(m, dtype=root.dtype, device=root.device)
    return (1 - SHRINKAGE) * root / root.trace() + SHRINKAGE / m * identity


def _parameters(nets: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    return {f"model.{name}": tensor for name, tensor in nets["model"].named_parameters()}
