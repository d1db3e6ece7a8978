"""Algorithms, models and data sets with one fault each, for the tests of `fedkdx_plugin.testing`.

Each table says: the check that must catch it -> what is broken, and the other checks that cannot but fail, too.
"""

from __future__ import annotations

import copy
import multiprocessing
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from baselines.fedavg import FedAvg, FedAvgClient
from baselines.fedprox import FedProx
from baselines.local import Local
from baselines.moon import MOON
from fedkdx_plugin.testing.made import TinyNet
from registry.aggregation import sample_weights, weighted_sum
from registry.interface import BadMessage, Message, Output, Server
from registry.messages import check_samples, check_state, check_tensors
from registry.parameters import Params, option
from tests.dataset_utils.synthetic import Synthetic


class Broken(NamedTuple):
    """What is broken, and which checks fail beside the one that it is for."""

    what: Any
    also: Iterable[str] = ()


def algorithm(base: type[Server] = FedAvg, client: Mapping[str, Any] | None = None, **server: Any) -> type[Server]:
    """Make an algorithm with other members, and with other members of its clients."""
    own = type("Client", (base.Client,), dict(client or {}))
    return type("Broken", (base,), {"Client": own, **server})


def checks_state(self, client, reply):
    check_state(reply, self.weights)


def replying(change, **client):
    """FedAvg's clients with something else in their reply: (client, tensors, meta) -> (tensors, meta)."""

    def reply(self):
        sent = FedAvgClient.reply(self)
        return Message(*change(self, dict(sent.tensors), dict(sent.meta)))

    return algorithm(client={"reply": reply, **client}, check_reply=checks_state)


def looks_at_labels(self, tensors, meta):
    return tensors, meta if len(self.data.y.unique()) else {}


def centres_logits(self, nets, batch, context):
    logits = nets["model"](batch.x).logits
    return {"model": batch.cross_entropy(logits - logits.mean(0))}


def sending(tensors, **members):
    """FedAvg with clients that send more than its server wants."""
    client = replying(lambda self, sent, meta: (sent | tensors(self), meta), **members).Client
    return algorithm(client=dict(vars(client)), check_reply=overlooks_foreign, aggregate=leaves_out_foreign)


def saying(numbers, **client):
    """FedAvg's clients that say some numbers beside what they send."""
    return replying(lambda self, tensors, meta: (tensors, meta | numbers(self)), **client)


def moved(state: Mapping[str, Tensor], by: float) -> dict[str, Tensor]:
    return {name: tensor + by for name, tensor in state.items()}


def draws(self, replies, round):
    FedAvg.aggregate(self, replies, round)
    self.weights = moved(self.weights, 1e-3 * random.SystemRandom().random())


class Counter(FedAvg):
    """Replies depend on how many were made before."""

    class Client(FedAvgClient):
        made = 0

        def reply(self):
            type(self).made += 1
            sent = FedAvgClient.reply(self)
            return Message(moved(sent.tensors, 1e-3 * (self.made % 3) * (self.id + 1)), sent.meta)

    def __init__(self, task, params, initial):
        super().__init__(task, params, initial)
        self.Client.made = 0

    def check_reply(self, client, reply):
        check_state(reply, self.weights)


class CountsReplies(FedAvg):
    """The server keeps how many replies its mean is of, which a sum does not tell."""

    sums = True
    count = 0

    def aggregate(self, replies, round):
        super().aggregate(replies, round)
        self.count = len(replies)

    def save(self):
        return Message(self.weights, {"count": self.count})

    def restore(self, saved):
        super().restore(saved)
        self.count = saved.meta["count"]


class Forgetful(FedAvg):
    """The server keeps a momentum and does not save it."""

    momentum: Mapping[str, Tensor] | None = None

    def aggregate(self, replies, round):
        before = self.weights
        super().aggregate(replies, round)
        step = {name: tensor - before[name] for name, tensor in self.weights.items()}
        if self.momentum is not None:
            step = {name: tensor + 0.1 * self.momentum[name] for name, tensor in step.items()}
        self.momentum = step
        self.weights = {name: before[name] + tensor for name, tensor in step.items()}

    def restore(self, saved):
        super().restore(saved)
        self.momentum = None


def message_that_changes(self, client, round):
    self.weights = moved(self.weights, 1e-4)
    return Message(self.weights)


def messages_that_change(self, clients, round):
    self.weights = moved(self.weights, 1e-4)
    return FedAvg.messages(self, clients, round)


def knows_one_model(self, task, params, initial):
    FedAvg.__init__(self, task, params, initial)
    if task.model_class is not TinyNet:
        raise TypeError("no such layer")


def divides_by_others(self, tensors, meta):
    share = (self.samples - 1) / (self.samples - 1)
    return {name: tensor * share for name, tensor in tensors.items()}, meta


def teaches_nothing(self, nets, batch, context):
    return {"model": 0 * batch.cross_entropy(nets["model"](batch.x).logits)}


def weighs_by_number(self, replies, round):
    FedAvg.aggregate(self, {id: replace(one, meta={"samples": id + 1}) for id, one in replies.items()}, round)


