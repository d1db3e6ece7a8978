"""IFCA: Ghosh et al., An Efficient Framework for Clustered Federated Learning, NeurIPS 2020."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from baselines.fedavg import FedAvg, FedAvgClient
from registry.aggregation import by_client, labelled
from registry.interface import BadMessage, Message, Round, Task, float_state
from registry.messages import check_state
from registry.parameters import Params, option
from registry.text import shown


@dataclass(frozen=True)
class IFCAParams(Params):
    """Hyper-parameters of IFCA; the paper's k is the number of clusters in its data, 2 or 4."""

    clusters: int = option(2, "number k of cluster models, all of which are sent down; 1 is FedAvg", 1)


class IFCAClient(FedAvgClient):
    """Trains, of the k models received, the one with the lowest loss on its own windows, and names it.

    The loss is the cross-entropy on all training windows by the models' running statistics; of equal ones the first.
    """

    windows_meet = "chooses a model by the loss on its windows, without noise"

    def receive(self, message: Message) -> None:
        """Install the model of its cluster."""
        assert self.data is not None  # the engine sets it while the client works
        models = by_client(message.tensors)
        losses = torch.stack([self.loss_on(self.data, model) for model in models.values()])
        self.cluster = int(losses.nan_to_num(nan=torch.inf).argmin())
        self.load(models[self.cluster])

    def reply(self) -> Message:
        """Return the trained model, and whose it is."""
        return Message(self.shared(), {"samples": self.samples, "cluster": self.cluster})


class IFCA(FedAvg):
    """Keeps k models; each client chooses the one with the lowest loss, and the server averages those who chose alike.

    That is the paper's model averaging. A model that nobody chose in a round stays. Model 0 starts as all algorithms
    do, the others from draws of their own. It happens that one model is the best for everybody from the first round on,
    and the others are never trained; the paper tries several draws, here another seed or a larger k is another try.
    Sharing lower layers between clusters, as in some of the paper's experiments, is left out.

    A client predicts with the model of the cluster that it named last, as this is now. A client that has never
    trained, or is unseen, has not chosen: it predicts with the model of the cluster with most samples. Beyond a model
    the server learns each client's cluster.
    """

    paper = "Ghosh et al. 2020, arXiv:2006.04088"
    sends = "k models down, model and number of cluster up; the cluster's model"
    Client = IFCAClient
    beyond_average = "numbers of clusters"
    Params = IFCAParams

    def __init__(self, task: Task, params: Any, initial: Mapping[str, Tensor]) -> None:
        super().__init__(task, params, initial)
        self.models: dict[int, Mapping[str, Tensor]] = {0: dict(initial)}
        for cluster in range(1, params.clusters):
            self.models[cluster] = _drawn(task, cluster, initial)
        self.members: dict[int, tuple[int, int]] = {}  # client -> cluster and samples, as it named them last

    def message(self, client: int, round: Round) -> Message:
        """Return all models: `<cluster>/<full name>`."""
        return Message(labelled(self.models))

    def check_reply(self, client: int, reply: Message) -> None:
        """Require a model with `samples`, and the number of a cluster."""
        check_state(reply, self.models[0])
        cluster = reply.meta.get("cluster")
        if type(cluster) is not int or cluster not in self.models:
            raise BadMessage(f"'cluster' must be one of {list(self.models)}, not {shown(repr(cluster))}")

    def aggregate(self, replies: Mapping[int, Message], round: Round) -> None:
        """Replace the model of each cluster by the mean of its clients' models."""
        models = dict(self.models)
        for cluster in self.models:
            own = {id: reply for id, reply in replies.items() if reply.meta["cluster"] == cluster}
            if own:
                super().aggregate(own, round)
                models[cluster] = self.weights
        self.models = models
        named = {id: (reply.meta["cluster"], reply.meta["samples"]) for id, reply in replies.items()}
        self.members = dict(sorted((self.members | named).items()))

    def networks(self) -> Mapping[str, Tensor]:
        """Return the model of the cluster with most samples (of equal ones the first), and each member's own."""
        sizes = dict.fromkeys(self.models, 0)
        for cluster, samples in self.members.values():
            sizes[cluster] += samples
        largest = max(sizes, key=lambda cluster: (sizes[cluster], -cluster))
        own = {id: self.models[cluster] for id, (cluster, _) in self.members.items() if cluster != largest}
        return {**self.models[largest], **labelled(own)}

    def figures(self) -> Mapping[str, float]:
        """Return the number of clients that named each cluster last."""
        counts = [sum(cluster == own for own, _ in self.members.values()) for cluster in self.models]
        return {
            f"clients_{cluster}": float(count) if self.members else float("nan") for cluster, count in enumerate(counts)
        }

    def save(self) -> Message:
        """Return all models and the clients' clusters."""
        members = [[id, *named] for id, named in self.members.items()]
        return Message(labelled(self.models), {"members": members})

    def restore(self, saved: Message) -> None:
        """Restore what `save` returned."""
        self.models = dict(by_client(saved.tensors))
        self.members = {id: (cluster, samples) for id, cluster, samples in saved.meta["members"]}


def _drawn(task: Task, cluster: int, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the initial model of a cluster, drawn from (seed, cluster), with the names of `like`, on its devices."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(random.Random(f"IFCA {task.seed} {cluster}").getrandbits(63))
        state = float_state({"model": task.model()})
    return {name: state[name].to(own) for name, own in like.items()}
