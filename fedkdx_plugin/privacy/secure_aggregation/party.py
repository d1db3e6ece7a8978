"""A client's side of secure aggregation: one round, one reply, one answer to each step."""

from __future__ import annotations

import secrets

import torch

from fedkdx_plugin.privacy.secure_aggregation import shamir
from fedkdx_plugin.privacy.secure_aggregation.fixed_point import MOST_WEIGHT, Layout
from fedkdx_plugin.privacy.secure_aggregation.masks import KEY_BYTES, KeyPair, Mask, digest, mask_key, seal, unseal
from fedkdx_plugin.privacy.secure_aggregation.messages import (
    BOX_BYTES,
    FEWEST,
    MASK,
    SHARE,
    STEPS,
    UNMASK,
    check_only,
    clients_of,
    of_bytes,
    rows_of,
    threshold,
)
from registry.messages import BadMessage, Message
from registry.text import shown


def pair_purpose(context: str, one: int, other: int) -> bytes:
    """Return what the key of a pair's mask is for, the same on both sides."""
    return f"fedkdx secure aggregation, mask, {context}, {min(one, other)}, {max(one, other)}".encode()


def box_purpose(context: str, sender: int, receiver: int) -> bytes:
    """Return what the key of a box is for."""
    return f"fedkdx secure aggregation, box, {context}, {sender} to {receiver}".encode()


def point(client: int) -> int:
    """Return the point at which a client's shares are taken; 0 is the secret's."""
    return client + 1