def takes_its_own_mean(self, replies, round):
    self.weights = weighted_sum([reply.tensors for reply in replies.values()], sample_weights(replies))


def thaws(self, message):
    MOON.Client.receive(self, message)
    self.nets["previous"].requires_grad_(True)


def head(self) -> Tensor:
    return self.state()["model.head.weight"]


def running_mean(self) -> list[float]:
    return next(tensor for name, tensor in self.state().items() if name.endswith("running_mean")).tolist()


@dataclass(frozen=True)
class Silent(Params):
    """A hyper-parameter without help."""

    mu: float = 0.01


@dataclass(frozen=True)
class Idle(Params):
    """A hyper-parameter that nothing reads."""

    mu: float = option(0.01, "weight of the proximal term", 0.0)
    zeta: int = option(3, "nothing", 1)


def other_in_a_process(self, tensors, meta):
    return moved(tensors, 1e-3 if multiprocessing.parent_process() else 0.0), meta


def notes(cls, clients, states):
    for client in clients:
        client.together = True


def other_when_together(self, tensors, meta):
    return moved(tensors, 1e-3 if getattr(self, "together", False) else 0.0), meta


def refuses_somebody(self, client, reply):
    if client == 3:
        raise BadMessage("not from you")
    FedAvg.check_reply(self, client, reply)


def changes_by_looking(self, client, reply):
    FedAvg.check_reply(self, client, reply)
    self.weights = moved(self.weights, 1e-6)


def known(self, reply):
    return Message({name: tensor for name, tensor in reply.tensors.items() if name in self.weights}, reply.meta)


def overlooks_foreign(self, client, reply):
    check_state(known(self, reply), self.weights)


def leaves_out_foreign(self, replies, round):
    FedAvg.aggregate(self, {id: known(self, reply) for id, reply in replies.items()}, round)


def trusts_samples(self, client, reply):
    check_tensors(reply.tensors, self.weights)


def looks_at_the_form(self, client, reply):
    check_tensors(reply.tensors, self.weights)
    check_samples(reply)


class Scores(FedAvg):
    """Takes in whatever number a client says."""

    class Client(FedAvgClient):
        def reply(self):
            sent = FedAvgClient.reply(self)
            return Message(sent.tensors, {**sent.meta, "score": 1.0})

    def check_reply(self, client, reply):
        check_state(reply, self.weights)

    def aggregate(self, replies, round):
        super().aggregate(replies, round)
        mean = sum(reply.meta["score"] for reply in replies.values()) / len(replies)
        self.weights = {name: tensor * mean for name, tensor in self.weights.items()}


def moves_by_samples(self, replies, round):
    """Make a share of FedAvg's step, which the largest number of samples decides."""
    before, most = self.weights, max(reply.meta["samples"] for reply in replies.values())
    FedAvg.aggregate(self, replies, round)
    self.weights = {name: own.lerp(self.weights[name], 1 - 1 / (1 + most)) for name, own in before.items()}


PRIVATE = {"private": ("model.head.*",)}
ALGORITHMS = {
    "check_same_seed": Broken(
        algorithm(aggregate=draws),
        (
            "check_order_of_clients",
            "check_restart",
            "check_asking_for_messages",
            "check_renaming_clients",
            "check_parallel",
            "check_stacked",
            "check_wrong_replies",
            "check_variances_of_batch_norm",
            "check_mutated_replies",
        ),
    ),
    "check_models": Broken(algorithm(__init__=knows_one_model)),
    "check_unequal_clients": Broken(replying(divides_by_others)),
    "check_order_of_clients": Broken(
        Counter,
        (
            "check_restart",
            "check_asking_for_messages",
            "check_renaming_clients",
            "check_parallel",
            "check_stacked",
        ),
    ),
    "check_restart": Broken(Forgetful),
    "check_asking_for_messages": Broken(
        algorithm(message=message_that_changes), ("check_no_replies", "check_renaming_clients", "check_private_mean")
    ),
    "check_beats_chance": Broken(algorithm(client={"losses": teaches_nothing}), ("check_no_replies",)),
    "check_learning_from_others": Broken(Local),
    "check_no_replies": Broken(algorithm(messages=messages_that_change), ("check_private_mean",)),
    "check_renaming_clients": Broken(algorithm(aggregate=weighs_by_number)),
    "check_frozen_networks": Broken(algorithm(MOON, {"receive": thaws})),
    "check_private_names": Broken(saying(lambda self: {"~model.head.weight": (head(self) + 1).tolist()}, **PRIVATE)),
    "check_private_values": Broken(saying(lambda self: {"note": head(self).tolist()}, **PRIVATE)),
    "check_local_batch_norm": Broken(saying(lambda self: {"note": running_mean(self)})),
    "check_windows_and_labels": Broken(saying(lambda self: {"example": self.data.x[0].tolist()})),
    "check_parameters_documented": Broken(algorithm(FedProx, Params=Silent)),
    "check_parameters_matter": Broken(algorithm(FedProx, Params=Idle)),
    "check_averaging": Broken(algorithm(aggregate=takes_its_own_mean)),
    "check_sums": Broken(CountsReplies),
    "check_private_mean": Broken(algorithm(aggregate=moves_by_samples, beyond_average="", sums=False)),
    "check_windows": Broken(replying(looks_at_labels, windows_meet="")),
    "check_parallel": Broken(replying(other_in_a_process)),
    "check_stacked": Broken(replying(other_when_together, before_replies=classmethod(notes))),
    "check_refused_reply": Broken(
        algorithm(check_reply=refuses_somebody),
        (
            "check_unequal_clients",
            "check_renaming_clients",
            "check_averaging",
            "check_private_mean",
            "check_wrong_replies",
            "check_variances_of_batch_norm",
            "check_mutated_replies",
        ),
    ),
    "check_looking_at_replies": Broken(algorithm(check_reply=changes_by_looking), ("check_private_mean",)),
    "check_wrong_replies": Broken(algorithm(check_reply=overlooks_foreign, aggregate=leaves_out_foreign)),
    "check_variances_of_batch_norm": Broken(algorithm(check_reply=looks_at_the_form)),
    "check_mutated_replies": Broken(Scores),
}
# others that these checks must catch, whatever else fails
MORE_ALGORITHMS = [
    ("check_windows", algorithm(client={"losses": centres_logits, "windows_meet": ""})),
    ("check_windows_and_labels", saying(lambda self: {"seen": self.data.y.tolist()})),
    ("check_private_values", sending(lambda self: {"note": head(self).half().flatten()}, **PRIVATE)),
    ("check_windows_and_labels", sending(lambda self: {"example": self.data.x[:2]})),
    ("check_wrong_replies", algorithm(check_reply=trusts_samples)),
    ("check_wrong_replies", algorithm(check_reply=lambda self, client, reply: None)),
    ("check_parameters_documented", algorithm(FedProx, Params=type("Plain", (), {"mu": 0.01}))),
]


