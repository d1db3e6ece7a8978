"""What crosses the wire between server and sites: announcement, request and answer, each one `Message`.

Whatever arrives is checked whole by one of the `from_message`, which raise BadMessage. Imports no Flower.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from dataset_utils.scaling import Statistics
from dataset_utils.shards import UNKNOWN
from dataset_utils.spec import EVALUATE_ON, SCALES
from fedkdx_plugin.engine import scaling
from fedkdx_plugin.engine.metrics import BINS, FIGURES, Metrics
from registry.interface import BadMessage, Message, Round
from registry.messages import MOST_SAMPLES
from registry.text import is_plain_name, is_shown_as_it_is, shown

PROTOCOL = 7
LONGEST_TEXT = 300  # characters
MOST_CLIENTS = 10**6
MOST_CLASSES = 1000  # each client's confusion matrix has their square
MOST_PACKAGES = 100  # whose versions a site states
MOST_VALUES = 10**8  # of a window
FEDERATED = "federated"
# what all sites must have in common, and how a difference is described
COMMON = {
    "shape": "windows of shape",
    "classes": "classes",
    "evaluated_on": "measures on",
    "scale": "windows scaled (--scale)",
}
SHARES = ("accuracy", "f1", "recall", "auc", "auc_macro")


Read = TypeVar("Read", bound=Callable[..., Any])


def checked(what: str) -> Callable[[Read], Read]:
    """Decorate what reads a message: whatever it raises becomes a BadMessage that says what the message is not."""

    def decorate(read: Read) -> Read:
        @functools.wraps(read)
        def safely(*args: Any, **options: Any) -> Any:
            try:
                return read(*args, **options)
            except BadMessage:
                raise
            except Exception as error:  # contents from outside, of any type
                raise BadMessage(f"not {what}: {shown(error)}") from error

        return safely  # type: ignore[return-value]

    return decorate


@dataclass(frozen=True)
class Announcement:
    """Tells the server what a site has when it joins: counts and names, no windows.

    Attributes:
        client: its number in the federation.
        samples, tests: number of its training and of its test windows.
        shape: (channels, 1, time) of a window.
        classes: names of the classes, in order.
        data: name of the data set.
        evaluated_on: the kind of its test windows, 'test' or 'validation'.
        scale: how its windows are scaled (`spec.SCALES`).
        versions: package -> version.
        statistics: mean and variance of its training windows, where windows are to be scaled by all sites' together.
    """

    client: int
    samples: int
    tests: int
    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    data: str
    evaluated_on: str
    scale: str
    versions: Mapping[str, str]
    statistics: Statistics | None = field(default=None, compare=False)

    def to_message(self) -> Message:
        """Return it as it is sent."""
        about = {"shape": list(self.shape), "classes": list(self.classes), "versions": dict(self.versions)}
        return Message(_named("statistics", self.statistics), {"protocol": PROTOCOL, **self.facts(), **about})

    def facts(self) -> dict[str, Any]:
        """Return all attributes but the statistics."""
        return {name: value for name, value in vars(self).items() if name != "statistics"}

    @staticmethod
    @checked("an announcement")
    def from_message(message: Message) -> Announcement:
        """Read what a site sent. Raises BadMessage unless every value is of its type and within its bounds."""
        meta = checked_meta(message)
        client = whole(meta["client"], 0, MOST_CLIENTS - 1)
        samples, tests = whole(meta["samples"], 1, MOST_SAMPLES), whole(meta["tests"], 0, MOST_SAMPLES)
        channels, one, time = (whole(size, 1, MOST_VALUES) for size in meta["shape"])
        if one != 1 or channels * time > MOST_VALUES:
            raise BadMessage(f"windows of shape {shown(meta['shape'])}; (channels, 1, time) is right")
        data, evaluated_on, scale = (shown(meta[name]) for name in ("data", "evaluated_on", "scale"))
        if not is_plain_name(meta["data"]):
            raise BadMessage(f"its data cannot be called {data!r}")
        if evaluated_on not in EVALUATE_ON or scale not in (*SCALES, UNKNOWN):
            raise BadMessage(f"measures on {evaluated_on!r} windows, scaled {scale!r}")
        classes = _names(meta["classes"], MOST_CLASSES)
        if len(classes) < 2 or len(set(classes)) < len(classes):
            raise BadMessage(f"classes {shown(classes)}; two or more, each once, are right")
        names = _names(list(meta["versions"]), MOST_PACKAGES)
        versions = dict(zip(names, _names(list(meta["versions"].values()), MOST_PACKAGES), strict=True))
        tensors = _part(message, "statistics")
        if bool(tensors) != (scale == FEDERATED):
            raise BadMessage(f"windows scaled '{scale}' with{'' if tensors else 'out'} statistics")
        statistics = scaling.from_tensors(tensors, channels, samples * time) if tensors else None
        shape = (channels, one, time)
        return Announcement(
            client, samples, tests, shape, classes, data, evaluated_on, scale, versions, statistics=statistics
        )

    def differs(self, other: Announcement) -> str:
        """Return why the two cannot be in one federation; '' where they can."""
        for name, what in COMMON.items():
            one, two = getattr(self, name), getattr(other, name)
            if one != two:
                return f"{what} {_short(one)}, but the federation has {_short(two)}"
        return ""


@dataclass(frozen=True)
class Request:
    """Asks a site to measure the state after the last round, to train, or to do both in this order.

    Attributes:
        run: the run's name; the site keeps its state under it.
        client: the client it is for.
        round: the round.
        state: round of this client's last reply that reached the server (0: none), whose state it goes on from.
        durable: last round on the server's disk; the site may delete all but the newest state up to it.
        train: the algorithm's message; None where the client is not to train.
        shared: what the server would give every client now (`Server.networks`); None where nothing is to be measured.
        after: the round after which it would give `shared`; 0 without it.
        scaling: statistics to scale windows by; None where they are scaled already. Each request has them, since a
            site keeps nothing but its windows between two requests.
    """

    run: str
    client: int
    round: Round
    state: int = 0
    durable: int = 0
    train: Message | None = None
    shared: Mapping[str, Tensor] | None = None
    scaling: Statistics | None = field(default=None, compare=False)
    after: int = 0

    def to_message(self) -> Message:
        """Return it as it is sent; a tensor that is both in the algorithm's message and in `shared` is sent once."""
        train = dict(self.train.tensors) if self.train else {}
        shared = self.shared or {}
        same = sorted(name for name, tensor in shared.items() if _equal(train.get(name), tensor))
        tensors = {f"train/{name}": tensor for name, tensor in train.items()}
        tensors |= {f"shared/{name}": tensor for name, tensor in shared.items() if name not in same}
        tensors |= _named("scaling", self.scaling)
        meta = {"protocol": PROTOCOL, "run": self.run, "client": self.client, "round": list(self.round)}
        meta |= {"state": self.state, "durable": self.durable, "train": self.train and dict(self.train.meta)}
        return Message(tensors, meta | {"measure": self.shared is not None, "after": self.after, "same": same})

    @staticmethod
    @checked("a request")
    def from_message(message: Message) -> Request:
        """Read what the server sent. Raises BadMessage unless every value is of its type and within its bounds."""
        meta = checked_meta(message)
        if not is_plain_name(meta["run"]):
            raise BadMessage(f"a run cannot be called {shown(repr(meta['run']))}")
        tensors, same = _part(message, "train"), meta["same"]
        train = None if meta["train"] is None else Message(tensors, dict(meta["train"]))
        shared = _part(message, "shared") | {name: tensors[name] for name in same} if meta["measure"] else None
        numbers = {name: whole(meta[name]) for name in ("client", "state", "durable", "after")}
        common = _part(message, "scaling")
        pooled = scaling.from_tensors(common, len(common["mean"])) if common else None
        round = _round(*meta["round"])
        return Request(meta["run"], **numbers, round=round, train=train, shared=shared, scaling=pooled)


