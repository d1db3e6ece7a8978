"""CFL: Sattler, Müller and Samek, Clustered Federated Learning, 2020."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baselines.fedavg import FedAvg
from registry.aggregation import by_client, labelled, sample_weights
from registry.interface import Message, Round, Task, parameter_names
from registry.parameters import Params, option

SIDES = "sides/"  # prefix of what is known of the two halves of a cluster that was split


@dataclass(frozen=True)
class CFLParams(Params):
    """Hyper-parameters of CFL, by the paper's rule of thumb.

    ε1 is a tenth of the largest mean update, and ε2 1 to 10 times ε1. Here ε2 is 4 ε1, as in the authors' runs.
    """

    eps1: float = option(0.1, "a cluster is stationary below this share of the largest mean update (ε1)", 0.0, 1.0)
    eps2: float = option(0.4, "and split if a client's update is at least this share of it (ε2)", 0.0, 10.0)
    gamma: float = option(0.5, "two halves are split only above this separation √((1 − α)/2) (γ_max)", 0.0, 1.0)


class CFL(FedAvg):
    """Averages models within clusters, and splits a stationary one whose clients still pull apart, by cosine.

    All clients start in one cluster, so that until the first split this is FedAvg. In each round, of a cluster's
    replies with updates Δ_i (parameters alone) and mean Δ by samples: if ‖Δ‖ < ε1 and max ‖Δ_i‖ ≥ ε2, the clients are
    divided into two halves such that the largest cosine α between them is as small as can be, and stay so if
    √((1 − α)/2) > γ (Algorithm 1 to 3). ε1 and ε2 are `eps1` and `eps2` times the longest Δ of any cluster so far, as
    the scale of updates depends on model, rate and epochs.

    A cluster that was split stays as it was then, as the paper's tree has it: its model, and the mean direction of the
    updates of each half (the paper stores all updates). A member that did not reply in that round, and a client that
    comes later, is sent that model when it trains next; its update decides by cosine which half it joins, where it is
    averaged from then on. Until then, and for ever if unseen, it predicts with the model before the split. The server
    learns no more than models: cluster by cluster, it compares those it is sent.
    """

    paper = "Sattler et al. 2020, arXiv:1910.01991"
    sends = "model down, model up; the cluster's model"
    beyond_average = "similarities of single updates"
    Params = CFLParams

    def __init__(self, task: Task, params: Any, initial: Mapping[str, Tensor]) -> None:
        super().__init__(task, params, initial)
        self.trained = [name for name in parameter_names(self.Client.build(task)) if name in initial]
        self.models: dict[int, Mapping[str, Tensor]] = {0: dict(initial)}  # of each cluster; 0 is all clients'
        self.halves: dict[int, int] = {}  # cluster that was split -> number of its first half; the second is the next
        self.sides: dict[int, Tensor] = {}  # the same -> mean unit update of each half, (2, values), float64
        self.members: dict[int, int] = {}  # client that has trained -> cluster
        self.longest = 0.0

    def message(self, client: int, round: Round) -> Message:
        """Return the model of the client's cluster."""
        return Message(self.models[self.members.get(client, 0)])

    def aggregate(self, replies: Mapping[int, Message], round: Round) -> None:
        """Average and perhaps split each cluster, and send those that come late to one that was split on their way."""
        clusters = {id: self.members.get(id, 0) for id in replies}
        self.members = dict(sorted((self.members | clusters).items()))
        for cluster in sorted(set(clusters.values())):
            own = {id: replies[id] for id in replies if clusters[id] == cluster}
            updates = self._updates(own, self.models[cluster])
            if cluster in self.halves:
                near = _unit(updates) @ self.sides[cluster].T
                self._join(cluster, own, near.argmax(1).tolist())
            else:
                self._average(cluster, own, updates, round)

    def _average(self, cluster: int, own: Mapping[int, Message], updates: Tensor, round: Round) -> None:
        """Replace a cluster's model by the mean, or split the cluster after that."""
        super().aggregate(own, round)
        self.models = {**self.models, cluster: self.weights}
        shares = torch.tensor(sample_weights(own), dtype=torch.float64, device=updates.device)
        mean = float(torch.linalg.vector_norm(shares @ updates))
        self.longest = max(self.longest, mean)
        longest = float(torch.linalg.vector_norm(updates, dim=1).max())
        if len(own) < 2 or mean >= self.params.eps1 * self.longest or longest < self.params.eps2 * self.longest:
            return
        units = _unit(updates)
        halves, alpha = bipartition((units @ units.T).tolist())
        if ((1 - alpha) / 2) ** 0.5 > self.params.gamma:
            places = torch.tensor(halves, device=units.device)
            sides = torch.stack([units[places == side].mean(0) for side in (0, 1)])
            first = max(self.models) + 1
            self.halves, self.sides = {**self.halves, cluster: first}, {**self.sides, cluster: sides}
            self.models = {**self.models, first: self.weights, first + 1: self.weights}
            self._join(cluster, own, halves)

    def _join(self, cluster: int, own: Mapping[int, Message], sides: Sequence[int]) -> None:
        moved = {id: self.halves[cluster] + side for id, side in zip(own, sides, strict=True)}
        self.members = dict(sorted((self.members | moved).items()))

    def _updates(self, replies: Mapping[int, Message], start: Mapping[str, Tensor]) -> Tensor:
        """Return Δ_i of each reply, (replies, values), in float64, in which their squares are finite."""
        return torch.stack(
            [
                torch.cat([(reply.tensors[name].double() - start[name].double()).flatten() for name in self.trained])
                for reply in replies.values()
            ]
        )

    def networks(self) -> Mapping[str, Tensor]:
        """Return the model of the first cluster, and of each client that has left it."""
        return {**self.models[0], **labelled({id: self.models[c] for id, c in self.members.items() if c})}

    def figures(self) -> Mapping[str, float]:
        """Return the number of clusters that are not split."""
        return {"clusters": float(len(self.models) - len(self.halves)) if self.members else float("nan")}

    def save(self) -> Message:
        """Return all clusters, and who is in which."""
        sides = {f"{SIDES}{cluster}": own for cluster, own in self.sides.items()}
        tree = {"halves": sorted(self.halves.items()), "members": sorted(self.members.items())}
        return Message(labelled(self.models) | sides, tree | {"longest": self.longest})

    def restore(self, saved: Message) -> None:
        """Restore what `save` returned."""
        sides = {name: own for name, own in saved.tensors.items() if name.startswith(SIDES)}
        self.sides = {int(name.removeprefix(SIDES)): own for name, own in sides.items()}
        self.models = dict(by_client({name: own for name, own in saved.tensors.items() if name not in sides}))
        self.halves, self.members = dict(saved.meta["halves"]), dict(saved.meta["members"])
        self.longest = saved.meta["longest"]


def bipartition(cosines: Sequence[Sequence[float]]) -> tuple[list[int], float]:
    """Divide clients so that the largest cosine between the two halves is the smallest possible (Algorithm 1).

    The most similar clients are joined first, until two groups are left.

    Args:
        cosines: symmetric, (clients, clients), at least two.

    Returns:
        the half of each client, 0 or 1, client 0 in half 0; and that largest cosine.
    """
    count = len(cosines)
    group = list(range(count))
    pairs = sorted(
        ((i, j) for i in range(count) for j in range(i)), key=lambda pair: (-cosines[pair[0]][pair[1]], pair)
    )
    for i, j in pairs:
        if len(set(group)) == 2:
            break
        group = [group[j] if own == group[i] else own for own in group]
    halves = [int(own != group[0]) for own in group]
    return halves, max(cosines[i][j] for i, j in pairs if halves[i] != halves[j])


def _unit(updates: Tensor) -> Tensor:
    """Scale rows to length 1; a row of zeros stays."""
    lengths = torch.linalg.vector_norm(updates, dim=1, keepdim=True)
    units: Tensor = updates / lengths.masked_fill(lengths == 0, 1)
    return units