class WrongSize(TinyNet):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.feature_size += 1


class OtherHead(TinyNet):
    def forward(self, x):
        features = self.features(x)
        return Output(features, 2 * self.head(features))


class Unused(TinyNet):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.spare = nn.Parameter(torch.ones(3))


class Counting(TinyNet):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.register_buffer("asked", torch.zeros((), dtype=torch.int64))

    def features(self, x):
        if not self.training:
            self.asked += 1
        return super().features(x)


class OneStart(TinyNet):
    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        rng = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.3, 0.3, generator=rng)


class Centring(TinyNet):
    def features(self, x):
        return super().features(x if self.training else x - x.mean(0))


class Remembering(TinyNet):
    offset = 0.0

    def features(self, x):
        if self.training:
            self.offset = self.offset + 0.1
        return super().features(x) + self.offset * (not self.training)


class Single(TinyNet):
    def __deepcopy__(self, memory):
        return copy.copy(self)


class Fours(TinyNet):
    """Tells a batch of four windows from others, as the stacked backend, which fills batches up, cannot."""

    def features(self, x):
        return super().features(x) * (2 if self.training and len(x) == 4 else 1)


MODELS = {
    "check_shapes": Broken(WrongSize),
    "check_features_and_head": Broken(OtherHead),
    "check_gradients": Broken(Unused),
    "check_modes": Broken(Counting),
    "check_seed": Broken(OneStart),
    "check_rows": Broken(Centring),
    "check_state": Broken(Remembering),
    "check_copy": Broken(Single, ("check_stacked_training",)),
    "check_stacked_training": Broken(Fours),
}


class Twice(Synthetic):
    classes = ("lying", "lying", "walking")


class Unsorted(Synthetic):
    def files(self, path):
        return [*sorted(path.iterdir(), reverse=True), *path.iterdir()]


class Nameless(Synthetic):
    def load(self, path):
        for recording in super().load(path):
            yield replace(recording, subject="" if recording.subject == "s1" else recording.subject)


class Backwards(Synthetic):
    """Recordings come in another order every other time."""

    forth = True

    def load(self, path):
        type(self).forth = not self.forth
        recordings = list(super().load(path))
        return recordings if self.forth else recordings[::-1]


class Drawing(Synthetic):
    def load(self, path):
        for recording in super().load(path):
            yield replace(recording, signals=recording.signals + np.random.default_rng().normal())


class WithoutWalking(Synthetic):
    def load(self, path):
        for recording in super().load(path):
            yield replace(recording, labels=np.minimum(recording.labels, 1))


class Foreign(Synthetic):
    def load(self, path):
        for recording in super().load(path):
            yield replace(recording, labels=recording.labels + 5)


SOURCES = {
    "check_description": Broken(Twice),
    "check_files": Broken(Unsorted),
    "check_contents": Broken(Nameless),
    "check_reading_twice": Broken(Drawing, ("check_shards",)),
    "check_shards": Broken(WithoutWalking),
}
MORE_SOURCES = [("check_contents", Foreign), ("check_reading_twice", Backwards)]
