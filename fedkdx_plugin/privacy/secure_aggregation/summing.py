"""The server's side of secure aggregation: four steps, after which it knows the mean of all replies and no reply."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NoReturn, TypeVar

import numpy as np
import torch

from fedkdx_plugin.privacy.secure_aggregation import shamir
from fedkdx_plugin.privacy.secure_aggregation.fixed_point import COUNTS, RANGE, Layout, Mean
from fedkdx_plugin.privacy.secure_aggregation.masks import (
    KEY_BYTES,
    KeyPair,
    Mask,
    Values,
    check_public,
    digest,
    mask_key,
)
from fedkdx_plugin.privacy.secure_aggregation.messages import (
    BOX_BYTES,
    FEWEST,
    MASK,
    SHARE,
    UNMASK,
    check_only,
    clients_of,
    of_bytes,
    rows_of,
    tensor_of,
    threshold,
)
from fedkdx_plugin.privacy.secure_aggregation.party import pair_purpose, point
from registry.messages import BadMessage, Message

T = TypeVar("T")
# asks clients to take a step: client -> its answer, or why there is none
Ask = Callable[[str, Mapping[int, Message]], Mapping[int, "Message | str"]]


class Undone(Exception):
    """There is no sum; the text says why."""


@dataclass(frozen=True)
class Offer:
    """A client's public keys, for boxes and for masks, and the layout of its reply."""

    for_boxes: bytes
    for_masks: bytes
    layout: Layout

    @staticmethod
    def read(message: Message) -> Offer:
        """Read a client's offer. Raises BadMessage."""
        check_only(message, ["public"], ["layout"])
        keys = rows_of(message, "public", 2, KEY_BYTES)
        try:
            for key in keys:
                check_public(key)
        except ValueError:
            raise BadMessage("its public keys are none") from None
        return Offer(keys[0], keys[1], Layout.from_meta(message.meta.get("layout")))


@dataclass(frozen=True)
class Dealt:
    """Deal of a client: its boxes by receiver, digests of its two shares by receiver, and the digest of b_u."""

    boxes: Mapping[int, bytes]
    digests: Mapping[int, tuple[bytes, bytes]]
    seed: bytes


@dataclass
class Outcome:
    """Knowledge of a server after the last step.

    Attributes:
        mean: the mean of the replies in the sum; None where there is no sum.
        clients: whose replies these are.
        dropped: client -> why its reply is not in the sum.
        undone: why there is no sum; '' where there is one.
        notes: what else is to be said: values that were clipped, clients that others accuse, or that went away late.
    """

    mean: Mean | None = None
    clients: list[int] = field(default_factory=list)
    dropped: dict[int, str] = field(default_factory=dict)
    undone: str = ""
    notes: list[str] = field(default_factory=list)


