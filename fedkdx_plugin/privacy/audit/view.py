"""View that the server of a federation has of a round: the one place that knows which attacker an audit stands for.

It is what arrives at `Server.aggregate`, after everything that clients do to their replies: compression and, where the
run has them, noise, and sums in which single replies cannot be told apart. The server is taken to be honest but
curious: it keeps to the protocol, and looks at all that it receives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedkdx_plugin.engine.rounds import Federation
from registry import contract
from registry.aggregation import of_client
from registry.interface import Message, Round
from registry.tensors import copied

State = dict[str, Tensor]


@dataclass(frozen=True)
class Update:
    """Change of the shared state that a reply asks for.

    Attributes:
        clients: whose replies it holds: one client's, or those of all whose mean is all that is seen.
        start: shared state at the beginning of the round, by full name.
        change: what the reply would add to it, by full name; statistics of batch norm are among it.
    """

    clients: tuple[int, ...]
    start: State
    change: State

    @property
    def end(self) -> State:
        """The state that the clients arrived at, as far as the server can tell."""
        return self.start | {name: self.start[name] + change for name, change in self.change.items()}


def see(federation: Federation, round: Round) -> list[Update]:
    """Make a round and return what the server saw of it: an update for each reply that holds shared state."""
    summed = getattr(federation.schedule, "secure", False)  # the one reply is the mean of all
    server, sent, given, updates = federation.server, dict[int, Message](), [False], list[Update]()
    shared = copied(contract.networks(server))
    messages, aggregate = server.messages, server.aggregate

    def noting_messages(clients: Sequence[int], round: Round) -> dict[int, Message]:
        sent.update(messages(clients, round))
        return dict(sent)

    def noting_replies(replies: Mapping[int, Message], round: Round) -> None:
        for id, reply in replies.items():
            idle = contract.idle(server, sent[id])
            given[0] |= bool(idle)
            start = of_client(shared, id)
            change = _change(contract.contribution(server, id, reply), idle, start)
            if change:
                updates.append(Update(tuple(sent) if summed else (id,), start, change))
        aggregate(replies, round)

    server.messages, server.aggregate = noting_messages, noting_replies  # type: ignore[method-assign]
    try:
        federation.round(round)
    finally:
        del server.messages, server.aggregate
    if not given[0] and _against(updates, contract.networks(server)):
        return [replace(one, change={name: -t for name, t in one.change.items()}) for one in updates]
    return updates


def _change(contribution: Mapping[str, Tensor], idle: Mapping[str, Tensor], start: State) -> State:
    """Return a contribution less what a client that changes nothing contributes, of the shared state alone."""
    return {
        name: (tensor - idle[name] if name in idle else tensor).detach().clone()
        for name, tensor in contribution.items()
        if name in start and start[name].shape == tensor.shape
    }


def _against(updates: Sequence[Update], after: Mapping[str, Tensor]) -> bool:
    """Return whether the server moved against the contributions: it subtracts them, as gradients."""
    along = sum(
        float(torch.sum((after[name] - one.start[name]).double() * change.double()))
        for one in updates
        for name, change in one.change.items()
        if name in after
    )
    return along < 0
