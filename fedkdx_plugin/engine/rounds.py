"""The federation: the round loop that every algorithm, data set and backend runs in."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from fedkdx_plugin.engine import dp_sgd, scaling, secure_sums, turns
from fedkdx_plugin.engine.attacks import Attackers
from fedkdx_plugin.engine.backends import selection
from fedkdx_plugin.engine.backends.base import Backend, Trained
from fedkdx_plugin.engine.budget import Budget
from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.evaluation import views
from fedkdx_plugin.engine.faults import DROPOUT, STRAGGLER, Faults
from fedkdx_plugin.engine.outliers import Outliers
from fedkdx_plugin.engine.participation import ATTACKERS, UNSEEN
from fedkdx_plugin.engine.protection import SCALED, fewest, noised, protection, sampling_of, shares_missing
from fedkdx_plugin.engine.randomness import count_selected, draw_clients, sample_clients
from fedkdx_plugin.engine.record import Observer, RoundRecord
from fedkdx_plugin.engine.schedule import Schedule
from fedkdx_plugin.engine.training import Settings
from fedkdx_plugin.engine.transport import Transport
from fedkdx_plugin.engine.workspace import Workspace, restore
from fedkdx_plugin.privacy.accounting import POISSON
from fedkdx_plugin.privacy.example import SCALED as SCALED_WINDOWS
from fedkdx_plugin.privacy.noise import Noise, SeededNoise
from fedkdx_plugin.privacy.options import EXAMPLE
from registry import contract
from registry.errors import UserError
from registry.interface import BadMessage, Message, NonFinite, Round, Server, Task
from registry.tensors import first_nonfinite
from registry.text import shown

LONGEST_REASON = 200  # characters

MakeBackend = Callable[[Workspace, DeviceData, Settings], Backend]


class Federation:
    """One algorithm on one data set.

    Args:
        algorithm: the server class.
        task, params: see `registry.interface`.
        data: the shards on the device.
        settings: local training.
        schedule: rounds.
        backend: a name of `selection.NAMES`, of which 'auto' chooses by device and algorithm; or a function that makes
            a backend.
        client_memory: memory that holds client state between rounds, 'device' or 'host', for a backend given by name.

    Attributes:
        groups: 'unseen', 'late', 'rare' or 'attackers' -> ids of these clients (see `Participation`, `Attack`).
        agreed: the statistics by which all windows are scaled; None if the shards are scaled already.
        protection: client-level differential privacy; None without.
        budget: example-level differential privacy; None without.

    Raises:
        UserError: the backend cannot run this algorithm, model or device; or the algorithm does not average clients,
            and the task asks for another mean than the usual one, or for privacy; or it does not go with secure
            aggregation.
    """

    refusals: ClassVar[tuple[type[Exception], ...]] = (NonFinite, BadMessage)  # raised of a reply, they refuse it
    min_updates = 1  # replies without which a round does not count

    def __init__(
        self,
        algorithm: type[Server],
        task: Task,
        params: Any,
        data: DeviceData,
        settings: Settings,
        schedule: Schedule,
        backend: str | MakeBackend = "auto",
        client_memory: str = "device",
    ) -> None:
        settings.faults.check()
        settings.attack.check()
        task.averaging.check({algorithm.__name__: algorithm.averages})
        if schedule.secure:
            secure_sums.check({algorithm.__name__: algorithm}, task.averaging, schedule.outliers)
        self.everyone = algorithm.trains_everyone(params)
        if algorithm.pools_data or self.everyone:  # there is no network in which faults could happen
            settings = replace(settings, faults=Faults())
        self.settings, self.schedule, self.pools_data = settings, schedule, algorithm.pools_data
        self.groups = schedule.participation.groups(data.clients, settings.seed)
        self.groups |= settings.attack.group(data.clients, self.groups, settings.seed)
        self.data = data
        self.agreed = self._agree()
        if self.agreed:
            data = scaling.apply(data, self.agreed.pooled)
        attackers = self.groups.get(ATTACKERS, [])
        data = settings.attack.on_data(data, attackers, task.classes)
        if UNSEEN in self.groups:
            data = data.leave_out(self.groups[UNSEEN])
        windows = zip(data.train_x, data.train_y, strict=True)
        self.uploads = [own for own in windows if len(own[1])] if self.pools_data else []
        self.data = data = data.pooled() if self.pools_data else data
        task = replace(task, seed=settings.seed, params=params)
        device = data.test_x.device
        samples = [len(y) for y in data.train_y]
        self.workspace = Workspace(algorithm, task, params, samples, settings.seed, device)
        forging = () if self.pools_data else attackers  # where data are pooled, there are no replies
        self.attackers = Attackers(settings.attack, forging, settings.seed, self.workspace.nets)
        shared = {n: t for n, t in self.workspace.initial.items() if n not in self.workspace.private}
        self.server = algorithm(task, params, shared)
        seen = data.clients - len(self.groups.get(UNSEEN, ()))
        sampling = sampling_of(schedule.sampling, seen, schedule.join_ratio)
        self.protection = protection(settings.privacy, algorithm, sampling, schedule.rounds, self._noise())
        if self.protection:
            if self.agreed:
                raise UserError(SCALED)
            self.server.average, self.protection.summed = self.protection.average, schedule.secure
        self.budget = self._budget()
        settings = self.budget.training if self.budget else settings
        selected = 1 if self.pools_data else count_selected(data.clients, 1 if self.everyone else schedule.join_ratio)
        if schedule.secure:
            share = 1 if self.everyone else schedule.join_ratio
            secure_sums.check_clients(count_selected(seen, share), schedule.join_ratio)
        if isinstance(backend, str):
            self.backend = selection.make(backend, self.workspace, data, settings, selected, client_memory)
        else:
            self.backend = backend(self.workspace, data, settings)
        self.evaluate = self.backend.evaluator()
        self.outliers = Outliers(schedule.outliers) if schedule.outliers else None
        least = fewest(self.protection, self.min_updates)
        self.sums = secure_sums.SecureSums(self.server.check_reply, self._check_mean, least, self.refusals)
        self.transport = Transport(device, self.workspace.private)

    @property
    def views(self) -> list[str]:
        """Names of the views of an evaluation."""
        return views(self.workspace, self.server.networks(), self.data)

    def run(self, observers: Sequence[Observer] = (), done: int = 0) -> None:
        """Make all rounds but those already `done`; each observer is told of each, in their order."""
        for index in range(done + 1, self.schedule.rounds + 1):
            round = Round(index, self.schedule.rounds, self.schedule.join_ratio)
            for observer in observers:
                observer.on_round_start(round)
            record = self.round(round)
            for observer in observers:
                observer.on_round_end(record)

    def round(self, round: Round) -> RoundRecord:
        """Run one communication round: select, send, train, collect, aggregate, evaluate."""
        return turns.run(self.turns(round), lambda messages: self.backend.train(messages, round))

    def turns(self, round: Round) -> Generator[dict[int, Message], Mapping[int, Trained | NonFinite], RoundRecord]:
        """Run one communication round; clients train elsewhere, on the messages that it yields (see `turns`)."""
        clock = _Clock(self.data.test_x.device)
        if self.protection:
            self.protection.begin(round.index)
        server, transport = self.server, self.transport
        transport.start_round()
        if self.agreed and round.index == self.agreed.round:
            transport.up, transport.down = self.agreed.up, self.agreed.down
        selected = self._select(round)

        sent = contract.messages(server, selected, server.messages(selected, round))
        messages = {id: transport.send_down(message) for id, message in sent.items()}
        lost = self._lost(selected, round)
        results = yield {id: message for id, message in messages.items() if id not in lost}
        results = self._attacked(results, messages, round)
        if self.schedule.secure:
            replies, rejected, counted = self._collect_sum(results, round)
        else:
            replies, rejected = self._collect(results, round)
            counted = list(replies)
        clock.lap("train")

        figures, missing = {}, shares_missing(self.protection, len(counted))
        counts = not missing and bool(replies or self.protection)
        if counts and (reason := self._aggregate(replies, round)):
            rejected |= {id: f"client {id}: {reason}" for id in counted}
            counted, counts = [], False
        if counts:
            figures = contract.figures(server)
        if self.protection:
            figures |= self.protection.figures()
        if self.budget:
            self.budget.book(results, round)
            figures |= self.budget.figures()
        for note in (notes := [*missing, *server.average.take_notes(), *self.sums.take_notes()]):
            print(f"{type(server).__name__}, round {round.index}: {note}", file=sys.stderr)
        clock.lap("aggregate")

        due = round.index % self.schedule.eval_gap == 0 or round.index == round.total
        metrics = self.evaluate(contract.networks(server)) if due else {}
        losses = {id: result.loss for id, result in sorted(results.items()) if isinstance(result, Trained)}
        loss = self._train_loss({id: losses[id] for id in counted if id in losses and id not in self.attackers.ids})
        clock.lap("evaluate")
        return RoundRecord(
            round=round.index,
            selected=selected,
            rejected=rejected,
            train_loss=loss,
            bytes_up=transport.up,
            bytes_down=transport.down,
            seconds=clock.seconds,
            metrics=metrics,
            lost=lost,
            server={name: value for name, value in figures.items() if not math.isnan(value)},
            notes=notes,
        )

    def reachable(self, round: Round) -> list[int]:
        """Return the ascending ids of the clients that can be selected in a round."""
        participation = self.schedule.participation
        return participation.reachable(self.groups, self.data.clients, round.index, self.settings.seed)

    def _agree(self) -> scaling.Agreement | None:
        """Agree on the statistics to scale by, if windows are not scaled yet; free of bytes if all data are pooled."""
        away = self.groups.get(UNSEEN, [])
        seen = [id for id in range(self.data.clients) if id not in away]
        total, join_ratio = self.schedule.rounds, self.schedule.join_ratio
        rounds = (Round(index, total, join_ratio) for index in range(1, total + 1))
        there = (lambda _: seen) if self.pools_data else self.reachable
        agreed = scaling.agree(self.data.statistics, rounds, there, len(seen))
        return replace(agreed, up=0, down=0) if agreed and self.pools_data else agreed

    def _budget(self) -> Budget | None:
        """Return the clients' budgets of example-level privacy; None where that is not asked for.

        Raises:
            UserError: the algorithm or the networks are not covered, or the budget is too small.
        """
        if self.settings.privacy.level != EXAMPLE:
            return None
        server, total = type(self.server), self.schedule.rounds
        if self.agreed:
            raise UserError(SCALED_WINDOWS.format("federated"))
        dp_sgd.check({server.__name__: (server, self.server.params)})
        dp_sgd.check_networks(self.workspace.nets)
        rounds = (Round(index, total, self.schedule.join_ratio) for index in range(1, total + 1))
        return Budget(self.settings, self.workspace.clients, [(round, self._select(round)) for round in rounds])

    def _noise(self) -> Noise:
        """Return where the noise of client-level privacy comes from: here, of a simulation, from the seed."""
        return SeededNoise(
            self.settings.seed, type(self.server).__name__, repr(self.server.params), repr(self.settings)
        )

    def _select(self, round: Round) -> list[int]:
        if self.everyone:
            return [id for id in range(self.data.clients) if id not in self.groups.get(UNSEEN, ())]
        if not self.pools_data:
            there, draw = self.reachable(round), draw_clients if self.schedule.sampling == POISSON else sample_clients
            return [there[i] for i in draw(self.settings.seed, round.index, len(there), self.schedule.join_ratio)]
        if round.index == 1:  # the upload of all data
            self.transport.up += sum(len(Message({"x": x, "y": y}).to_bytes()) for x, y in self.uploads)
        return [0]

    def _lost(self, selected: Sequence[int], round: Round) -> dict[int, str]:
        """Return the clients whose replies never arrive, and why.

        They drop out, or are stragglers of an algorithm that does not accept partial work. Their state stays as if they
        had not been selected; the message to them is counted.
        """
        faults, seed = self.settings.faults, self.settings.seed
        late = (
            [id for id in selected if faults.slows(seed, round.index, id)]
            if not self.server.accepts_partial_work
            else []
        )
        gone = [id for id in selected if faults.drops(seed, round.index, id)]
        return dict(sorted((dict.fromkeys(late, STRAGGLER) | dict.fromkeys(gone, DROPOUT)).items()))

    def _attacked(
        self, results: Mapping[int, Trained | NonFinite], messages: Mapping[int, Message], round: Round
    ) -> dict[int, Trained | NonFinite]:
        """Return the results with the attackers' replies forged, and with noise where the clients add it."""
        if self.protection and self.protection.distributed:
            return noised(self.protection, results, messages)
        trained = {id: result for id, result in results.items() if isinstance(result, Trained)}
        replies = {id: result.reply for id, result in trained.items()}
        forged = self.attackers.forge(self.server, messages, replies, round.index)
        return {**results, **{id: replace(trained[id], reply=reply) for id, reply in forged.items()}}

    def _aggregate(self, replies: Mapping[int, Message], round: Round) -> str:
        """Let the server take in the replies; where that leaves NaN or infinity, bring it back to what it was before.

        With client-level privacy there may be no replies: noise is added all the same, or its absence would tell of
        those who might have replied.

        Returns:
            Why nothing of this round counts; '' where it does.

        Raises:
            UserError: the server takes no mean by `Server.average`, so that the mean asked for would be ignored.
        """
        before, average = contract.save(self.server), self.server.average
        contract.aggregate(self.server, replies, round)
        if average.how.asked and not average.used:
            raise UserError(
                f"{average.how.asked}: {type(self.server).__name__}.aggregate takes no mean by `self.average`; leave "
                "one of them out"
            )
        if self.protection and not self.protection.released:
            raise UserError(f"--dp client: {type(self.server).__name__}.aggregate takes no mean by `self.average`")
        if (name := first_nonfinite(self._aggregated())) is None:
            return ""
        self.server.restore(before)
        return f"the round is undone, as its replies together left NaN or infinity in '{name}'"

    def _aggregated(self) -> Mapping[str, torch.Tensor]:
        """Return what of the server's state is checked after each aggregation."""
        return contract.networks(self.server)

    def _collect(
        self, results: Mapping[int, Trained | NonFinite], round: Round
    ) -> tuple[dict[int, Message], dict[int, str]]:
        """Return the replies that the server accepts, and why the others are dropped, in the order of ids."""
        replies, rejected = {}, {}
        for id, result in sorted(results.items()):
            try:
                if isinstance(result, NonFinite):
                    raise result
                replies[id] = self._received(id, result.reply, round)
            except self.refusals as error:
                rejected[id] = _reason(id, error)
        apart = {}
        if self.outliers:
            apart = self.outliers.found(
                {id: contract.contribution(self.server, id, own) for id, own in replies.items()}
            )
        rejected = dict(sorted((rejected | apart).items()))
        return {id: reply for id, reply in replies.items() if id not in apart}, rejected

    def _collect_sum(
        self, results: Mapping[int, Trained | NonFinite], round: Round
    ) -> tuple[dict[int, Message], dict[int, str], list[int]]:
        """Return the mean of the replies as one reply, why others are not in it, and the clients that are in it."""
        failed = {id: _reason(id, result) for id, result in results.items() if isinstance(result, NonFinite)}
        replies = {id: result.reply for id, result in sorted(results.items()) if isinstance(result, Trained)}
        summed = self.sums.collect(self._parties(replies, round))
        failed |= {id: _reason(id, BadMessage(reason)) for id, reason in summed.rejected.items()}
        if summed.undone:
            failed |= self._undo(replies.keys() - failed.keys(), summed.undone)
        device = self.data.test_x.device
        means = {id: mean.copy(device) for id, mean in summed.replies.items()}
        return means, dict(sorted(failed.items())), summed.clients

    def _undo(self, clients: Collection[int], reason: str) -> dict[int, str]:
        """Return why the work of clients does not count with which nothing was wrong."""
        return {id: f"client {id}: {reason}" for id in clients}

    def _check_mean(self, clients: Sequence[int], mean: Message) -> None:
        """Raise one of `refusals` where a mean of some clients' replies has not the form of a reply."""
        self.server.check_reply(clients[0], mean)

    def _parties(self, replies: Mapping[int, Message], round: Round) -> secure_sums.Parties:
        """Return the clients that add up their replies."""
        faults, seed = self.settings.faults, self.settings.seed
        return secure_sums.OwnParties(
            replies, f"round {round.index}", self.transport, lambda id: faults.damage(seed, round.index, id)
        )

    def _received(self, id: int, sent: Message, round: Round) -> Message:
        """Return a reply as it arrives at the server, checked. Raises BadMessage or NonFinite."""
        damage = self.settings.faults.damage(self.settings.seed, round.index, id)
        reply = self.transport.send_up(id, sent, damage)
        self.server.check_reply(id, reply)
        return reply

    def close(self) -> None:
        """Stop what the backend started; the federation cannot train afterwards."""
        self.backend.close()

    def save(self) -> Message:
        """Return all state of server and clients: `server/...`, `client/<id>/kept/...`, `client/<id>/memory/...`."""
        server, clients = contract.save(self.server), self.workspace.clients
        tensors = {f"server/{name}": tensor for name, tensor in server.tensors.items()}
        for client, kept in zip(clients, self.workspace.kept, strict=True):
            tensors |= {f"client/{client.id}/kept/{name}": tensor for name, tensor in kept.items()}
            tensors |= {f"client/{client.id}/memory/{name}": tensor for name, tensor in client.memory.items()}
        meta: dict[str, Any] = {"server": dict(server.meta), "trained": [client.trained for client in clients]}
        if self.outliers:
            meta["usual"] = self.outliers.usual
        return Message(tensors, meta | self._privacy_state())

    def _privacy_state(self) -> dict[str, Any]:
        private = self.protection or self.budget
        return {"privacy": private.save()} if private else {}

    def restore(self, saved: Message) -> None:
        """Restore the state that `save` returned.

        Raises:
            KeyError or ValueError: `saved` is of another algorithm or another number of clients.
        """
        restore(self.workspace, self.server, saved)
        if self.outliers:
            self.outliers.usual = float(saved.meta.get("usual", 0.0))  # earlier versions did not save it
        if private := self.protection or self.budget:
            private.restore(saved.meta["privacy"])

    def figures(self) -> dict[str, float]:
        """Return what `RoundRecord.server` will hold, by name; see `Server.figures`."""
        return contract.figures(self.server) | (
            private.figures() if (private := self.protection or self.budget) else {}
        )

    def _train_loss(self, losses: Mapping[int, torch.Tensor]) -> float:
        if not losses:
            return float("nan")
        values: list[float] = torch.stack(list(losses.values())).tolist()
        # DP-SGD may draw no window of a client in a whole round; a client with any other NaN has been dropped
        known = {id: value for id, value in zip(losses, values, strict=True) if not math.isnan(value)}
        total = sum(len(self.data.train_y[id]) for id in known)
        return sum(value * len(self.data.train_y[id]) / total for id, value in known.items()) if known else math.nan


def _reason(client: int, error: Exception) -> str:
    """Return a printable line that names the client, whatever text a message from outside put into the error."""
    text = str(error) if isinstance(error, (NonFinite, BadMessage)) else f"{type(error).__name__}: {error}"
    line = shown(text, LONGEST_REASON)
    return line if line.startswith(f"client {client}:") else f"client {client}: {line}"


class _Clock:
    """Wall time by name; each lap synchronises the device, so that its work is counted in the right lap."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.last = device, time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[name] = now - self.last
        self.last = now
