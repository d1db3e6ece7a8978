"""SCAFFOLD: Karimireddy et al., Stochastic Controlled Averaging for Federated Learning, ICML 2020."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baselines.fedavg import FedAvg, FedAvgClient
from registry.functional import beside, inner_product
from registry.interface import Batch, Message, Round, Task, parameter_names
from registry.messages import check_state
from registry.parameters import Params, option

CONTROL = "control/"


@dataclass(frozen=True)
class SCAFFOLDParams(Params):
    """Hyper-parameters of SCAFFOLD: the paper's experiments have a server rate of 1."""

    server_rate: float = option(1.0, "the server's learning rate η_g", above=0)


class SCAFFOLDClient(FedAvgClient):
    """Takes steps y ← y − η (g(y) − c_i + c), and updates its control variate c_i by option II of the paper.

    The correction is a linear term of the loss, ⟨c − c_i, y⟩, so the engine's clipping bounds the corrected gradient.
    After K steps c_i ← c_i − c + (x − y)/(K η), the mean gradient of the round; K is this client's own number of steps.
    c_i is over the shared parameters and stays in the client's memory; its change is sent. In a client's first
    round, which has no c_i yet, there is no correction.
    """

    windows_meet = ""

    def receive(self, message: Message) -> None:
        """Install the model, and take note of c and of the model x."""
        self.control = {name: tensor for name, tensor in message.tensors.items() if name.startswith(CONTROL)}
        self.load({name: tensor for name, tensor in message.tensors.items() if name not in self.control})
        state = self.state()
        self.start = {name: state[name.removeprefix(CONTROL)].clone() for name in self.control}

    def context(self) -> Mapping[str, Tensor]:
        """Return c − c_i."""
        return {name: c - self.memory.get(name, c) for name, c in self.control.items()}

    def losses(
        self, nets: Mapping[str, Callable[[Tensor], Any]], batch: Batch, context: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return F_k and the correction."""
        pairs = beside(nets["model"], context, CONTROL + "model.")
        return super().losses(nets, batch, context) | {"correction": inner_product(pairs, batch.x)}

    def reply(self) -> Message:
        """Return the model and the change of c_i, which is c_i itself where there was none."""
        state, length = self.state(), self.steps * self.learning_rate
        new, change = {}, {}
        for name, c in self.control.items():
            gradient = (self.start[name] - state[name.removeprefix(CONTROL)]) / length
            own = self.memory.get(name)
            new[name] = gradient if own is None else own - c + gradient
            change[name] = new[name] if own is None else new[name] - own
        self.memory = new
        return Message(self.shared() | change, {"samples": self.samples})


class SCAFFOLD(FedAvg):
    """Corrects the clients' gradients by control variates, y ← y − η (g(y) − c_i + c), against drift between clients.

    x ← x + η_g Σ (n_i/n) (y_i − x) over the clients of the round, and c = Σ (n_i/n) c_i over all clients heard of so
    far; running statistics of batch norm are averaged, not corrected. Deviations from the paper's Algorithm 1:

    - Clients count by their samples, as in FedAvg, and not equally, in both means: c is the mean gradient of
      the objective that the model's mean belongs to.
    - The paper sets c_i = 0 for clients not heard of, and c is a mean over all N clients. Their first steps would go
      along g + c, nearly twice as far as others'. Here a client not heard of counts as one with c_i = c. So N need not
      be known, c is the mean over the others, and a client's first round is FedAvg's.

    Beyond a model, the server learns the mean gradient of each client's round, which two models and a rate also tell. A
    reply that is refused leaves c without that change, although its client has made it.
    """

    paper = "Karimireddy et al. 2020, arXiv:1910.06378"
    sends = "model and control variate down and up; one common model"
    Client = SCAFFOLDClient
    beyond_average = "numbers of samples, which weight control variates"
    assumes_sgd = True
    Params = SCAFFOLDParams
    accepts_partial_work = True

    def __init__(self, task: Task, params: Any, initial: Mapping[str, Tensor]) -> None:
        super().__init__(task, params, initial)
        names = [name for name in parameter_names(self.Client.build(task)) if name in initial]
        # Σ n_i c_i in float64, in which it is finite for all that clients can send
        self.total = {CONTROL + name: torch.zeros_like(initial[name], dtype=torch.float64) for name in names}
        self.heard: dict[int, int] = {}  # client -> samples, as it stated first

    def control(self) -> dict[str, Tensor]:
        """Return c, of the model's type; 0 before the first round."""
        n = max(sum(self.heard.values()), 1)
        return {name: (own / n).to(self.weights[name.removeprefix(CONTROL)].dtype) for name, own in self.total.items()}

    def message(self, client: int, round: Round) -> Message:
        """Return the model and c."""
        return Message(self.weights | self.control())

    def check_reply(self, client: int, reply: Message) -> None:
        """Require a model with `samples`, and a tensor for the change of each parameter's control variate."""
        check_state(reply, self.weights | self.control())

    def aggregate(self, replies: Mapping[int, Message], round: Round) -> None:
        """Move the model by the mean update times η_g, and add the changes of the control variates."""
        before = self.weights
        super().aggregate(replies, round)
        mean = self.weights
        moved = {name.removeprefix(CONTROL) for name in self.total}
        rate = self.params.server_rate
        self.weights = {
            name: torch.lerp(own, mean[name], rate) if name in moved else mean[name] for name, own in before.items()
        }
        self.heard = {id: reply.meta["samples"] for id, reply in replies.items()} | self.heard
        present = sum(self.heard[id] for id in replies)
        self.total = {name: own + present * mean[name].double() for name, own in self.total.items()}

    def save(self) -> Message:
        """Return the model, the sum of the control variates, and whom it is of."""
        return Message(self.weights | self.total, {"heard": sorted(self.heard.items())})

    def restore(self, saved: Message) -> None:
        """Restore what `save` returned."""
        self.total = {name: tensor for name, tensor in saved.tensors.items() if name.startswith(CONTROL)}
        self.weights = {name: tensor for name, tensor in saved.tensors.items() if name not in self.total}
        self.heard = dict(saved.meta["heard"])