class Summing:
    """One round of secure aggregation at the server.

    Args:
        context: names run and round, as at the clients.
        ask: carries a step's requests to the clients and their answers back.
        check: raises one of `refusals` for a reply, of zeros, whose form is wrong.
        least: fewest replies that may be in a sum.
        refusals: what `check` may raise of a reply.
    """

    def __init__(
        self,
        context: str,
        ask: Ask,
        check: Callable[[int, Message], None],
        least: int = FEWEST,
        refusals: tuple[type[Exception], ...] = (BadMessage,),
    ) -> None:
        self.context, self.ask, self.check = context, ask, check
        self.refusals: tuple[type[Exception], ...] = (BadMessage, *refusals)
        self.least = max(least, FEWEST)
        self.outcome = Outcome()
        self._weights: dict[tuple[int, ...], dict[int, int]] = {}

    def run(self, offers: Mapping[int, Message]) -> Outcome:
        """Take all steps.

        Args:
            offers: `Party.offer` of each client that has trained.
        """
        try:
            self._sum(offers)
        except Undone as error:
            self.outcome.undone, self.outcome.clients = str(error), []
        return self.outcome

    def _sum(self, offers: Mapping[int, Message]) -> None:
        self._accept(offers)
        self.threshold = threshold(len(self.offers))
        self.needed = max(self.threshold, self.least)
        if len(self.offers) < self.needed:
            raise Undone(f"{len(self.offers)} of {len(offers)} clients have something to add; {self.needed} are needed")
        dealt = self._deal()
        total = self._collect(dealt)
        self._unmask(total, dealt)

    def _accept(self, offers: Mapping[int, Message]) -> None:
        """Find U1: the clients whose offers are right, whose replies have one form, and whose keys are their own."""
        self.offers: dict[int, Offer] = {}
        self.needed = self.least
        known: set[bytes] = set()
        for id, message in sorted(offers.items()):
            try:
                offer = Offer.read(message)
                self.check(id, offer.layout.zeros())
            except self.refusals as error:
                self.outcome.dropped[id] = str(error)
                continue
            keys = {offer.for_boxes, offer.for_masks}
            if len(keys) < 2 or keys & known:
                self.outcome.dropped[id] = "its public keys are those of another, or twice the same"
                continue
            known |= keys
            self.offers[id] = offer
        layouts = [offer.layout for offer in self.offers.values()]
        for id, offer in list(self.offers.items()):
            if offer.layout != (common := max(layouts, key=layouts.count)):
                self.outcome.dropped[id] = f"its reply has other tensors than most ({len(offer.layout.tensors)} "
                self.outcome.dropped[id] += f"of {offer.layout.size} values, not {common.size})"
                del self.offers[id]
        self.layout = max(layouts, key=layouts.count, default=Layout(()))

    def _deal(self) -> dict[int, Dealt]:
        """Find U2: the clients that dealt shares of their masks."""
        clients = list(self.offers)
        count = len(clients)
        public = [key for offer in self.offers.values() for key in (offer.for_boxes, offer.for_masks)]
        request = Message({"public": of_bytes(public, count, 2, KEY_BYTES)}, {"clients": clients})

        def read(id: int, answer: Message) -> Dealt:
            check_only(answer, ["boxes", "digests", "seed"])
            others = [other for other in clients if other != id]
            boxes = rows_of(answer, "boxes", count - 1, BOX_BYTES)
            digests = rows_of(answer, "digests", count, 2, KEY_BYTES)
            pairs = zip(digests[::2], digests[1::2], strict=True)
            (seed,) = rows_of(answer, "seed", KEY_BYTES)
            return Dealt(dict(zip(others, boxes, strict=True)), dict(zip(clients, pairs, strict=True)), seed)

        return self._step(SHARE, dict.fromkeys(clients, request), read)

    def _collect(self, dealt: Mapping[int, Dealt]) -> Values:
        """Find U3, the clients whose masked values arrived; return the sum of these, still masked."""
        clients = list(dealt)
        size = self.layout.size + COUNTS
        self.accused: dict[int, list[int]] = {}

        def request(id: int) -> Message:
            others = [other for other in clients if other != id]
            boxes = [dealt[other].boxes[id] for other in others]
            digests = [own for other in others for own in dealt[other].digests[id]]
            tensors = {
                "boxes": of_bytes(boxes, len(others), BOX_BYTES),
                "digests": of_bytes(digests, len(others), 2, KEY_BYTES),
            }
            return Message(tensors, {"clients": clients})

        def read(id: int, answer: Message) -> Values:
            check_only(answer, ["masked"], ["unreadable"])
            masked = tensor_of(answer, "masked", torch.int64, size)
            self.accused[id] = clients_of(answer, "unreadable")
            return masked.cpu().contiguous().numpy().view(np.uint64)

        masked = self._step(MASK, {id: request(id) for id in clients}, read)
        for id in masked:
            if self.accused[id]:
                who = ", ".join(map(str, self.accused[id]))
                self.outcome.notes.append(f"client {id} cannot read the shares dealt to it by client {who}")
        self.outcome.clients = list(masked)
        total = np.zeros(size, dtype=np.uint64)
        for values in masked.values():
            total += values
        return total

    def _unmask(self, total: Values, dealt: Mapping[int, Dealt]) -> None:
        """Take away the masks of all in U3, and what masks shared with those who are gone left; read the mean."""
        second, third = list(dealt), self.outcome.clients
        request = Message({}, {"clients": third})
        kind = {id: 0 if id in third else 1 for id in second}

        def read(id: int, answer: Message) -> dict[int, bytes]:
            check_only(answer, ["shares"])
            shares = dict(zip(second, rows_of(answer, "shares", len(second), shamir.SHARE_BYTES), strict=True))
            own = {dealer: share for dealer, share in shares.items() if dealer not in self.accused[id]}
            for dealer, share in own.items():
                if digest(share) != dealt[dealer].digests[id][kind[dealer]]:
                    raise BadMessage(f"its share of client {dealer}'s mask is false")
            return own

        before, self.needed = dict(self.outcome.dropped), self.threshold
        given = self._step(UNMASK, dict.fromkeys(third, request), read)
        late = {id: reason for id, reason in self.outcome.dropped.items() if id not in before}
        self.outcome.dropped = before  # their values are in the sum
        self.outcome.notes += [f"client {id}, whose values count: {reason}" for id, reason in sorted(late.items())]
        mask = Mask(total)
        secrets = {dealer: self._secret(dealer, given) for dealer in second}
        for id in third:
            if digest(secrets[id]) != dealt[id].seed:
                self._blame(id)
            mask.subtract(mask_key(secrets[id]))
        for gone in (id for id in second if id not in third):
            pair = KeyPair.of(secrets[gone])
            if pair.public != self.offers[gone].for_masks:
                self._blame(gone)
            for id in third:
                key = pair.agree(self.offers[id].for_masks, pair_purpose(self.context, id, gone))
                (mask.subtract if id > gone else mask.add)(key)
        self._read(total)

    def _read(self, total: Values) -> None:
        try:
            self.outcome.mean = self.layout.decode(total, len(self.offers))
        except BadMessage as error:
            raise Undone(f"{error}, so that one of the clients sent something else than its reply") from error
        if clipped := self.outcome.mean.clipped:
            self.outcome.notes.append(
                f"{clipped} of {len(self.outcome.clients)} x {self.layout.size} values were beyond ±{RANGE:.0f} and "
                "were clipped"
            )

    def _secret(self, dealer: int, given: Mapping[int, Mapping[int, bytes]]) -> bytes:
        """Return a secret out of the shares of the first clients that have one."""
        having = tuple(id for id, shares in given.items() if dealer in shares)[: self.threshold]
        if len(having) < self.threshold:
            self._blame(dealer)
        if having not in self._weights:  # once for the same clients, who are mostly the same for all secrets
            self._weights[having] = shamir.weights([point(id) for id in having])
        try:
            return shamir.combine({point(id): given[id][dealer] for id in having}, self._weights[having])
        except ValueError:
            self._blame(dealer)

    def _blame(self, dealer: int) -> NoReturn:
        reason = "the shares that it dealt do not give its mask"
        self.outcome.dropped[dealer] = reason
        raise Undone(f"client {dealer}: {reason}")

    def _step(self, step: str, requests: Mapping[int, Message], read: Callable[[int, Message], T]) -> dict[int, T]:
        """Ask clients to take a step; return what was read of their answers, in the order of ids. Raises Undone."""
        answers, found = self.ask(step, requests), {}
        for id in requests:
            answer = answers.get(id, "no answer")
            try:
                if isinstance(answer, str):
                    raise BadMessage(answer)
                found[id] = read(id, answer)
            except BadMessage as error:
                self.outcome.dropped[id] = str(error)
        if len(found) < self.needed:
            raise Undone(f"{len(found)} of {len(requests)} clients took step '{step}'; {self.needed} are needed")
        return found
