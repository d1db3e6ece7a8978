"""Secure aggregation in the round loop: the server is given the mean of a round's replies, and none of them.

The protocol is in `privacy.secure_aggregation`. Here are what it needs to be used by a federation: which options and
algorithms it goes with, and the clients of one process. `flower.secure` has those of a federation between sites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

from fedkdx_plugin.engine.faults import Damage
from fedkdx_plugin.engine.transport import Transport, check_finite
from registry.aggregation import Averaging
from registry.errors import UserError
from registry.interface import BadMessage, Message, NonFinite, Server

FLAG = "--secure-aggregation"
FEWEST = 2  # replies; the sum of a single one is no secret


def check(algorithms: Mapping[str, type[Server]], averaging: Averaging, outliers: float | None) -> None:
    """Raise UserError where secure aggregation does not go together with options or algorithms, or cannot be had."""
    if averaging.asked:
        raise UserError(f"{averaging.asked}: needs single replies, and with {FLAG} the server has their sum alone")
    if outliers:
        raise UserError(
            f"--outliers {outliers:g}: with {FLAG} the server has no single reply to set aside; leave one of them out"
        )
    pooled = [name for name, algorithm in algorithms.items() if algorithm.pools_data]
    if pooled:
        raise UserError(f"{FLAG}: {', '.join(pooled)} pools everybody's data, which it cannot hide; leave one out")
    others = [name for name, algorithm in algorithms.items() if not algorithm.sums]
    if others:
        need = "need" if len(others) > 1 else "needs"
        raise UserError(f"{FLAG}: {', '.join(others)} {need} more of the replies than their sum; leave one of them out")
    if find_spec("cryptography") is None:
        raise UserError(f"{FLAG} needs the package cryptography: pip install 'fedkdx[privacy]'")


def check_clients(selected: int, join_ratio: float) -> None:
    """Raise UserError where a round selects so few clients that a sum is no secret."""
    if selected < FEWEST:
        raise UserError(
            f"{FLAG}: a round selects {selected} client (-jr {join_ratio:g}), whose reply would be the sum; "
            "let more take part"
        )


class Parties(Protocol):
    """The clients of a round, wherever they are.

    Attributes:
        context: names run and round.
        offers: what each client that has something to add sent first.
        rejected: client -> why it has nothing to add.
    """

    context: str
    offers: dict[int, Message]
    rejected: dict[int, str]

    def ask(self, step: str, requests: Mapping[int, Message]) -> Mapping[int, Message | str]:
        """Let clients take a step; return the answer of each, or why there is none."""


class OwnParties(Parties):
    """Clients of this process; what they send is counted as if it were sent.

    Args:
        replies: their replies, which they keep to themselves.
        context: name of the round.
        transport: counts bytes.
        damage: client -> damage to its masked values on the way, or None.
    """

    def __init__(
        self,
        replies: Mapping[int, Message],
        context: str,
        transport: Transport,
        damage: Callable[[int], Damage | None],
    ) -> None:
        from fedkdx_plugin.privacy.secure_aggregation.messages import MASK
        from fedkdx_plugin.privacy.secure_aggregation.party import Party

        self.context, self.transport, self.damage, self._damaged = context, transport, damage, MASK
        self.offers, self.rejected = {}, {}
        self._parties: dict[int, Party] = {}
        for id, reply in replies.items():
            try:
                transport.check_private(id, reply)
                check_finite(id, reply.tensors)
                self._parties[id] = Party(id, reply, context)
                self.offers[id] = self._sent(self._parties[id].offer())
            except (BadMessage, NonFinite) as error:
                self.rejected[id] = str(error)

    def ask(self, step: str, requests: Mapping[int, Message]) -> Mapping[int, Message | str]:
        """Let clients take a step; return the answer of each, or why there is none."""
        answers: dict[int, Message | str] = {}
        for id, request in requests.items():
            self.transport.down += request.size()
            try:
                answer = self._sent(self._parties[id].answer(step, request))
                damage = self.damage(id) if step == self._damaged else None
                answers[id] = Message.from_bytes(damage(answer.to_bytes())) if damage else answer
            except BadMessage as error:
                answers[id] = str(error)
        return answers

    def _sent(self, message: Message) -> Message:
        self.transport.up += message.size()
        return message


@dataclass(frozen=True)
class Summed:
    """Outcome of secure aggregation in a round.

    Attributes:
        replies: one reply with the mean of all, by the first of its clients; none where there is no mean.
        clients: whose replies are in it.
        rejected: client -> why its reply is not.
        undone: why there is no mean; '' where there is one.
    """

    replies: dict[int, Message]
    clients: list[int]
    rejected: dict[int, str]
    undone: str = ""


class SecureSums:
    """The server's means by secure aggregation.

    Args:
        check_reply: raises one of `refusals` for a client's reply of a wrong form; it is given zeros.
        check_mean: does so for the mean of some clients' replies.
        least: fewest replies that may be in a sum.
        refusals: what these may raise.
    """

    def __init__(
        self,
        check_reply: Callable[[int, Message], None],
        check_mean: Callable[[Sequence[int], Message], None],
        least: int,
        refusals: tuple[type[Exception], ...],
    ) -> None:
        self.check_reply, self.check_mean, self.least, self.refusals = check_reply, check_mean, least, refusals
        self._notes: list[str] = []

    def collect(self, parties: Parties) -> Summed:
        """Let the clients of a round add up their replies; return the mean."""
        from fedkdx_plugin.privacy.secure_aggregation.summing import Summing

        summing = Summing(parties.context, parties.ask, self.check_reply, self.least, self.refusals)
        outcome = summing.run(parties.offers)
        rejected, clients, undone = {**parties.rejected, **outcome.dropped}, outcome.clients, outcome.undone
        self._notes += outcome.notes
        if outcome.mean:
            try:
                self.check_mean(clients, outcome.mean.reply)
                return Summed({clients[0]: outcome.mean.reply}, clients, rejected)
            except self.refusals as error:
                undone = f"the mean of {len(clients)} replies is none that clients could have: {error}"
        undone = f"the round is undone: {undone}"
        self._notes.append(undone)
        return Summed({}, [], rejected, undone)

    def take_notes(self) -> list[str]:
        """Return what has to be said since the last call."""
        notes, self._notes = self._notes, []
        return notes
