"""The server's side of a federation: the engine's round loop, with a backend whose clients are sites.

Each site gets one message a round. The request of round t + 1 asks first to measure the state after round t, then, of
the selected clients, to train. So a round's metrics arrive with the next round's replies, a last request after the last
round asks for metrics alone, and the numbers are those of one process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Generator, Mapping, Sequence
from dataclasses import replace
from random import SystemRandom
from typing import Any

from torch import Tensor

from fedkdx_plugin.configuration.choice import choose
from fedkdx_plugin.engine import scaling
from fedkdx_plugin.engine.backends.base import Backend, Trained
from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.participation import Participation
from fedkdx_plugin.engine.record import Observer, RoundRecord
from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.engine.schedule import Schedule
from fedkdx_plugin.engine.training import Settings
from fedkdx_plugin.engine.workspace import Workspace
from fedkdx_plugin.experiments.experiment import Experiment
from fedkdx_plugin.experiments.private import privacy
from fedkdx_plugin.experiments.setting import schedule
from fedkdx_plugin.flower.remote import RemoteBackend, remote_data, sized
from fedkdx_plugin.flower.roster import Link, Roster
from fedkdx_plugin.flower.secure import SiteParties
from fedkdx_plugin.privacy.accounting import FIXED, POISSON
from fedkdx_plugin.privacy.client import Protection
from fedkdx_plugin.privacy.example import BETWEEN_SITES
from fedkdx_plugin.privacy.noise import Noise, SecretNoise
from fedkdx_plugin.privacy.options import CLIENT, EXAMPLE, Privacy
from registry.errors import UserError
from registry.interface import BadMessage, Message, NonFinite, Round, Server, Task
from registry.text import shown

OUTLIERS = 1000.0  # times the usual norm of a reply: an honest one is far below
MOST_REFUSALS = 5


def check_sampling(privacy: Privacy, schedule: Schedule) -> None:
    """Raise UserError where privacy would lean on sites not knowing which of them are selected, although they do.

    And where it would lean on noise that the sites do not make (see `privacy.example`).
    """
    if privacy.level == EXAMPLE:
        raise UserError(f"--dp example: not with Flower: {BETWEEN_SITES}")
    if privacy.level == CLIENT and schedule.sampling == FIXED and schedule.join_ratio < 1:
        raise UserError(
            "--dp client: a fixed number of sites is drawn from the seed, which all sites know; let all take part (-jr "
            "1), or with --dp-noise central add --sampling poisson, which is drawn in secret"
        )


def check_algorithm(algorithm: type[Server], participation: Participation) -> None:
    """Raise UserError for an algorithm or an option that a federation between sites cannot have."""
    if algorithm.pools_data:
        raise UserError(f"{algorithm.__name__} pools everybody's data, which never leave a site; it cannot run here")
    if participation.unseen:
        raise UserError("--unseen: every site that joins takes part; leave it out with --engine flower")


def check_sites(experiment: Experiment) -> None:
    """Raise UserError for algorithms or options of an experiment that a federation between sites cannot have."""
    for planned in experiment.runs:
        config = planned.config
        if config.attackers:
            raise UserError("--attackers: attacks are simulated in one process alone; leave it out with Flower")
        if config.vary == "data":  # each seed is to have data of its own
            raise UserError("--vary data: the data of sites stay as they are; leave it out with Flower")
        check_sampling(privacy(config), schedule(config))
        for choice in choose(config):
            check_algorithm(choice.server, schedule(config).participation)


class Coordinator(Federation):
    """A federation whose clients are sites.

    Args:
        algorithm, task, params, settings, schedule: as of `Federation`.
        link, roster, run, deadline: as of `RemoteBackend`.
        most_refusals: in a row, after which a site is left out.
        min_updates: accepted replies without which a round does not count.

    Attributes:
        remote: the backend, by its own type.
        made_again: what a restart costs in privacy, to be said; '' where it costs nothing.

    Raises:
        UserError: an algorithm or an option that a federation between sites cannot have.
    """

    refusals = (Exception,)  # whatever checking a site's reply raises, that site is refused and the others go on
    remote: RemoteBackend

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
        most_refusals: int = MOST_REFUSALS,
        min_updates: int = 1,
    ) -> None:
        check_algorithm(algorithm, schedule.participation)
        check_sampling(settings.privacy, schedule)
        self.roster, self.most_refusals, self.min_updates = roster, most_refusals, min_updates
        self._refused: Counter[int] = Counter()  # client -> how often in a row
        self._snapshot: Message | None = None
        self.made_again = ""

        def make(workspace: Workspace, data: DeviceData, settings: Settings) -> Backend:
            self.remote = RemoteBackend(workspace, data, settings, link, roster, run, deadline)
            return self.remote

        if schedule.outliers is None:  # client-level privacy bounds every reply by itself, a sum has no single ones
            bounded = schedule.secure or settings.privacy.level == CLIENT
            schedule = replace(schedule, outliers=0.0 if bounded else OUTLIERS)
        super().__init__(algorithm, task, params, remote_data(roster), settings, schedule, make)
        self._scale_by(self.agreed)

    def run(self, observers: Sequence[Observer] = (), done: int = 0) -> None:
        """Make all rounds but those already `done`; show each record once the next round has brought its metrics.

        The first observer must put state and records on disk before it returns: by that, sites delete old state.
        """
        last: RoundRecord | None = None
        self.remote.durable = done
        for index in range(done + 1, self.schedule.rounds + 1):
            round = Round(index, self.schedule.rounds, self.schedule.join_ratio)
            self.meet(round)
            for observer in observers:
                observer.on_round_start(round)
            record = self.round(round)
            self._finish(last, observers)
            self._snapshot, last = self._state(), record
        if last:
            self.meet(round)
            self.remote.measure(round)
            self._finish(last, observers)

    def turns(self, round: Round) -> Generator[dict[int, Message], Mapping[int, Trained | NonFinite], RoundRecord]:
        """Make one round as `Federation.turns`; clients that gave no answer are lost, not rejected."""
        self._states = {id: self.remote.states.get(id, 0) for id in self.roster.known}  # to go back to
        record, silent = (yield from super().turns(round)), self.remote.silent
        rejected = {id: reason for id, reason in record.rejected.items() if id not in silent}
        for id in record.selected:
            self._refused[id] = self._refused[id] + 1 if id in rejected else 0
            if self._refused[id] >= self.most_refusals:
                self.roster.exclude(id, f"left out: refused {self._refused[id]} times in a row, last: {rejected[id]}")
        return replace(record, rejected=rejected, lost=dict(sorted((record.lost | silent).items())))

    def _collect(
        self, results: Mapping[int, Trained | NonFinite], round: Round
    ) -> tuple[dict[int, Message], dict[int, str]]:
        """Return the replies that count as `Federation` does; where they are too few, none do, and all are lost."""
        replies, rejected = super()._collect(results, round)
        # whether a round counts must not depend on what a site sent where that is private
        counted = len(results) - len(self.remote.silent) if self.protection else len(replies)
        if counted >= self.min_updates:
            return replies, rejected
        self._undo(replies, f"one of {len(replies)} updates, of at least {self.min_updates} (--min-updates)")
        return {}, rejected

    def _undo(self, clients: Collection[int], reason: str) -> dict[int, str]:
        """Let clients count as lost, not rejected, and go on from their state before the round."""
        self.remote.silent |= {id: f"client {id}: {reason}" for id in clients}
        self.remote.states |= {id: state for id, state in self._states.items() if id in clients}
        return {}

    def _parties(self, replies: Mapping[int, Message], round: Round) -> SiteParties:
        """Return the sites, which have sent offers in place of replies."""
        self._sites = SiteParties(
            replies, self.remote.run, round.index, lambda steps: self.remote.take_step(steps, round), self.transport
        )
        return self._sites

    def _collect_sum(
        self, results: Mapping[int, Trained | NonFinite], round: Round
    ) -> tuple[dict[int, Message], dict[int, str], list[int]]:
        """Return the mean as `Federation` does; a site that fell silent before its values were there is lost."""
        means, rejected, counted = super()._collect_sum(results, round)
        for id, reason in self._sites.silent.items():
            if id not in counted:
                self._undo([id], reason)
        return means, rejected, counted

    def _check_mean(self, clients: Sequence[int], mean: Message) -> None:
        """Raise BadMessage as well where the sites' samples do not add up to what they announced."""
        stated, announced = mean.meta["samples"], sum(map(self._weight, clients))
        if stated != announced:
            raise BadMessage(f"of {stated} samples, but the sites announced {announced}")
        super()._check_mean(clients, mean)

    def _weight(self, id: int) -> int:
        """Return the samples that a site's reply must state: those announced, or 1 where sites add the noise."""
        return 1 if self.protection and self.protection.distributed else self.roster.known[id].samples

    def _received(self, id: int, sent: Message, round: Round) -> Message:
        """Return a reply as `Federation` does; its weight is what the site announced."""
        stated, announced = sent.meta.get("samples"), self._weight(id)
        if stated is not None and (stated != announced or isinstance(stated, (bool, float))):
            raise BadMessage(f"states {shown(repr(stated))} samples, but announced {announced}")
        return super()._received(id, sent, round)

    def _aggregate(self, replies: Mapping[int, Message], round: Round) -> str:
        """Take in the replies as `Federation` does; where they make the server fail, nothing of the round counts."""
        before = self.server.save()
        try:
            return super()._aggregate(replies, round)
        except Exception as error:
            self.server.restore(before)
            return f"the round is undone, as its replies made the server fail: {type(error).__name__}: {shown(error)}"

    def _aggregated(self) -> Mapping[str, Tensor]:
        """Return all of the server's state."""
        return self.server.save().tensors

    def _attacked(
        self, results: Mapping[int, Trained | NonFinite], messages: Mapping[int, Message], round: Round
    ) -> dict[int, Trained | NonFinite]:
        """Return the results as they are: nobody attacks here, and sites have added their noise themselves."""
        return dict(results)

    def _noise(self) -> Noise:
        """Return where noise comes from: what nobody can know, as all sites know the seed."""
        return SecretNoise()

    def _select(self, round: Round) -> list[int]:
        """Return the sites of a round; one that is away cannot be asked to train, even if it needs no server for it.

        With privacy they are drawn in secret, as it leans on nobody knowing who takes part.
        """
        if self.protection and self.schedule.sampling == POISSON:
            drawn = SystemRandom()
            return [id for id in self.reachable(round) if drawn.random() < self.schedule.join_ratio]
        return self.reachable(round) if self.everyone else super()._select(round)

    def reachable(self, round: Round) -> list[int]:
        """Return the clients that can be selected in a round and are there, ascending."""
        there = self.roster.present(round.index)
        return [id for id in super().reachable(round) if id in there]

    def save(self) -> Message:
        """Return the server's state after the last round that was shown; clients keep theirs at the sites."""
        return self._snapshot or self._state()

    def restore(self, saved: Message) -> None:
        """Take over the state that `save` returned.

        Raises:
            KeyError or ValueError: `saved` is of another algorithm.
        """
        if self.protection:
            self.protection.restore(saved.meta["privacy"])
            self._count_twice(self.protection)
        if self.outliers:
            self.outliers.usual = float(saved.meta["usual"])
        self._refused = Counter({int(id): count for id, count in saved.meta["refused"].items()})
        self.remote.states = {int(id): round for id, round in saved.meta["states"].items()}
        own = {name: tensor for name, tensor in saved.tensors.items() if name.startswith("server/")}
        tensors = {name.removeprefix("server/"): tensor for name, tensor in own.items()}
        self.server.restore(Message(tensors, saved.meta["server"]))
        common = {n.removeprefix("scaling/"): tensor for n, tensor in saved.tensors.items() if n.startswith("scaling/")}
        if common:
            pooled = scaling.from_tensors(common, len(common["mean"]))
            self._scale_by(scaling.Agreement(pooled, *saved.meta["agreed"]))

    def _count_twice(self, protection: Protection) -> None:
        """Count what a server that ended may have released after its checkpoint, and will release again.

        The checkpoint of a round is written after the next one's requests, which tell of its mean; so one mean may be
        known that is not in it. Where sites add the noise, the sum of the round under way is known, too. Neither the
        noise nor who takes part can be repeated.
        """
        left = protection.plan.rounds - protection.round
        if not left:
            return
        protection.again += min(2 if protection.distributed else 1, left)
        spent = protection.plan.spent(protection.plan.rounds + protection.again)
        self.made_again = (
            f"rounds after {protection.round} may have been made before, and are made again with other noise: that "
            f"counts, and the run ends at ε = {spent:.2f}, not {protection.privacy.epsilon:g}"
        )

    def _scale_by(self, agreed: scaling.Agreement | None) -> None:
        """Let the sites scale their windows by this; it stays for the whole run, whoever joins or leaves."""
        self.agreed = agreed
        self.remote.scaling = agreed.pooled if agreed else None

    def _state(self) -> Message:
        server = self.server.save()
        tensors = {f"server/{name}": tensor for name, tensor in server.tensors.items()}
        states = {str(id): round for id, round in sorted(self.remote.states.items())}
        meta: dict[str, Any] = {
            "server": dict(server.meta),
            "states": states,
            "usual": self.outliers.usual if self.outliers else 0.0,
        }
        meta |= self._privacy_state()
        meta["refused"] = {str(id): count for id, count in sorted(self._refused.items()) if count}
        if self.agreed:
            common = scaling.to_message(self.agreed.pooled).tensors
            tensors |= {f"scaling/{name}": tensor for name, tensor in common.items()}
            meta["agreed"] = [self.agreed.round, self.agreed.up, self.agreed.down]
        return Message(tensors, meta)

    def meet(self, round: Round) -> None:
        """Wait until enough sites are there, and note how many windows they have."""
        for id in self.roster.wait(round.index):
            self.data.train_y[id] = sized(self.roster.known[id].samples)

    def _finish(self, record: RoundRecord | None, observers: Sequence[Observer]) -> None:
        """Give a round's record its metrics, and show it to the observers."""
        if record:
            due = record.round % self.schedule.eval_gap == 0 or record.round == self.schedule.rounds
            record = replace(record, metrics=self.remote.measured if due else {})
            for observer in observers:
                observer.on_round_end(record)
            self.remote.durable = record.round
