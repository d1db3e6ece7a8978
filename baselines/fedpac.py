"""FedPAC: Xu, Tong and Huang, Personalized FL with Feature Alignment and Classifier Collaboration, ICLR 2023."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from baselines.fedavgft import FedAvgFT, FedAvgFTClient
from baselines.fedper import HEAD
from registry.aggregation import by_client, labelled, weighted_sum
from registry.interface import BadMessage, Batch, Message, Round, Task, matches
from registry.messages import check_state
from registry.parameters import Params, option
from registry.prototypes import (
    COUNTS,
    PROTOTYPES,
    Prototypes,
    check_counts,
    class_counts,
    class_means,
    distances,
    features_of,
)

KNOWN = "known"
MEANS, VARIANCE = "classifier/means", "classifier/variance"
OWN = (PROTOTYPES, MEANS, VARIANCE)  # what a reply holds beside the model


@dataclass(frozen=True)
class FedPACParams(Params):
    """Hyper-parameters of FedPAC; the default is that of the authors' code (github.com/JianXu95/FedPAC)."""

    lam: float = option(1.0, "weight λ of the distance of features to the global prototypes", 0.0)


class FedPACClient(FedAvgFTClient):
    """Trains its head in the first epoch, then the body on CE + λ/d ‖h(x) − C_y‖², with the global prototypes C.

    For a class without a global prototype, C_y is the client's own of before training, as in the authors' code; in the
    first round there is no such term. A round of a single epoch trains both at once. It predicts with what it trained
    last.
    """

    windows_meet = "sends the mean features of each class, without noise"

    def trains(self, epoch: int, epochs: int) -> Sequence[str]:
        """Return the head in the first epoch, and all else after it."""
        if epochs == 1:
            return ("*",)
        return (HEAD,) if epoch == 0 else ("*", f"!{HEAD}")

    def receive(self, message: Message) -> None:
        """Install body and head, and compute the statistics of the client's features under them."""
        super().receive(Message({name: t for name, t in message.tensors.items() if name != PROTOTYPES}))
        assert self.data is not None  # the engine sets it while the client works
        features, y = features_of(self.nets["model"], self.data), self.data.y
        self.counts = class_counts(y, self.task.classes)
        means = class_means(features, y, self.task.classes)
        self.statistics = statistics(features, means, self.counts)
        received, known = message.tensors[PROTOTYPES], message.meta["known"]
        everywhere = torch.zeros_like(means)
        everywhere[known] = 1
        targets = torch.where(everywhere > 0, received.to(means), means)
        self.targets = {PROTOTYPES: targets, KNOWN: torch.full_like(targets[:, 0], float(bool(known)))}

    def context(self) -> Mapping[str, Tensor]:
        """Return C_c, (classes, d), and whether there are global prototypes already, (classes,)."""
        return self.targets

    def losses(
        self, nets: Mapping[str, Callable[[Tensor], Any]], batch: Batch, context: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the cross-entropy and the distance, which no head feels."""
        features, logits = nets["model"](batch.x)
        distance = distances(features, batch.y, context[PROTOTYPES], context[KNOWN])
        return {"model": batch.cross_entropy(logits), "alignment": self.params.lam * batch.mean(distance)}

    def reply(self) -> Message:
        """Return the model, the prototypes after training, and the statistics before it."""
        reply = super().reply()
        assert self.data is not None  # the engine sets it while the client works
        own = class_means(features_of(self.nets["model"], self.data), self.data.y, self.task.classes)
        tensors = dict(zip(OWN, (own, *self.statistics), strict=True))
        return Message(dict(reply.tensors) | tensors, {**reply.meta, COUNTS: self.counts})


class FedPAC(FedAvgFT):
    """Averages bodies, aligns features to global prototypes, and combines the clients' heads for each client.

    The head that client i receives next is Σ_j α_ij head_j over the clients of its last round; α_i ≥ 0 adds up to 1
    and minimises Σ_j α_ij² v_j + Σ_jl α_ij α_il Σ_c (m_ic − m_jc)ᵀ(m_ic − m_lc), with m_kc = p_kc c_kc of the features
    h of class c (share p, mean c_kc) under the model received, and v_k = Σ_c (p_kc E‖h‖² − p_kc² ‖c_kc‖²) / n_k, as
    in the authors' code. A client that has never trained has the mean of all heads.

    The quadratic programme is solved as non-negative least squares (`scipy`), exactly and for any such matrix, where
    the authors cut small eigenvalues and weights. Deviations: the head's epoch is the first of the round instead of an
    added one, and has the learning rate of all others, instead of 0.1. The server learns every client's number of
    windows of each class, and of a class with a single window its features.
    """

    paper = "Xu, Tong and Huang 2023, arXiv:2306.11867"
    sends = "model and prototypes down and up, combined head down; own last training"
    Client = FedPACClient
    beyond_average = "statistics of features by class"
    Params = FedPACParams

    def __init__(self, task: Task, params: Any, initial: Mapping[str, Tensor]) -> None:
        super().__init__(task, params, initial)
        self.heads: dict[int, Mapping[str, Tensor]] = {}  # client -> the head to send to it
        size = task.model().feature_size
        self.prototypes = Prototypes(task.classes, size)
        shape = torch.empty(task.classes, size)
        self.expected = self.weights | dict(zip(OWN, (shape, shape, torch.empty(())), strict=True))

    def message(self, client: int, round: Round) -> Message:
        """Return the mean body, the head combined for the client, and the prototypes."""
        prototypes = self.prototypes.message()
        model = self.weights | dict(self.heads.get(client, {}))
        return Message(model | dict(prototypes.tensors), prototypes.meta)

    def check_reply(self, client: int, reply: Message) -> None:
        """Require a model, prototypes, the statistics of features, and numbers of windows that make up `samples`."""
        check_state(reply, self.expected)
        if sum(check_counts(reply, self.task.classes)) != reply.meta.get("samples"):
            raise BadMessage(f"'samples' must be the sum of '{COUNTS}'")
        if not reply.tensors[VARIANCE] >= 0:
            raise BadMessage(f"'{VARIANCE}' must be at least 0")

    def contribution(self, client: int, reply: Message) -> Mapping[str, Tensor]:
        """Return the model of a reply."""
        return {name: tensor for name, tensor in reply.tensors.items() if name not in OWN}

    def idle(self, sent: Message) -> Mapping[str, Tensor]:
        """Return the model that was sent."""
        return self.contribution(0, sent)

    def aggregate(self, replies: Mapping[int, Message], round: Round) -> None:
        """Average models and prototypes, and combine a head for each client of the round."""
        models = {id: self.contribution(id, reply) for id, reply in replies.items()}
        super().aggregate({id: Message(model, replies[id].meta) for id, model in models.items()}, round)
        parts = [reply.tensors for reply in replies.values()]
        self.prototypes.update([own[PROTOTYPES] for own in parts], [reply.meta[COUNTS] for reply in replies.values()])
        means = np.stack([own[MEANS].flatten().double().cpu().numpy() for own in parts])
        variances = np.array([float(own[VARIANCE]) for own in parts])
        heads = [{name: t for name, t in model.items() if matches(name, (HEAD,))} for model in models.values()]
        for place, id in enumerate(replies):
            shares = combination(means - means[place], variances).tolist()
            self.heads = self.heads | {id: weighted_sum(heads, shares)}

    def save(self) -> Message:
        """Return the mean model, the prototypes, and every client's head."""
        prototypes = self.prototypes.message()
        heads = {f"head/{name}": tensor for name, tensor in labelled(self.heads).items()}
        return Message(self.weights | heads | dict(prototypes.tensors), prototypes.meta)

    def restore(self, saved: Message) -> None:
        """Restore what `save` returned."""
        self.prototypes.restore(saved)
        heads = {name.removeprefix("head/"): t for name, t in saved.tensors.items() if name.startswith("head/")}
        self.heads = dict(by_client(heads))
        self.weights = {name: tensor for name, tensor in saved.tensors.items() if name.startswith("model.")}


def statistics(features: Tensor, means: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return m_c = p_c c_c, (classes, d), and v = Σ_c (p_c E_c ‖h‖² − p_c² ‖c_c‖²) / n, ().

    Args:
        features: h, (n, d).
        means: c_c, their means of each class, (classes, d).
        counts: number of rows of each class.
    """
    n = len(features)
    weighted = means * (torch.tensor(counts, device=means.device).to(means) / n).unsqueeze(1)
    variance = (features.square().sum() / n - weighted.square().sum()) / n
    return weighted, variance.clamp(min=0)


def combination(differences: np.ndarray[Any, Any], variances: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the α ≥ 0 with sum 1 that minimises Σ_j α_j² v_j + ‖Σ_j α_j d_j‖², (clients,).

    With A of columns (√v_j e_j, d_j), it is the direction of the β ≥ 0 that minimises ‖Aβ‖² + (Σ_j β_j − 1)²: for
    β = sα the best s leaves q / (1 + q), which grows with q = ‖Aα‖².

    Args:
        differences: d_j, (clients, values).
        variances: v_j, (clients,).
    """
    gram = differences @ differences.T + np.diag(variances)
    scale = np.trace(gram)
    energy, vectors = np.linalg.eigh(gram / scale if scale > 0 else gram)
    root = np.sqrt(energy.clip(min=0))[:, None] * vectors.T
    from scipy.optimize import nnls  # when used: it takes a while to load

    beta, _ = nnls(np.vstack([root, np.ones(len(gram))]), np.append(np.zeros(len(gram)), 1.0))
    return np.asarray(beta / beta.sum())
