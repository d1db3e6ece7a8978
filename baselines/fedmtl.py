"""FedMTL: Smith et al., Federated Multi-Task Learning, NeurIPS 2017 (MOCHA), for deep networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from baselines.fedavg import FedAvgClient
from registry.aggregation import by_client, labelled, weighted_sum
from registry.functional import beside, squared_distance
from registry.interface import Batch, Message, Round, Server, Task
from registry.messages import check_tensors
from registry.parameters import Params, option

CENTRE = "centre/"
STIFFNESS = "stiffness"
SHRINKAGE = 0.1  # share of I/m in Ω: bounds the penalty's curvature by 2λm/SHRINKAGE, so that SGD converges


@dataclass(frozen=True)
class FedMTLParams(Params):
    """Hyper-parameters of FedMTL; MOCHA chooses λ by cross-validation."""

    lam: float = option(1e-3, "weight λ of the relationship penalty; 0 is Local with local_rounds=selected", 0.0)


class FedMTLClient(FedAvgClient):
    """Minimises F_k(w_k) + λ tr(W Ω⁻¹ Wᵀ) over its own column w_k, with all other columns fixed.

    As a function of w_k the penalty is λ Ω⁻¹_kk ‖w_k − c_k‖² plus a constant, with the centre
    c_k = −Σ_{j≠k} (Ω⁻¹_kj / Ω⁻¹_kk) w_j. The server sends c_k, of the size of one model, and the stiffness Ω⁻¹_kk. To a
    client that has not uploaded yet it sends nothing, and there is no penalty.
    """

    kept = ("model.*",)
    windows_meet = ""

    def __init__(self, id: int, task: Task, params: Any, samples: int) -> None:
        super().__init__(id, task, params, samples)
        self.received: dict[str, Tensor] = {}

    def receive(self, message: Message) -> None:
        """Keep centre and stiffness for `context`; the client continues with its own model."""
        self.received = dict(message.tensors)

    def context(self) -> Mapping[str, Tensor]:
        """Return centre and stiffness, which are not kept between rounds, to save the memory of a second model."""
        received, self.received = self.received, {}
        return received

    def losses(
        self, nets: Mapping[str, Callable[[Tensor], Any]], batch: Batch, context: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return F_k and the penalty."""
        losses = super().losses(nets, batch, context)
        if STIFFNESS in context:
            distance = squared_distance(beside(nets["model"], context, CENTRE + "model."), batch.x)
            losses["relations"] = self.params.lam * context[STIFFNESS] * distance
        return losses

    def reply(self) -> Message:
        """Return the parameters; batch-norm statistics are not part of W and stay on the client."""
        shared = self.shared()
        return Message({name: shared[name] for name in _parameters(self.nets["model"]) if name in shared})


class FedMTL(Server):
    """Trains each client's own model with a penalty on its distance to related clients' models, as the server learns.

    The columns of W are the latest parameters of each client that has replied. After each round the relationship matrix
    is set to the minimiser of the penalty, Ω = (WᵀW)^{1/2} / tr (WᵀW)^{1/2} (positive semi-definite, trace 1), and the
    penalty uses its inverse, as in MOCHA's own code: clients with positive Ω_ij attract each other.

    Deviations: clients train their networks by SGD, whereas MOCHA solves a dual problem that only linear models have;
    SGD needs Ω shrunk towards I/m, whereas MOCHA bounds its eigenvalues away from 0. In Sen and Borcea (ECAI 2024),
    cited by the FedKDX paper, clients have different tasks to predict, which does not apply if all have the same
    classes.
    """

    paper = "Smith et al. 2017, arXiv:1705.10467; see Sen and Borcea 2024, doi:10.3233/FAIA240715"
    sends = "centre of related models down, model up; own model"
    beyond_average = "single models"
    Client = FedMTLClient
    Params = FedMTLParams

    def __init__(self, task: Task, params: Any, initial: Mapping[str, Tensor]) -> None:
        super().__init__(task, params, initial)
        self.models: dict[int, Mapping[str, Tensor]] = {}
        self.omega = torch.empty(0, 0)
        names = _parameters(self.Client.build(task)["model"])
        self.column = {name: tensor for name, tensor in initial.items() if name in names}

    def message(self, client: int, round: Round) -> Message:
        """Return centre and stiffness; nothing for a client that has not uploaded yet."""
        if client not in self.models:
            return Message()
        k = list(self.models).index(client)
        row = torch.linalg.inv(self.omega)[k]
        pull = -row / row[k]
        pull[k] = 0
        centre = weighted_sum(list(self.models.values()), pull.tolist())
        return Message({CENTRE + name: c for name, c in centre.items()} | {STIFFNESS: row[k].float()})

    def check_reply(self, client: int, reply: Message) -> None:
        """Require a column of W: all parameters that are not private."""
        check_tensors(reply.tensors, self.column)

    def aggregate(self, replies: Mapping[int, Message], round: Round) -> None:
        """Store the parameters, and compute Ω from those of all clients."""
        updates = {id: reply.tensors for id, reply in replies.items()}
        self.models = dict(sorted((self.models | updates).items()))
        self.omega = relationships(list(self.models.values()))

    def networks(self) -> Mapping[str, Tensor]:
        """Return no state: every client predicts with its own model."""
        return {}

    def save(self) -> Message:
        """Return the parameters of all clients, from which Ω follows."""
        return Message(labelled(self.models))

    def restore(self, saved: Message) -> None:
        """Restore what `save` returned."""
        self.models = dict(by_client(saved.tensors))
        self.omega = relationships(list(self.models.values())) if self.models else torch.empty(0, 0)


def relationships(models: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Return Ω = (WᵀW)^{1/2} / tr (WᵀW)^{1/2} shrunk towards I/m: (m, m), float64, positive definite, trace 1."""
    m = len(models)
    gram = torch.zeros((m, m), dtype=torch.float64, device=next(iter(models[0].values())).device)
    for name in models[0]:
        layer = torch.stack([model[name] for model in models]).flatten(1).double()
        gram = gram + layer @ layer.T
    energy, vectors = torch.linalg.eigh(gram)
    root: Tensor = (vectors * energy.clamp(min=0).sqrt()) @ vectors.T
    identity = torch.eye(m, dtype=root.dtype, device=root.device)
    return (1 - SHRINKAGE) * root / root.trace() + SHRINKAGE / m * identity


def _parameters(model: Callable[[Tensor], Any]) -> dict[str, Tensor]:
    """Return the parameters of the network `model` by full name."""
    assert isinstance(model, nn.Module)  # `losses` receives it as something to call
    return {f"model.{name}": tensor for name, tensor in model.named_parameters()}
