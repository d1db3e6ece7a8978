"""Secure aggregation between sites: its steps as messages, a site's part, and the sites as the server asks them.

A site's answer to the request to train holds, in place of the algorithm's reply, its public keys (`Party.offer`). The
reply and all keys stay in the memory of the site's worker until the round's steps have been taken, or the next round
begins; a worker that ends meanwhile has lost them, and its site is one that dropped out. Imports no Flower.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fedkdx_plugin.engine.secure_sums import Parties
from fedkdx_plugin.engine.transport import Transport
from fedkdx_plugin.flower.protocol import LONGEST_TEXT, PROTOCOL, Answer, checked, checked_meta, whole
from fedkdx_plugin.privacy.secure_aggregation.messages import MASK, STEPS
from fedkdx_plugin.privacy.secure_aggregation.party import Party
from registry.interface import BadMessage, Message
from registry.text import is_plain_name, shown


@dataclass(frozen=True)
class Step:
    """Asks a site to take a step of the round's secure aggregation.

    Attributes:
        run: the run's name.
        client: the client it is for.
        round: index of the round.
        step: one of `STEPS`.
        content: the request, as `Party.answer` takes it.
    """

    run: str
    client: int
    round: int
    step: str
    content: Message

    def to_message(self) -> Message:
        """Return it as it is sent."""
        own = {name: value for name, value in vars(self).items() if name != "content"}
        return Message(self.content.tensors, {"protocol": PROTOCOL, **own, "content": dict(self.content.meta)})

    @staticmethod
    def is_one(message: Message) -> bool:
        """Return whether a message from the server asks for a step, and not to measure or train."""
        return "step" in message.meta

    @staticmethod
    @checked("a step of secure aggregation")
    def from_message(message: Message) -> Step:
        """Read what the server sent. Raises BadMessage unless every value is of its type; `Party` checks the rest."""
        meta = checked_meta(message)
        if meta["step"] not in STEPS or not is_plain_name(meta["run"]):
            raise BadMessage(f"step {shown(repr(meta['step']))} of run {shown(repr(meta['run']))}")
        content = Message(message.tensors, dict(meta["content"]))
        return Step(meta["run"], whole(meta["client"]), whole(meta["round"]), meta["step"], content)


@dataclass(frozen=True)
class StepAnswer:
    """Answers a step.

    Attributes:
        client, round, step: as of the request.
        content: the answer, as `Party.answer` gave it; None where the site takes no such step.
        dropped: why it takes none, or ''.
    """

    client: int
    round: int
    step: str
    content: Message | None = None
    dropped: str = ""

    def to_message(self) -> Message:
        """Return it as it is sent."""
        own: dict[str, Any] = {name: value for name, value in vars(self).items() if name != "content"}
        content = self.content or Message()
        return Message(content.tensors, {"protocol": PROTOCOL, **own, "content": self.content and dict(content.meta)})

    @staticmethod
    @checked("an answer to a step of secure aggregation")
    def from_message(message: Message, step: Step) -> StepAnswer:
        """Read a site's answer to a step. Raises BadMessage: it is none; `Summing` checks what is in it."""
        meta = checked_meta(message)
        about = meta.get("client"), meta.get("round"), meta.get("step")
        if about != (step.client, step.round, step.step):
            raise BadMessage(f"an answer of {shown(about)}, not of client {step.client}, round {step.round}")
        content = None if meta["content"] is None else Message(message.tensors, dict(meta["content"]))
        if content is None and not meta["dropped"]:
            raise BadMessage("neither an answer nor a reason why there is none")
        return StepAnswer(step.client, step.round, step.step, content, shown(meta["dropped"], LONGEST_TEXT))


def _context(run: str, round: int) -> str:
    return f"{run}, round {round}"


class SecureSite:
    """A site's part: what it holds between two messages of a round, in memory alone.

    Args:
        say: is called with what the site's operator should know.
    """

    def __init__(self, say: Callable[[str], None] = lambda text: None) -> None:
        self._say = say
        self._party: Party | None = None
        self._of: tuple[str, int] = ("", 0)

    def begin(self, run: str, answer: Answer) -> Answer:
        """Return an answer whose reply, if it has one, is kept back, with public keys in its place."""
        self._party = None
        if answer.reply is None:
            return answer
        try:
            self._party = Party(answer.client, answer.reply, _context(run, answer.round))
        except BadMessage as error:
            return replace(answer, reply=None, loss=float("nan"), dropped=f"client {answer.client}: {error}")
        self._of = run, answer.round
        return replace(answer, reply=self._party.offer())

    def take(self, step: Step) -> StepAnswer:
        """Take a step, if it is what comes next."""
        answer = StepAnswer(step.client, step.round, step.step)
        if self._party is None or (step.run, step.round) != self._of or step.client != self._party.id:
            return replace(answer, dropped="this site's keys of that round are gone, as its worker was started anew")
        try:
            answer = replace(answer, content=self._party.answer(step.step, step.content))
        except BadMessage as error:
            self._party = None
            self._say(f"refused step '{step.step}' of secure aggregation: {error}")
            return replace(answer, dropped=str(error))
        if step.step == MASK:
            clipped = f"; {self._party.clipped} of its values were clipped" if self._party.clipped else ""
            among = len(step.content.meta["clients"])
            self._say(f"{step.run} round {step.round}: sent its update masked, to be summed with {among - 1}{clipped}")
        return answer


# sends each client a step; returns its answer, or why there is none
Exchange = Callable[[Mapping[int, Step]], Mapping[int, "StepAnswer | str"]]


class SiteParties(Parties):
    """The sites of a round as the server sums what they send.

    Args:
        offers: client -> what its answer to the request to train held.
        run, round: name of the run, index of the round.
        exchange: carries steps to sites.
        transport: counts bytes, as it counts those of one process.

    Attributes:
        silent: client -> why it took no step that it was asked for.
    """

    def __init__(
        self, offers: Mapping[int, Message], run: str, round: int, exchange: Exchange, transport: Transport
    ) -> None:
        self.offers, self.context, self.rejected = dict(offers), _context(run, round), {}
        self.run, self.round, self.exchange, self.transport = run, round, exchange, transport
        self.silent: dict[int, str] = {}
        transport.up += sum(offer.size() for offer in offers.values())

    def ask(self, step: str, requests: Mapping[int, Message]) -> Mapping[int, Message | str]:
        """Let sites take a step; return the answer of each, or why there is none."""
        steps = {id: Step(self.run, id, self.round, step, request) for id, request in requests.items()}
        self.transport.down += sum(request.size() for request in requests.values())
        answers: dict[int, Message | str] = {}
        for id, answer in self.exchange(steps).items():
            content = None if isinstance(answer, str) else answer.content
            if content is None:
                self.silent[id] = answers[id] = answer if isinstance(answer, str) else answer.dropped
            else:
                self.transport.up += content.size()
                answers[id] = content
        return answers