class Party:
    """A client in one round. What it holds is in memory alone, and is of no use after the round.

    Args:
        id: its number.
        reply: its reply: tensors to be averaged, and `samples`, its weight in the mean, and nothing else.
        context: names run and round; keys agreed on in another context are others.

    Attributes:
        clipped: how many of its values were clipped to fit in; None before they are masked.

    Raises:
        BadMessage: the reply holds what cannot be summed.
    """

    def __init__(self, id: int, reply: Message, context: str) -> None:
        if reply.meta.keys() != {"samples"}:
            raise BadMessage(f"its metadata {', '.join(sorted(reply.meta))} cannot be summed; 'samples' alone can")
        self.weight: int = reply.meta["samples"]
        if not 1 <= self.weight <= MOST_WEIGHT:
            raise BadMessage(f"it has {self.weight} samples; with secure aggregation at most {MOST_WEIGHT}")
        self.id, self.context, self.layout, self.tensors = id, context, Layout.of(reply), reply.tensors
        self.clipped: int | None = None
        self._for_boxes, self._for_masks = KeyPair.new(), KeyPair.new()  # the paper's c_u and s_u
        self._seed = secrets.token_bytes(KEY_BYTES)  # b_u
        self._waiting = list(STEPS)

    def offer(self) -> Message:
        """Return the public keys and the reply's layout."""
        public = of_bytes([self._for_boxes.public, self._for_masks.public], 2, KEY_BYTES)
        return Message({"public": public}, {"layout": self.layout.to_meta()})

    def answer(self, step: str, request: Message) -> Message:
        """Return the answer to a step. Each is answered once, in their order.

        Raises:
            BadMessage: the request is none that a server which follows the protocol sends.
        """
        if not self._waiting or step != self._waiting[0]:
            raise BadMessage(f"step {shown(repr(step))} is not what comes next")
        self._waiting.pop(0)
        return {SHARE: self._share, MASK: self._mask, UNMASK: self._unmask}[step](request)

    def _share(self, request: Message) -> Message:
        """Deal shares of b_u and of s_u's private key, a box for each other client of U1."""
        check_only(request, ["public"], ["clients"])
        clients = clients_of(request)
        self._check_present(clients, FEWEST)
        public = rows_of(request, "public", len(clients), 2, KEY_BYTES)
        if len(set(public)) < len(public):
            raise BadMessage("two of the public keys are the same")
        self._first, self._needed = clients, threshold(len(clients))
        self._public = dict(zip(clients, zip(public[::2], public[1::2], strict=True), strict=True))
        points = [point(id) for id in clients]
        of_seed = shamir.split(self._seed, self._needed, points)
        of_key = shamir.split(self._for_masks.private, self._needed, points)
        dealt = {id: (of_seed[point(id)], of_key[point(id)]) for id in clients}
        self._held = {self.id: dealt[self.id]}
        boxes = [seal(self._box_key(self.id, id), b"".join(dealt[id]), b"") for id in clients if id != self.id]
        digests = [digest(share) for id in clients for share in dealt[id]]
        tensors = {
            "boxes": of_bytes(boxes, len(boxes), BOX_BYTES),
            "digests": of_bytes(digests, len(clients), 2, KEY_BYTES),
            "seed": of_bytes([digest(self._seed)], KEY_BYTES),
        }
        return Message(tensors)

    def _mask(self, request: Message) -> Message:
        """Open the boxes of U2, and mask the values: y_u = x_u + PRG(b_u) + Σ ± PRG(s_uv)."""
        check_only(request, ["boxes", "digests"], ["clients"])
        clients = clients_of(request)
        self._check_present(clients, self._needed)
        if not set(clients) <= set(self._first):
            raise BadMessage("it names clients that dealt no shares")
        self._second = clients
        others = [id for id in clients if id != self.id]
        boxes = rows_of(request, "boxes", len(others), BOX_BYTES)
        digests = rows_of(request, "digests", len(others), 2, KEY_BYTES)
        for place, id in enumerate(others):
            if shares := self._opened(id, boxes[place], digests[2 * place : 2 * place + 2]):
                self._held[id] = shares
        values, self.clipped = self.layout.encode(self.tensors, self.weight, len(self._first))
        mask = Mask(values)
        mask.add(mask_key(self._seed))
        for id in others:
            key = self._agreed(self._for_masks, id, pair_purpose(self.context, self.id, id))
            (mask.add if self.id > id else mask.subtract)(key)
        unreadable = [id for id in others if id not in self._held]
        return Message({"masked": torch.from_numpy(values.view("i8"))}, {"unreadable": unreadable})

    def _unmask(self, request: Message) -> Message:
        """Give the shares of b_u for those whose values arrived, of their keys for those who are gone: never both."""
        check_only(request, [], ["clients"])
        clients = clients_of(request)
        self._check_present(clients, self._needed)
        if not set(clients) <= set(self._second):
            raise BadMessage("it names clients that sent no masked values")
        nothing = (bytes(shamir.SHARE_BYTES),) * 2
        shares = [self._held.get(id, nothing)[0 if id in clients else 1] for id in self._second]
        return Message({"shares": of_bytes(shares, len(shares), shamir.SHARE_BYTES)})

    def _box_key(self, sender: int, receiver: int) -> bytes:
        other = receiver if sender == self.id else sender
        return self._agreed(self._for_boxes, other, box_purpose(self.context, sender, receiver))

    def _agreed(self, own: KeyPair, other: int, purpose: bytes) -> bytes:
        """Return the key in common with another client. Raises BadMessage: its public key is none."""
        for_boxes, for_masks = self._public[other]
        try:
            return own.agree(for_boxes if own is self._for_boxes else for_masks, purpose)
        except ValueError:
            raise BadMessage(f"client {other}'s public keys are none") from None

    def _opened(self, sender: int, box: bytes, digests: list[bytes]) -> tuple[bytes, bytes] | None:
        """Return a client's two shares for this one; None where the box holds none, or others than it is said to."""
        try:
            content = unseal(self._box_key(sender, self.id), box, b"")
        except ValueError:
            return None
        shares = content[: shamir.SHARE_BYTES], content[shamir.SHARE_BYTES :]
        return shares if list(map(digest, shares)) == digests else None

    def _check_present(self, clients: list[int], least: int) -> None:
        if self.id not in clients or len(clients) < least:
            raise BadMessage(f"{len(clients)} clients, with or without this one; at least {least}, with it, are right")