@dataclass(frozen=True)
class ClientMetrics:
    """Holds one client's own metrics of one view.

    Attributes:
        row: `metrics.FIGURES`, float64: numbers between 0 and 1, except sample count and loss; NaN where undefined.
            Then the client's `metrics.Metrics.client_gaps`.
        confusion: (classes, classes), int64.
        nonfinite: samples with a NaN or infinite logit.
    """

    row: Tensor
    confusion: Tensor
    nonfinite: int

    @staticmethod
    def of(metrics: Metrics, client: int) -> ClientMetrics:
        """Take one client's metrics out of all clients'."""
        row = [float(getattr(metrics, f"client_{name}")[client]) for name in FIGURES]
        row += metrics.client_gaps[client].tolist()
        confusion = torch.from_numpy(metrics.confusion[client].copy())
        return ClientMetrics(torch.tensor(row, dtype=torch.float64), confusion, metrics.nonfinite)


@dataclass(frozen=True)
class Answer:
    """Answers a request.

    Attributes:
        client, round: number of the client, index of the round.
        reply: the algorithm's reply; None where the client did not train.
        loss: its mean training loss; NaN where it did not train.
        dropped: why there is no reply although one was asked for, or ''.
        metrics: view -> metrics; empty where nothing was measured.
    """

    client: int
    round: int
    reply: Message | None = None
    loss: float = float("nan")
    dropped: str = ""
    metrics: Mapping[str, ClientMetrics] = field(default_factory=dict)

    def to_message(self) -> Message:
        """Return it as it is sent."""
        tensors = {f"reply/{name}": tensor for name, tensor in (self.reply.tensors if self.reply else {}).items()}
        tensors["loss"] = torch.tensor(self.loss, dtype=torch.float64)
        for view, own in self.metrics.items():
            tensors |= {f"metrics/{view}": own.row, f"confusion/{view}": own.confusion}
        meta = {"protocol": PROTOCOL, "client": self.client, "round": self.round, "dropped": self.dropped}
        nonfinite = {view: own.nonfinite for view, own in self.metrics.items()}
        return Message(tensors, meta | {"reply": self.reply and dict(self.reply.meta), "nonfinite": nonfinite})

    def check_tests(self, announced: int) -> None:
        """Raise BadMessage unless the metrics are of as many test windows as the site announced."""
        for view, own in self.metrics.items():
            if float(own.row[0]) != announced:
                raise BadMessage(
                    f"metrics of '{view}' are of {float(own.row[0]):g} windows, but it announced {announced}"
                )

    @staticmethod
    @checked("an answer")
    def from_message(message: Message, client: int, round: int, classes: int) -> Answer:
        """Read a site's answer. Raises BadMessage: not of this client and round, or metrics that cannot be."""
        meta = checked_meta(message)
        if (meta.get("client"), meta.get("round")) != (client, round):
            raise BadMessage(f"an answer of client {shown(meta.get('client'))} in round {shown(meta.get('round'))}")
        rows, confusions = _part(message, "metrics"), _part(message, "confusion")
        metrics = {
            view: ClientMetrics(rows[view], confusions[view], whole(count)) for view, count in meta["nonfinite"].items()
        }
        reply = None if meta["reply"] is None else Message(_part(message, "reply"), dict(meta["reply"]))
        loss = float(message.tensors["loss"])
        if reply is not None and not math.isfinite(loss):
            raise BadMessage(f"a training loss of {loss}")
        answer = Answer(client, round, reply, loss, shown(meta["dropped"], LONGEST_TEXT), metrics)
        for view, own in metrics.items():
            _check(view, own, classes)
        return answer


