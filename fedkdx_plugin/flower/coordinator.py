"""The server's side: the engine's round loop, with sites that do the work.

One message a site and round. The request of round t + 1 asks for two things: first to measure the state after round t,
then, of the selected, to train. So a round's figures arrive with the next round's replies, a last request after the
last round asks for measuring alone, and the numbers are those of one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dataset_utils.scaling import Statistics
from fedkdx_plugin.configuration.choice import choose
from fedkdx_plugin.engine import metrics, scaling
from fedkdx_plugin.engine.backends.base import Backend, Trained
from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.evaluation import Prediction, views
from fedkdx_plugin.engine.metrics import Metrics
from fedkdx_plugin.engine.participation import Participation
from fedkdx_plugin.engine.rounds import Federation, Observer, RoundRecord, Schedule
from fedkdx_plugin.engine.training import Settings
from fedkdx_plugin.engine.workspace import Workspace
from fedkdx_plugin.experiments.experiment import Experiment
from fedkdx_plugin.experiments.setting import schedule
from fedkdx_plugin.flower.protocol import Answer, Figures, Request
from fedkdx_plugin.flower.roster import Event, Link, Roster
from registry.errors import UserError
from registry.interface import BadMessage, Message, NonFinite, Round, Server, Task


class Silent(NonFinite):
    """A client that gave no answer, or none that counts; the text says why. Its round passes without it."""


def elsewhere(roster: Roster) -> DeviceData:
    """The data of a federation whose windows lie at the sites: sizes alone."""
    sizes = [roster.known[id].samples if id in roster.known else 0 for id in range(roster.clients)]
    known = {id: roster.known[id].statistics for id in roster.present(0)}
    nothing = torch.empty(0, *roster.about.shape)
    return DeviceData(
        train_x=[nothing] * roster.clients,
        train_y=[_size(size) for size in sizes],
        test_x=nothing,
        test_y=torch.empty(0, dtype=torch.int64),
        test_client=torch.empty(0, dtype=torch.int64),
        test_slices=[slice(0)] * roster.clients,
        evaluated_on=roster.about.evaluated_on,
        statistics=[known.get(id) for id in range(roster.clients)] if roster.about.statistics else None,
    )


def _size(samples: int) -> Tensor:
    """Labels of which only the number is known."""
    return torch.empty(samples, dtype=torch.int64, device="meta")


class Remote(Backend):
    """Lets the sites work.

    Args:
        link: the way to them.
        roster: who is there.
        run: the run's name at the sites.
        deadline: seconds for a round.

    Attributes:
        states: client -> round of its last answer with a reply, which means that it kept its state after that round.
        silent: client -> why it gave no answer when it was last asked to train.
        durable: last round on disk.
        measured: view -> figures of the state asked for last.
        scaling: what the sites scale their windows by, where that is still to be done.
    """

    name = "flower"

    def __init__(
        self,
        workspace: Workspace,
        data: DeviceData,
        settings: Settings,
        link: Link,
        roster: Roster,
        run: str,
        deadline: float,
    ) -> None:
        super().__init__(workspace, data, settings)
        self.link, self.roster, self.run, self.deadline = link, roster, run, deadline
        self.classes = roster.about.classes
        self.states: dict[int, int] = {}
        self.silent: dict[int, str] = {}
        self.durable = 0
        self.measured: dict[str, Metrics] = {}
        self.scaling: Statistics | None = None
        self._shared: Mapping[str, Tensor] | None = None

    def evaluator(self) -> Callable[[Mapping[str, Tensor]], dict[str, Metrics]]:
        """Measures with the next request: what comes back at once is empty."""

        def later(shared: Mapping[str, Tensor]) -> dict[str, Metrics]:
            self._shared = dict(shared)
            return {}

        return later

    def train(self, messages: Mapping[int, Message], round: Round) -> dict[int, Trained | NonFinite]:
        return self.ask(messages, round)

    def predict(self, net: str, predictions: Sequence[Prediction]) -> list[Tensor]:
        raise UserError("windows lie at the sites, which alone can predict them")

    def ask(self, messages: Mapping[int, Message], round: Round) -> dict[int, Trained | NonFinite]:
        """One request to each client that is to train or to be measured; the results of those that were to train."""
        shared, self._shared = self._shared, None
        there = set(self.roster.present(round.index))
        requests = {}
        for id in sorted(there & (there if shared is not None else set(messages))):
            state = self.states.get(id, 0)
            request = Request(self.run, id, round, state, self.durable, messages.get(id), shared, self.scaling)
            requests[id] = request.to_message().to_bytes()
        answers = self._exchange(requests, round)
        if shared is not None:
            self.measured = self._combine({id: a.figures for id, a in answers.items() if isinstance(a, Answer)}, shared)
        trained = {id for id in messages if isinstance(answers.get(id), Answer) and answers[id].reply is not None}
        self.states.update(dict.fromkeys(sorted(trained), round.index))
        missing = {id: answers.get(id, "not there") for id in messages}
        self.silent = {id: answer for id, answer in missing.items() if isinstance(answer, str)}
        return {id: _result(id, answer) for id, answer in missing.items()}

    def _exchange(self, requests: Mapping[int, bytes], round: Round) -> dict[int, Answer | str]:
        """Client -> its answer, or why there is none; all of it told."""
        began = time.monotonic()
        arrived = self.link.exchange(requests, self.deadline) if requests else {}
        answers: dict[int, Answer | str] = {}
        for id, data in sorted(requests.items()):
            answer, up = arrived.get(id, "no answer"), 0
            if not isinstance(answer, str):
                up = len(answer)
                answer = self._read(id, answer, round)
            refused = answer if isinstance(answer, str) else answer.dropped
            kind = "silent" if isinstance(answer, str) else "refused" if refused else "answered"
            seconds = time.monotonic() - began
            self.roster.tell(Event(round.index, id, kind, refused, len(data), up, seconds))
            answers[id] = answer
        return answers

    def _read(self, id: int, data: bytes, round: Round) -> Answer | str:
        try:
            return Answer.from_message(Message.from_bytes(data), id, round.index, len(self.classes))
        except BadMessage as error:
            return f"no answer of ours: {error}"

    def _combine(
        self, figures: Mapping[int, Mapping[str, Figures]], shared: Mapping[str, Tensor]
    ) -> dict[str, Metrics]:
        """Everybody's figures as `metrics.evaluate` gives them; who did not answer counts as without test windows."""
        clients, classes = self.data.clients, len(self.classes)
        result = {}
        for view in views(self.workspace, shared, self.data):
            table = np.full((len(metrics.FIGURES), clients), np.nan)
            table[0] = 0
            confusion = np.zeros((clients, classes, classes), dtype=np.int64)
            having = {id: own[view] for id, own in figures.items() if view in own}
            for id, own in having.items():
                table[:, id], confusion[id] = own.row.numpy(), own.confusion.numpy()
            result[view] = metrics.summary(table, confusion, sum(own.nonfinite for own in having.values()))
        return result


