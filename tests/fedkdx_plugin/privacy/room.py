"""Parties and a server in one room, where tests take some away at a step or spoil what they say."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from fedkdx_plugin.privacy.secure_aggregation.fixed_point import Layout
from fedkdx_plugin.privacy.secure_aggregation.party import Party
from fedkdx_plugin.privacy.secure_aggregation.summing import Outcome, Summing
from registry.messages import BadMessage, Message

CONTEXT = "a run, round 1"


def make_replies(clients: int, size: int = 6) -> dict[int, Message]:
    """Return replies of clients whose numbers are not in a row."""
    rng = torch.Generator().manual_seed(clients)
    return {
        3 * id: Message(
            {"w": torch.randn(size, generator=rng), "b": torch.randn(2, 1, generator=rng)}, {"samples": id + 1}
        )
        for id in range(clients)
    }


def plain_mean(replies: Mapping[int, Message]) -> dict[str, torch.Tensor]:
    """Return the mean weighted by samples, in float64."""
    total = sum(reply.meta["samples"] for reply in replies.values())
    names = next(iter(replies.values())).tensors
    return {
        name: sum(reply.tensors[name].double() * reply.meta["samples"] for reply in replies.values()) / total
        for name in names
    }


class Room:
    """Carries a round's messages.

    Attributes:
        gone: client -> the step at which it is gone, for this one and the rest.
        spoil: (client, step) -> what becomes of its answer.
        requests, answers: what was carried, (client, step) -> message.
    """

    def __init__(self, replies: Mapping[int, Message], threshold_least: int = 2) -> None:
        self.replies, self.least = dict(replies), threshold_least
        self.parties = {id: Party(id, reply, CONTEXT) for id, reply in replies.items()}
        self.offers = {id: party.offer() for id, party in self.parties.items()}
        self.gone: dict[int, str] = {}
        self.spoil: dict[tuple[int, str], Callable[[Message], Message]] = {}
        self.requests: dict[tuple[int, str], Message] = {}
        self.answers: dict[tuple[int, str], Message] = {}

    def ask(self, step: str, requests: Mapping[int, Message]) -> dict[int, Message | str]:
        answers: dict[int, Message | str] = {}
        for id, request in reversed(requests.items()):  # the order of arrival must not matter
            if self.gone.get(id) == step:
                del self.parties[id]
            if id not in self.parties:
                continue
            self.requests[id, step] = request
            try:
                answer = self.parties[id].answer(step, Message.from_bytes(request.to_bytes()))
            except BadMessage as error:
                answers[id] = str(error)
                continue
            answer = self.spoil.get((id, step), lambda message: message)(answer)
            answers[id] = self.answers[id, step] = Message.from_bytes(answer.to_bytes())
        return answers

    def check(self, id: int, reply: Message) -> None:
        """Accept every form."""

    def run(self) -> Outcome:
        self.summing = Summing(CONTEXT, self.ask, self.check, self.least)
        return self.summing.run(self.offers)

    def exact(self, clients: list[int]) -> dict[str, torch.Tensor]:
        """Return the mean of these clients by whole numbers without any mask."""
        layout, count = Layout.of(next(iter(self.replies.values()))), len(self.summing.offers)
        encoded = [
            layout.encode(self.replies[id].tensors, self.replies[id].meta["samples"], count)[0] for id in clients
        ]
        return dict(layout.decode(sum(encoded[1:], start=encoded[0]), count).reply.tensors)
