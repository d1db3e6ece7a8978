"""A Flower Strategy that runs one of the algorithms: the engine's rounds, whose messages Flower carries."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, MessageType, MetricRecord
from flwr.app import Message as Envelope
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from flwr.serverapp.strategy import Strategy as FlowerStrategy
from torch import nn

from dataset_utils.shards import UNKNOWN
from fedkdx_plugin.engine import turns
from fedkdx_plugin.engine.backends.base import Trained
from fedkdx_plugin.engine.evaluation import SERVED, predictors
from fedkdx_plugin.engine.metrics import Metrics
from fedkdx_plugin.engine.record import RoundRecord
from fedkdx_plugin.experiments.setting import schedule
from fedkdx_plugin.flower.apps.models import Adapted, Given, as_shape
from fedkdx_plugin.flower.apps.nodes import LOG, AppLink, AppRoster
from fedkdx_plugin.flower.apps.plan import Plan, check_options
from fedkdx_plugin.flower.apps.state import arrays as to_arrays
from fedkdx_plugin.flower.apps.windows import NAME
from fedkdx_plugin.flower.coordinator import Coordinator
from fedkdx_plugin.flower.link import content_of
from fedkdx_plugin.flower.protocol import MOST_CLIENTS, Announcement, Answer
from registry import __version__, contract
from registry.errors import UserError
from registry.interface import NonFinite, Round, Server, copy_state, float_state

RUN = "app"  # name of the run at the clients, which know no other
CONFIG = "config"  # record of the user's own values in a message
MOST_ROUNDS = 10**6
AVERAGED = ("accuracy", "f1", "loss")

Asking = Generator[dict[int, bytes], Mapping[int, Answer | str], Mapping[int, Trained | NonFinite]]


class Strategy(FlowerStrategy):
    """An algorithm as a strategy, for a ClientApp made by `client_app` of the same algorithm.

    Each node is the client whose number its configuration gives as 'partition-id'.

    Args:
        algorithm: name of an algorithm (see `fedkdx list`), or a `Server` class.
        model: a function or class that, called without arguments, returns a network from windows (n, *shape) to logits
            (n, classes); or a name, or a `Model` class, of this project. Every client makes its own.
        shape: shape of one window, as the network takes it, such as (6, 128).
        classes: number of classes.
        student: makes the model to be shared, where the algorithm has two; by default as `model`.
        fraction_train: share of the connected clients that is selected in a round.
        min_available_nodes: clients that must be there before a round.
        clients: how many clients there are at most; their numbers are below.
        set: hyper-parameters of the algorithm, by name.
        seed: seed of initial weights, batches and the selection of clients.
        **options: options of training and of averaging by their long names, such as `local_epochs=2` or
            `aggregate="median"` (see `plan.CLIENTS`, `plan.SERVERS`).

    Attributes:
        records: a record of each round so far: who was selected, refused and lost, bytes.
        measured: view -> all clients' metrics when they were measured last; 'served' is the model a client would use.

    Raises:
        UserError: wrong input, or models that the algorithm cannot use; all is tried with made-up windows.
    """

    def __init__(
        self,
        algorithm: str | type[Server],
        model: Given,
        shape: Sequence[int],
        classes: int,
        *,
        student: Given | None = None,
        fraction_train: float = 1.0,
        min_available_nodes: int = 2,
        clients: int = 100,
        set: Mapping[str, Any] | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        check_options(options)
        _check_counts(fraction_train, clients, min_available_nodes)
        own = options | {"set": dict(set or {}), "seed": seed}
        self.plan = Plan.of(algorithm, model, student, shape, classes, own)
        self.plan.try_out()
        self.fraction_train, self.min_available_nodes, self.clients = fraction_train, min_available_nodes, clients
        self.workspace = self.plan.workspace()
        self.records: list[RoundRecord] = []
        self._coordinator: Coordinator | None = None
        self._round: Generator[Any, Mapping[int, Trained | NonFinite], RoundRecord] | None = None
        self._asking: Asking | None = None
        self._asked: dict[int, bytes] = {}

    @property
    def measured(self) -> Mapping[str, Metrics]:
        """Return view -> all clients' metrics when they were measured last."""
        return self._coordinator.remote.measured if self._coordinator else {}

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run all rounds, as any Flower strategy does; `timeout` is also how long enough clients are waited for.

        Args:
            initial_arrays: must be left out: initial weights come from `model` and `seed`, as every client's do.

        Raises:
            UserError: wrong input, or too few clients.
        """
        if initial_arrays is not None:
            raise UserError("initial_arrays: leave it out; where weights are trained already, let `model` load them")
        self.begin(grid, num_rounds, timeout)
        start = super().start
        return start(grid, self.arrays(), num_rounds, timeout, train_config, evaluate_config, evaluate_fn)

    def begin(self, grid: Grid, num_rounds: int, timeout: float = 3600) -> None:
        """Make ready for so many rounds from the initial weights; `start` does it. Raises UserError."""
        if isinstance(num_rounds, bool) or not isinstance(num_rounds, int) or not 1 <= num_rounds <= MOST_ROUNDS:
            raise UserError(f"num_rounds={num_rounds!r}: write a whole number from 1 on")
        plan = self.plan
        self.records = []
        self._link = AppLink(grid, plan.to_text(self.workspace))
        expected = Announcement(
            client=0,
            samples=1,
            tests=0,
            shape=as_shape(plan.own),
            classes=tuple(str(number) for number in range(plan.classes)),
            data=NAME,
            evaluated_on="test",
            scale=UNKNOWN,
            versions={"fedkdx": __version__},
        )
        roster = AppRoster(expected, self._link, self.clients, self.min_available_nodes, timeout)
        config = replace(plan.config, join_ratio=self.fraction_train, global_rounds=num_rounds)
        about = plan.choice.server, plan.task(), plan.choice.params, plan.settings(), schedule(config)
        self._coordinator = Coordinator(*about, self._link, roster, RUN, timeout)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Envelope]:
        """Return the messages to the clients of a round. Raises UserError: too few clients are there."""
        coordinator = self._begun()
        round = self._number(server_round)
        coordinator.meet(round)
        self._round = coordinator.turns(round)
        return self._messages(coordinator.remote.turns(next(self._round), round), MessageType.TRAIN, config)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Envelope]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check and aggregate the replies; return the shared state, and what the round gave.

        A client whose reply does not hold what it should is refused by name (`records`, and a warning), and the round
        goes on without it.
        """
        results = self._end(replies, self._number(server_round))
        if self._round is None:
            raise UserError("aggregate_train: call configure_train of this round first")
        record, self._round = turns.end(self._round, results), None
        self.records.append(record)
        for reason in record.rejected.values():  # each names its client
            LOG.warning("round %s: refused: %s", record.round, reason)
        counted = len(record.selected) - len(record.rejected) - len(record.lost)
        values: dict[str, int | float] = {
            "clients": counted,
            "bytes-down": record.bytes_down,
            "bytes-up": record.bytes_up,
        }
        if not math.isnan(record.train_loss):
            values["train-loss"] = record.train_loss
        return self.arrays(), MetricRecord({**values, **record.server})

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Envelope]:
        """Return the messages that ask all clients to measure; none in a round that `eval_gap` leaves out."""
        coordinator, round = self._begun(), self._number(server_round)
        every = coordinator.schedule.eval_gap
        if round.index % every and round.index != round.total:
            self._asking = None
            return []
        return self._messages(coordinator.remote.turns({}, round), MessageType.EVALUATE, config)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Envelope]) -> MetricRecord | None:
        """Return accuracy, F1 and loss of the clients' models, means weighted by test windows; None if none came."""
        coordinator = self._begun()
        if self._asking is None:
            return None
        self._end(replies, self._number(server_round))
        served = coordinator.remote.measured[SERVED]
        windows = served.client_samples
        if not windows.sum():
            return None
        having = windows > 0
        means = {
            name: float(np.average(getattr(served, f"client_{name}")[having], weights=windows[having]))
            for name in AVERAGED
        }
        return MetricRecord({"num-examples": int(windows.sum()), "clients": int(having.sum()), **means})

    def summary(self) -> None:
        """Log the algorithm and its options."""
        plan = self.plan
        LOG.info("\t├── %s: %s", plan.choice.name, plan.choice.params)
        LOG.info("\t├── fraction_train %s, from %s clients on", self.fraction_train, self.min_available_nodes)
        LOG.info("\t└── %s", plan.settings())

    def arrays(self) -> ArrayRecord:
        """Return the shared state as arrays, by the full names of the algorithm's networks (`model.head.weight`)."""
        coordinator = self._begun()
        return to_arrays(coordinator.server.networks())

    def model(self, arrays: ArrayRecord) -> nn.Module:
        """Return the network that all clients share, with the weights of `arrays`: the user's own, or a `Model`.

        Raises:
            UserError: the clients share no whole network.
        """
        state, plan = arrays.to_torch_state_dict(), self.plan
        made = contract.built(plan.choice.server.Client, replace(plan.task(), params=plan.choice.params))
        for name in predictors(self.workspace):
            own = float_state({name: made[name]}).keys()
            if own <= state.keys():
                copy_state(made, {full: state[full] for full in own})
                network = made[name]
                return network.original() if isinstance(network, Adapted) else network
        raise UserError(f"{self.plan.choice.name} shares no whole network; what is missing stays with the clients")

    def _begun(self) -> Coordinator:
        if self._coordinator is None:
            raise UserError("call strategy.start(grid=grid, num_rounds=...), or begin(grid, num_rounds), first")
        return self._coordinator

    def _number(self, server_round: int) -> Round:
        schedule = self._begun().schedule
        if not 1 <= server_round <= schedule.rounds:
            raise UserError(f"server_round={server_round}: this run has rounds 1 to {schedule.rounds}")
        return Round(server_round, schedule.rounds, schedule.join_ratio)

    def _messages(self, asking: Asking, kind: str, config: ConfigRecord) -> list[Envelope]:
        """Return requests as Flower's messages, and keep in mind what was asked."""
        self._asking, self._asked = asking, next(asking)
        messages = []
        for id, data in self._asked.items():
            content = self._link.content(data)
            content[CONFIG] = config
            messages.append(Envelope(content, dst_node_id=self._link.node_of(id), message_type=kind))
        return messages

    def _end(self, replies: Iterable[Envelope], round: Round) -> Mapping[int, Trained | NonFinite]:
        """Return what the engine makes of the replies, each by the node that it came from."""
        if self._asking is None:
            raise UserError("no replies are waited for: call the strategy's configure method of this round first")
        client_of = {self._link.node_of(id): id for id in self._asked}
        arrived: dict[int, bytes | str] = {}
        for reply in replies:
            id = client_of.get(reply.metadata.src_node_id)
            if id is None or id in arrived:
                LOG.warning("round %s: a reply of node %s that was not asked", round.index, reply.metadata.src_node_id)
            else:
                arrived[id] = content_of(reply)
        asking, self._asking = self._asking, None
        return turns.end(asking, self._begun().remote.heard(self._asked, arrived, round, 0.0))


def _check_counts(fraction: Any, clients: Any, least: Any) -> None:
    """Raise UserError for a share, or for numbers of clients, that cannot be."""
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        raise UserError(f"fraction_train={fraction!r}: write a number above 0, and 1 at most")
    for name, value, most in (("clients", clients, MOST_CLIENTS), ("min_available_nodes", least, clients)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
            raise UserError(f"{name}={value!r}: write a whole number from 1 to {most}")
