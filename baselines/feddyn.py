"""FedDyn: Acar et al., Federated Learning Based on Dynamic Regularization, ICLR 2021."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baselines.fedavg import FedAvg, FedAvgClient
from registry.functional import beside, inner_product, squared_distance
from registry.interface import Batch, Message, Round, Task, parameter_names
from registry.messages import check_state
from registry.parameters import Params, option

DRIFT, ANCHOR = "drift/", "anchor/"


@dataclass(frozen=True)
class FedDynParams(Params):
    """Hyper-parameters of FedDyn; the paper tunes α in {0.1, 0.01, 0.001}, for many more local steps than here."""

    alpha: float = option(0.1, "strength α of the dynamic regulariser", above=0)


class FedDynClient(FedAvgClient):
    """Minimises F_k(θ) − ⟨λ_k, θ⟩ + α/2 ‖θ − θ^{t−1}‖² over the shared parameters, then λ_k ← λ_k − α (θ_k − θ^{t−1}).

    λ_k starts as 0; at a minimum it is the gradient of F_k. The client's memory holds λ_k / −α, the sum of its
    own updates so far.
    """

    windows_meet = ""

    def receive(self, message: Message) -> None:
        """Install the model, and take note of its parameters, θ^{t−1}."""
        self.load(message.tensors)
        shared = self.shared()
        self.start = {name: shared[name].clone() for name in parameter_names(self.nets) if name in shared}

    def context(self) -> Mapping[str, Tensor]:
        """Return θ^{t−1} and λ_k / −α."""
        drift = {DRIFT + name: self.memory.get(DRIFT + name, torch.zeros_like(own)) for name, own in self.start.items()}
        return {ANCHOR + name: own for name, own in self.start.items()} | drift

    def losses(
        self, nets: Mapping[str, Callable[[Tensor], Any]], batch: Batch, context: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return F_k and the dynamic regulariser."""
        distance = squared_distance(beside(nets["model"], context, ANCHOR + "model."), batch.x)
        drift = inner_product(beside(nets["model"], context, DRIFT + "model."), batch.x)
        return super().losses(nets, batch, context) | {"regulariser": self.params.alpha * (distance / 2 + drift)}

    def reply(self) -> Message:
        """Return the model, after the update of λ_k."""
        shared, before = self.shared(), self.memory
        changes = {name: shared[name] - own for name, own in self.start.items()}
        self.memory = {
            DRIFT + name: before[DRIFT + name] + own if DRIFT + name in before else own for name, own in changes.items()
        }
        return super().reply()


class FedDyn(FedAvg):
    """Averages models, and corrects the mean so that clients' regularised minima agree: θ ← Σ (n_k/n) θ_k − h/α.

    h ← h − α Σ (n_k/N) (θ_k − θ^{t−1}), with k the clients of the round, n their samples, and N those of all clients
    heard of so far, so that h is the mean of all λ_k. Without h this would be FedAvg with FedDyn's clients. Deviations
    from the paper's Algorithm 1: clients count by their samples and not equally, in both means, which is the same
    algorithm for the objective Σ (n_k/n) F_k; and N is of the clients heard of, as the server knows no others.

    θ predicts, which is what clients are sent; the authors' curves are of the mean of all clients' last models.

    Running statistics of batch norm are averaged. α → 0 is not FedAvg: the clients' training then is, but h/α, the
    sum of all updates so far, stays. The paper assumes that clients train to a minimum. With few steps, α must be
    large enough for α η K to be near 1 (rate η, K steps), or the sum overshoots like momentum without friction.
    """

    paper = "Acar et al. 2021, arXiv:2111.04263"
    sends = "model down, model up; one common model"
    Client = FedDynClient
    beyond_average = "numbers of samples"
    assumes_sgd = True
    Params = FedDynParams

    def __init__(self, task: Task, params: Any, initial: Mapping[str, Tensor]) -> None:
        super().__init__(task, params, initial)
        names = [name for name in parameter_names(self.Client.build(task)) if name in initial]
        # −h N/α, the sum of all n_k (θ_k − θ^{t−1}), in float64, in which it is finite for all that clients can send
        self.drift = {DRIFT + name: torch.zeros_like(initial[name], dtype=torch.float64) for name in names}
        self.heard: dict[int, int] = {}  # client -> samples, as it stated first

    def check_reply(self, client: int, reply: Message) -> None:
        """Require a model with `samples`."""
        check_state(reply, self.weights)

    def aggregate(self, replies: Mapping[int, Message], round: Round) -> None:
        """Replace statistics by their means, and parameters by theirs less h/α."""
        before = self.networks()
        super().aggregate(replies, round)
        self.heard = {id: reply.meta["samples"] for id, reply in replies.items()} | self.heard
        present, total = sum(self.heard[id] for id in replies), sum(self.heard.values())
        drift = {}
        for key, own in self.drift.items():
            name = key.removeprefix(DRIFT)
            mean = self.weights[name].double()
            drift[key] = own + present * (mean - before[name].double())
            self.weights[name] = (mean + drift[key] / total).to(before[name].dtype)
        self.drift = drift

    def save(self) -> Message:
        """Return the model, the sum of the updates, and whom it is of."""
        return Message(self.weights | self.drift, {"heard": sorted(self.heard.items())})

    def restore(self, saved: Message) -> None:
        """Restore what `save` returned."""
        self.drift = {name: tensor for name, tensor in saved.tensors.items() if name.startswith(DRIFT)}
        self.weights = {name: tensor for name, tensor in saved.tensors.items() if name not in self.drift}
        self.heard = dict(saved.meta["heard"])