def _result(id: int, answer: Answer | str) -> Trained | NonFinite:
    if isinstance(answer, str):
        return Silent(answer)
    if answer.reply is None:
        return Silent(answer.dropped or f"client {id}: did not train")
    return Trained(answer.reply, torch.tensor(answer.loss))


def check_algorithm(algorithm: type[Server], participation: Participation) -> None:
    """Raises UserError for an algorithm or a setting that sites cannot have."""
    if algorithm.pools_data:
        raise UserError(f"{algorithm.__name__} pools everybody's data, which never leave a site; it cannot run here")
    if participation.unseen:
        raise UserError("--unseen: every site that joins takes part; leave it out with --engine flower")


def check_sites(experiment: Experiment) -> None:
    """Raise UserError for algorithms or settings that sites cannot have."""
    for planned in experiment.runs:
        config = planned.config
        if config.vary == "data":  # each seed is to have data of its own
            raise UserError("--vary data: the data of sites stay as they are; leave it out with Flower")
        for choice in choose(config):
            check_algorithm(choice.server, schedule(config).participation)


class Coordinator(Federation):
    """A federation whose clients are sites.

    Args:
        algorithm, task, params, settings, schedule: as of `Federation`.
        link: the way to the sites.
        roster: who is there.
        run: the run's name at the sites.
        deadline: seconds for a round; who has not answered by then is left out of it.

    Raises:
        UserError: an algorithm or a setting that sites cannot have.
    """

    def __init__(
        self,
        algorithm: type[Server],
        task: Task,
        params: Any,
        settings: Settings,
        schedule: Schedule,
        link: Link,
        roster: Roster,
        run: str,
        deadline: float,
    ) -> None:
        check_algorithm(algorithm, schedule.participation)
        self.roster = roster
        self._snapshot: Message | None = None

        def remote(workspace: Workspace, data: DeviceData, settings: Settings) -> Remote:
            return Remote(workspace, data, settings, link, roster, run, deadline)

        super().__init__(algorithm, task, params, elsewhere(roster), settings, schedule, remote)
        self._scale_by(self.agreed)

    def run(self, observers: Sequence[Observer] = (), done: int = 0) -> None:
        """As `Federation.run`; each record is complete, and seen, once the next round has brought its figures.

        The first observer must put state and records on disk before it returns: sites forget by what it was shown.
        """
        last: RoundRecord | None = None
        self.backend.durable = done
        for index in range(done + 1, self.schedule.rounds + 1):
            round = Round(index, self.schedule.rounds, self.schedule.join_ratio)
            self._meet(round)
            for observer in observers:
                observer.on_round_start(round)
            record = self.round(round)
            self._finish(last, observers)
            self._snapshot, last = self._state(), record
        if last:
            self._meet(round)
            self.backend.ask({}, round)
            self._finish(last, observers)

    def round(self, round: Round) -> RoundRecord:
        """As `Federation.round`; who gave no answer is lost, not rejected."""
        record, silent = super().round(round), self.backend.silent
        rejected = {id: reason for id, reason in record.rejected.items() if id not in silent}
        return replace(record, rejected=rejected, lost=dict(sorted((record.lost | silent).items())))

    def reachable(self, round: Round) -> list[int]:
        there = self.roster.present(round.index)
        return [id for id in super().reachable(round) if id in there]

    def save(self) -> Message:
        """What the server holds after the last round that was seen; the clients' own state is theirs."""
        return self._snapshot or self._state()

    def restore(self, saved: Message) -> None:
        """Become the coordinator that `save` described.

        Raises:
            KeyError or ValueError: `saved` is of another algorithm.
        """
        self.backend.states = {int(id): round for id, round in saved.meta["states"].items()}
        own = {name: tensor for name, tensor in saved.tensors.items() if name.startswith("server/")}
        tensors = {name.removeprefix("server/"): tensor for name, tensor in own.items()}
        self.server.restore(Message(tensors, saved.meta["server"]))
        common = {n.removeprefix("scaling/"): tensor for n, tensor in saved.tensors.items() if n.startswith("scaling/")}
        if common:
            pooled = scaling.from_tensors(common, len(common["mean"]))
            self._scale_by(scaling.Agreement(pooled, *saved.meta["agreed"]))

    def _scale_by(self, agreed: scaling.Agreement | None) -> None:
        """Let the sites scale by this; once agreed on, it stays, whoever comes and goes."""
        self.agreed = agreed
        self.backend.scaling = agreed and agreed.pooled

    def _state(self) -> Message:
        server = self.server.save()
        tensors = {f"server/{name}": tensor for name, tensor in server.tensors.items()}
        states = {str(id): round for id, round in sorted(self.backend.states.items())}
        meta = {"server": dict(server.meta), "states": states}
        if self.agreed:
            common = scaling.to_message(self.agreed.pooled).tensors
            tensors |= {f"scaling/{name}": tensor for name, tensor in common.items()}
            meta["agreed"] = [self.agreed.round, self.agreed.up, self.agreed.down]
        return Message(tensors, meta)

    def _meet(self, round: Round) -> None:
        """Wait until enough sites are there, and note how much data they have."""
        for id in self.roster.wait(round.index):
            self.data.train_y[id] = _size(self.roster.known[id].samples)

    def _finish(self, record: RoundRecord | None, observers: Sequence[Observer]) -> None:
        """Give a round its figures and show it."""
        if record:
            due = record.round % self.schedule.eval_gap == 0 or record.round == self.schedule.rounds
            record = replace(record, metrics=self.backend.measured if due else {})
            for observer in observers:
                observer.on_round_end(record)
            self.backend.durable = record.round
