"""FedFomo: Zhang et al., Personalized Federated Learning with First Order Model Optimization, ICLR 2021."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baselines.fedavg import FedAvgClient
from registry.aggregation import by_client, labelled, weighted_sum
from registry.interface import BadMessage, Message, Round, Server, Task
from registry.messages import check_tensors, check_variances
from registry.parameters import Params, option

START = "start/"


@dataclass(frozen=True)
class FedFomoParams(Params):
    """Defaults of the authors' runs (github.com/NVlabs/FedFomo), where 5 models include the client's own."""

    models: int = option(5, "other clients' models sent to a client each round (M)", 0)
    validation: float = option(0.2, "share of a client's windows held out, on which models are weighted", 0.01, 0.99)
    epsilon: float = option(0.3, "probability of sending a random model instead of the best, in round 1", 0.0, 1.0)
    epsilon_decay: float = option(0.05, "decrease of this probability in each round, down to 0", 0.0, 1.0)


class FedFomoClient(FedAvgClient):
    """Mixes its own model with others, weighted by how much each reduces the loss on held-out windows, then trains."""

    kept = ("model.*",)
    windows_meet = "weighs models by their losses on windows held out, without noise"

    def __init__(self, id: int, task: Task, params: Any, samples: int) -> None:
        super().__init__(id, task, params, samples)
        self.gains: list[float] = []  # of the other clients' models received in this round, in their order

    def holdout(self) -> float:
        """Return the hyper-parameter `validation`."""
        return float(self.params.validation)

    def receive(self, message: Message) -> None:
        """Set θ ← θ_k^{t-1} + Σ_n w_n (θ_n − θ_k^{t-1}), with w_n = max(0, gain) normalised, which equals Σ_n w_n θ_n.

        θ_k^{t-1} is the model before this client's last training, and θ_k^t, the model after it, is one of the θ_n.
        If no model has a positive gain, the client continues from θ_k^t; the paper's formula would undo its training.
        The sum is over the others' models in the order of the message, then its own.
        """
        own = {name: tensor.clone() for name, tensor in self.shared().items()}
        start = {name.removeprefix(START): tensor for name, tensor in self.memory.items()} or own
        others = list(by_client(message.tensors).values())
        mixed, self.gains = own, []
        if others:
            models = [*others, own]
            gains = self._gains(start, models)
            self.gains = gains[:-1]
            useful = [max(gain, 0.0) for gain in gains]
            if sum(useful) > 0:
                mixed = weighted_sum(models, [gain / sum(useful) for gain in useful])
        self.load(mixed)
        self.memory = {START + name: tensor for name, tensor in mixed.items()}

    @torch.no_grad()
    def _gains(self, start: Mapping[str, Tensor], models: Sequence[Mapping[str, Tensor]]) -> list[float]:
        """Return (L(θ_k^{t-1}) − L(θ_n)) / ‖θ_n − θ_k^{t-1}‖ of each model; 0 if that is not finite."""
        assert self.validation is not None  # `holdout` asks for it
        before = self.loss_on(self.validation, start)
        trained = [f"model.{name}" for name, _ in self.nets["model"].named_parameters()]
        gains = []
        for model in models:
            lengths = [torch.linalg.vector_norm(model[name] - start[name]) for name in trained if name in model]
            gains.append((before - self.loss_on(self.validation, model)) / torch.stack(lengths).norm())
        finite = torch.stack(gains).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        return [float(gain) for gain in finite]

    def reply(self) -> Message:
        """Return the model, and the gains of the models received, in their order."""
        return Message(self.shared(), {"gains": self.gains})


class FedFomo(Server):
    """Mixes each client's model with those of the clients whose models reduce its loss on held-out windows most.

    The server keeps the latest model of every client that has replied, and the affinity P_ij: the sum over rounds of
    the gains of client j's model for client i. It sends client i the M models with the largest P_ij, ties in random
    order; each of them is replaced by a random one with probability ε. No message says whose models these are: they
    come in the order of their digests, which says nothing that the models do not.

    Deviations from the authors' code: ε falls with each round of the server, also for clients that are not in it, where
    theirs are in all; P adds gains as they are, where theirs are divided by the sum of a round's, so that early rounds,
    with larger gains, weigh more; and a client predicts with its model after training, theirs with the mix before it.
    """

    paper = "Zhang et al. 2021, arXiv:2012.08565"
    sends = "up to M models down, model up; own model"
    beyond_average = "single models"
    Client = FedFomoClient
    Params = FedFomoParams

    def __init__(self, task: Task, params: Any, initial: Mapping[str, Tensor]) -> None:
        super().__init__(task, params, initial)
        self.models: dict[int, Mapping[str, Tensor]] = {}
        self.digests: dict[int, bytes] = {}  # of the models
        self.affinity: dict[int, dict[int, float]] = {}

    def message(self, client: int, round: Round) -> Message:
        """Return the models of other clients that `choose` names, numbered from 0."""
        return Message(labelled(dict(enumerate(self.models[id] for id in self.choose(client, round)))))

    def choose(self, client: int, round: Round) -> list[int]:
        """Return the clients whose models `client` is sent, in the order of their models' digests.

        The choice is ε-greedy on P, drawn from (seed, round, client) alone.
        """
        rng = random.Random(f"FedFomo {self.task.seed} {round.index} {client}")
        others = sorted(self.models.keys() - {client})
        rng.shuffle(others)
        others.sort(key=lambda id: -self.affinity.get(client, {}).get(id, 0.0))
        epsilon = self.params.epsilon - self.params.epsilon_decay * (round.index - 1)
        chosen: list[int] = []
        while others and len(chosen) < self.params.models:
            chosen.append(others.pop(rng.randrange(len(others)) if rng.random() < epsilon else 0))
        return sorted(chosen, key=lambda id: (self.digests[id], id))

    def check_reply(self, client: int, reply: Message) -> None:
        """Require a model, and a gain of each model that this client was sent, finite as float32."""
        check_tensors(reply.tensors, self.weights)
        check_variances(reply.tensors)
        gains, sent = reply.meta.get("gains"), min(self.params.models, len(self.models.keys() - {client}))
        if not isinstance(gains, list) or len(gains) != sent:
            raise BadMessage(f"'gains' must be a list of {sent} numbers, one of each model that was sent")
        for gain in gains:
            if not isinstance(gain, float) or not abs(gain) <= torch.finfo(torch.float32).max:
                raise BadMessage(f"'gains' must be finite numbers, not {gain!r}")

    def aggregate(self, replies: Mapping[int, Message], round: Round) -> None:
        """Add the gains to the affinities of those whose models were sent, and store the models."""
        chosen = {id: self.choose(id, round) for id in replies}
        for id, reply in replies.items():
            row = dict(self.affinity.get(id, {}))
            for other, gain in zip(chosen[id], reply.meta["gains"], strict=True):
                row[other] = row.get(other, 0.0) + gain
            self.affinity[id] = row
        self._store({id: reply.tensors for id, reply in replies.items()})

    def _store(self, models: Mapping[int, Mapping[str, Tensor]]) -> None:
        self.models = {**self.models, **models}
        self.digests |= {id: hashlib.sha256(Message(model).to_bytes()).digest() for id, model in models.items()}

    def networks(self) -> Mapping[str, Tensor]:
        """Return no state: every client predicts with its own model."""
        return {}

    def save(self) -> Message:
        """Return all models and affinities."""
        rows = [[id, sorted(row.items())] for id, row in sorted(self.affinity.items())]
        return Message(labelled(self.models), {"affinity": rows})

    def restore(self, saved: Message) -> None:
        """Restore what `save` returned."""
        self.models, self.digests = {}, {}
        self._store(by_client(saved.tensors))
        self.affinity = {id: dict(map(tuple, row)) for id, row in saved.meta["affinity"]}