def _names(values: Any, most: int) -> tuple[str, ...]:
    if not isinstance(values, list) or len(values) > most:
        raise ValueError(f"{shown(values)} are not at most {most} names")
    for value in values:
        if not isinstance(value, str) or not is_shown_as_it_is(value):
            raise ValueError(f"{shown(repr(value))} is not a name")
    return tuple(values)


def _check(view: str, metrics: ClientMetrics, classes: int) -> None:
    """Raise BadMessage for metrics that no measurement gives."""
    row, confusion = metrics.row, metrics.confusion
    if row.shape != (len(FIGURES) + BINS,) or confusion.shape != (classes, classes):
        raise BadMessage(f"metrics of '{view}' have shapes {tuple(row.shape)} and {tuple(confusion.shape)}")
    if row.dtype != torch.float64 or confusion.dtype != torch.int64:
        raise BadMessage(f"metrics of '{view}' are {row.dtype} and {confusion.dtype}")
    values = dict(zip(FIGURES, row.tolist()[: len(FIGURES)], strict=True))
    shares = [values[name] for name in SHARES]
    if any(share < 0 or share > 1 for share in shares) or values["loss"] < 0 or not values["samples"] >= 0:
        raise BadMessage(f"metrics of '{view}' are out of range: {values}")
    if ((confusion < 0) | (confusion > MOST_SAMPLES)).any() or values["samples"] > MOST_SAMPLES:
        raise BadMessage(f"metrics of '{view}' count fewer than no samples, or more than {MOST_SAMPLES}")
    if not row[len(FIGURES) :].abs().sum() <= values["samples"] * (1 + 1e-9):  # NaN is no number either
        raise BadMessage(f"metrics of '{view}': calibration is off by more than its samples")
    if confusion.sum() + metrics.nonfinite != values["samples"]:
        raise BadMessage(f"metrics of '{view}': the confusion matrix does not add up to the samples")


def checked_meta(message: Message) -> Mapping[str, Any]:
    """Return the metadata of a message of this protocol. Raises BadMessage: it is of another."""
    if message.meta.get("protocol") != PROTOCOL:
        raise BadMessage(f"speaks protocol {shown(message.meta.get('protocol'))}, this version {PROTOCOL}")
    return message.meta


def _equal(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and one.dtype == other.dtype and torch.equal(one, other)


def _named(part: str, statistics: Statistics | None) -> dict[str, Tensor]:
    """Return statistics as the tensors of one part of a message; none for None."""
    own = {} if statistics is None else scaling.to_message(statistics).tensors
    return {f"{part}/{name}": tensor for name, tensor in own.items()}


def _part(message: Message, part: str) -> dict[str, Tensor]:
    """Return the tensors of one part of a message, by their names in it."""
    return {n.removeprefix(f"{part}/"): tensor for n, tensor in message.tensors.items() if n.startswith(f"{part}/")}


def whole(value: Any, low: int = 0, high: int = MOST_SAMPLES) -> int:
    """Return a whole number. Raises ValueError for anything else, and beyond its bounds."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{shown(repr(value))} is not a whole number from {low} to {high}")
    return value


def _round(index: Any, total: Any, share: Any) -> Round:
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise ValueError(f"{share!r} is not a share of the clients")
    return Round(whole(index), whole(total), share)


def _short(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
