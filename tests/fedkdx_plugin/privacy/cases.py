"""Federations under client-level privacy, for its tests."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.privacy.noise import Noise
from fedkdx_plugin.privacy.options import CLIENT, Privacy
from registry.interface import BadMessage, Message, Round, Server
from tests.conftest import make_data, make_federation, make_task

SIZES = (12, 7, 20, 9, 15)
BUDGET = Privacy(CLIENT, 8.0, 1e-2, 0.5)


class NoNoise(Noise):
    """Noise of 0: what the mechanism does beside it."""

    def normal(self, shape: torch.Size, *purpose: int | str) -> Tensor:
        """Return zeros."""
        return torch.zeros(shape, dtype=torch.float64)


def private(algorithm: type[Server], privacy: Privacy = BUDGET, **settings: Any) -> Federation:
    """Return a federation of five clients with group norm, all of which take part unless told otherwise."""
    task = replace(make_task(), norm="group")
    settings = {"join_ratio": 1, "local_epochs": 1, "rounds": 4, "backend": "sequential", **settings}
    return make_federation(algorithm, make_data(SIZES), task, privacy=privacy, **settings)


def replies_of(federation: Federation, round: Round, ids: Sequence[int] = range(len(SIZES))) -> dict[int, Message]:
    """Return the honest replies of these clients in a round, as the server accepts them."""
    sent = federation.server.messages(list(ids), round)
    results = federation.backend.train(sent, round)
    replies, rejected = federation._collect(results, round)
    assert not rejected
    return replies


def lie(server: Server, client: int, reply: Message, kind: str, seed: int = 0) -> Message | None:
    """Return another reply that the server accepts: huge, tiny or of another number of samples; None for no reply."""
    rng = torch.Generator().manual_seed(seed)
    if kind == "nothing":
        return None
    size = {"huge": 1e30, "usual": 1.0, "opposite": 1e3}[kind]
    whole = server.contribution(client, reply)
    false = {name: size * torch.randn(t.shape, generator=rng, dtype=t.dtype) for name, t in whole.items()}
    forged = server.forged(reply, false)
    meta = {**forged.meta, "samples": 10**9} | ({"rate": 3.0} if "rate" in forged.meta else {})
    meta |= {"steps": 10**6} if "steps" in forged.meta else {}
    meta |= {"cluster": 1 - forged.meta["cluster"]} if "cluster" in forged.meta else {}
    forged = Message(forged.tensors, meta)
    try:
        server.check_reply(client, forged)
    except BadMessage:
        return None
    return forged


class Overheard(Exception):
    """The server took no mean, or more than one."""


def after(server: Server, replies: Mapping[int, Message], round: Round, mean: Mapping[str, Tensor] | None = None):
    """Let a copy of a server take in replies, and return it with the mean that it took.

    Args:
        mean: what its mean is to be, whatever the replies are; None: what they give.
    """
    own = copy.deepcopy(server)
    protection, taken = own.average.protection, []
    protection.begin(round.index)
    protection.source = NoNoise()
    release = protection.release

    def listen(updates, like):
        result = release(updates, like)
        taken.append(mean or result)
        return taken[-1]

    protection.release = listen
    own.aggregate(replies, round)
    if len(taken) != 1:
        raise Overheard
    return own, taken[0]
