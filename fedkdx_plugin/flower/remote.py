"""The backend of a federation between sites: one request to each site and round."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from dataset_utils.scaling import Statistics
from fedkdx_plugin.engine import metrics, turns
from fedkdx_plugin.engine.backends.base import Backend, Trained
from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.evaluation import Prediction, views
from fedkdx_plugin.engine.metrics import Metrics
from fedkdx_plugin.engine.training import Settings
from fedkdx_plugin.engine.workspace import Workspace
from fedkdx_plugin.flower.protocol import Answer, ClientMetrics, Request
from fedkdx_plugin.flower.roster import Event, Link, Roster
from fedkdx_plugin.flower.secure import Step, StepAnswer
from registry.aggregation import of_client
from registry.errors import UserError
from registry.interface import BadMessage, Message, NonFinite, Round

A = TypeVar("A", Answer, StepAnswer)


class Silent(NonFinite):
    """A client gave no answer, or none that counts; the text says why. Its round goes on without it."""


class RemoteBackend(Backend):
    """Lets sites do the clients' work: one request to each site and round.

    It differs from the backends of one process in when results come, and in where state lies:

    - `train` asks the clients given, as every backend does. A client without an answer that counts has the result
      `Silent`, and until the next request its reason is in `silent`.
    - `evaluator` gives a function that measures nothing yet: it keeps the state to be measured and returns {}. The next
      request, of `train` or `measure`, goes to every site that is there, which measures that state before it trains;
      then `measured` has the metrics. After the last round `measure` asks for them alone.
    - `predict` raises UserError: the windows lie at the sites.
    - Clients keep their state at their sites, a copy for each round in which they trained. A request names the round
      whose state a client goes on from (`states`), and the last round on the server's disk (`durable`), before which a
      site needs no copy. Whoever runs the rounds sets `durable` after a round is on disk, and after a restart sets
      `states` to what it was in that round.
    - The sites scale their windows by `scaling`, which every request brings.

    Args:
        workspace, data, settings: as of `Backend`; the data hold sizes alone (see `remote_data`).
        link: carries messages to the sites.
        roster: knows which sites are there.
        run: the run's name at the sites.
        deadline: seconds that a site has to answer.

    Attributes:
        states: client -> round of its last answer with a reply; it kept its state after that round.
        silent: client -> why it gave no answer when it was last asked to train.
        durable: last round on the server's disk.
        measured: view -> metrics of the state that was measured last.
        scaling: statistics to scale windows by; None where they are scaled already.
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
        self._round = 0  # the last one under way, after which `_shared` is the server's state

    def evaluator(self) -> Callable[[Mapping[str, Tensor]], dict[str, Metrics]]:
        """Return what keeps a state for the next request to measure, and returns {}."""

        def later(shared: Mapping[str, Tensor]) -> dict[str, Metrics]:
            self._shared = dict(shared)
            return {}

        return later

    def train(self, messages: Mapping[int, Message], round: Round) -> dict[int, Trained | NonFinite]:
        """Ask clients to train, and every site to measure the state that waits for it; return the clients' results."""
        return turns.run(self.turns(messages, round), lambda requests: self._exchange(requests, round, self._read))

    def turns(
        self, messages: Mapping[int, Message], round: Round
    ) -> Generator[dict[int, bytes], Mapping[int, Answer | str], dict[int, Trained | NonFinite]]:
        """Do as `train`; the requests that it yields are carried elsewhere, and `heard` reads what came back."""
        shared, self._shared = self._shared, None
        after, self._round = self._round, round.index
        there = set(self.roster.present(round.index))
        requests = {}
        for id in sorted(there & (there if shared is not None else set(messages))):
            state = self.states.get(id, 0)
            own = None if shared is None else of_client(shared, id)
            request = Request(self.run, id, round, state, self.durable, messages.get(id), own, self.scaling)
            request = request if shared is None else replace(request, after=after)
            requests[id] = request.to_message().to_bytes()
        answers = yield requests
        given = {id: answer for id, answer in answers.items() if isinstance(answer, Answer)}
        if shared is not None:
            self.measured = self._combine({id: answer.metrics for id, answer in given.items()}, shared)
        trained = (id for id in sorted(messages) if id in given and given[id].reply is not None)
        self.states.update(dict.fromkeys(trained, round.index))
        results = {id: answers.get(id, "not there") for id in messages}
        self.silent = {id: answer for id, answer in results.items() if isinstance(answer, str)}
        return {id: _result(id, answer) for id, answer in results.items()}

    def measure(self, round: Round) -> None:
        """Ask every site to measure the state that waits for it; `measured` then has the metrics."""
        self.train({}, round)

    def predict(self, net: str, predictions: Sequence[Prediction]) -> list[Tensor]:
        """Raise UserError."""
        raise UserError("predictions: the windows lie at the sites, which alone can predict them")

    def take_step(self, steps: Mapping[int, Step], round: Round) -> dict[int, StepAnswer | str]:
        """Ask sites to take a step of secure aggregation; return the answer of each, or why there is none."""

        def read(id: int, data: bytes, round: Round) -> StepAnswer | str:
            try:
                return StepAnswer.from_message(Message.from_bytes(data), steps[id])
            except BadMessage as error:
                return f"no answer of ours: {error}"

        return self._exchange({id: step.to_message().to_bytes() for id, step in steps.items()}, round, read)

    def _exchange(
        self, requests: Mapping[int, bytes], round: Round, read: Callable[[int, bytes, Round], A | str]
    ) -> dict[int, A | str]:
        """Carry requests, and return what `_told` does."""
        began = time.monotonic()
        arrived = self.link.exchange(requests, self.deadline) if requests else {}
        return self._told(requests, arrived, round, time.monotonic() - began, read)

    def heard(
        self, requests: Mapping[int, bytes], arrived: Mapping[int, bytes | str], round: Round, seconds: float
    ) -> dict[int, Answer | str]:
        """Return client -> its answer, or why there is none, of all that were asked; the roster is told of each."""
        return self._told(requests, arrived, round, seconds, self._read)

    def _told(
        self,
        requests: Mapping[int, bytes],
        arrived: Mapping[int, bytes | str],
        round: Round,
        seconds: float,
        read: Callable[[int, bytes, Round], A | str],
    ) -> dict[int, A | str]:
        """Do as `heard`, with any kind of answer.

        Args:
            read: reads an answer's bytes, of a client in a round, or says why it is none.
        """
        answers: dict[int, A | str] = {}
        for id, sent in sorted(requests.items()):
            got = arrived.get(id, "no answer")
            answer = got if isinstance(got, str) else read(id, got, round)
            refused = answer if isinstance(answer, str) else answer.dropped
            kind = "silent" if isinstance(answer, str) else "refused" if refused else "answered"
            up = 0 if isinstance(got, str) else len(got)
            self.roster.tell(Event(round.index, id, kind, refused, len(sent), up, seconds))
            answers[id] = answer
        return answers

    def _read(self, id: int, data: bytes, round: Round) -> Answer | str:
        try:
            answer = Answer.from_message(Message.from_bytes(data), id, round.index, len(self.classes))
            answer.check_tests(self.roster.known[id].tests)
            return answer
        except BadMessage as error:
            return f"no answer of ours: {error}"

    def _combine(
        self, own: Mapping[int, Mapping[str, ClientMetrics]], shared: Mapping[str, Tensor]
    ) -> dict[str, Metrics]:
        """Return all clients' metrics as `metrics.evaluate` does; without an answer, a client has no test windows."""
        clients, classes = self.data.clients, len(self.classes)
        result = {}
        for view in views(self.workspace, shared, self.data):
            table = np.full((len(metrics.FIGURES) + metrics.BINS, clients), np.nan)
            table[0] = 0
            confusion = np.zeros((clients, classes, classes), dtype=np.int64)
            having = {id: found[view] for id, found in own.items() if view in found}
            for id, found in having.items():
                table[:, id], confusion[id] = found.row.numpy(), found.confusion.numpy()
            result[view] = metrics.summary(table, confusion, sum(found.nonfinite for found in having.values()))
        return result


def _result(id: int, answer: Answer | str) -> Trained | NonFinite:
    if isinstance(answer, str):
        return Silent(answer)
    if answer.reply is None:
        return Silent(answer.dropped or f"client {id}: did not train")
    return Trained(answer.reply, torch.tensor(answer.loss))


def remote_data(roster: Roster) -> DeviceData:
    """Return the data of a federation whose windows lie at the sites: sizes and statistics alone."""
    sizes = [roster.known[id].samples if id in roster.known else 0 for id in range(roster.clients)]
    known = {id: roster.known[id].statistics for id in roster.present(0)}
    nothing = torch.empty(0, *roster.about.shape)
    return DeviceData(
        train_x=[nothing] * roster.clients,
        train_y=[sized(size) for size in sizes],
        test_x=nothing,
        test_y=torch.empty(0, dtype=torch.int64),
        test_client=torch.empty(0, dtype=torch.int64),
        test_slices=[slice(0)] * roster.clients,
        evaluated_on=roster.about.evaluated_on,
        statistics=[known.get(id) for id in range(roster.clients)] if roster.about.statistics else None,
    )


def sized(samples: int) -> Tensor:
    """Return labels of which only the number is known."""
    return torch.empty(samples, dtype=torch.int64, device="meta")
