"""Check that whatever one client sends reaches a server by its mean alone, where the algorithm declares so."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.privacy.accounting import Sampling
from fedkdx_plugin.privacy.client import Plan, Protection
from fedkdx_plugin.privacy.noise import Noise
from fedkdx_plugin.privacy.options import CLIENT, Privacy
from fedkdx_plugin.testing.case import AlgorithmCase
from fedkdx_plugin.testing.made import make_data
from fedkdx_plugin.testing.running import Checks, require
from registry.interface import BadMessage, Message, Round, Server, beyond_average

CHECKS = Checks()
SIZES = (12, 7, 20, 9, 15)
ROUNDS = 4
CLIP = 10.0  # far above honest updates, so that what stretches those of others shows
LIAR = 1  # takes part for the first time where it lies
FALSE = {"huge": 1e30, "usual": 1.0, "opposite": 1e3, "nothing": 0.0}  # kind of a lie -> size of its values


class NoNoise(Noise):
    """Noise of 0, to see what there is beside it."""

    def normal(self, shape: torch.Size, *purpose: int | str) -> Tensor:
        """Return zeros."""
        return torch.zeros(shape, dtype=torch.float64)


@CHECKS
def check_private_mean(case: AlgorithmCase) -> None:
    """Require of an algorithm without anything `beyond_average` that client-level privacy covers all it shares."""
    if case.algorithm.averages and not beyond_average(case.algorithm):
        reason = why_not_private(case)
        require(not reason, f"declares `beyond_average = ''`, but {reason}: name what that is instead")


def why_not_private(case: AlgorithmCase) -> str:
    """Return by what other ways than its mean a false reply reaches a server, or why the mean is no bound; else ''."""
    # averaged batch norm is refused with privacy: a variance that is no square has no meaning
    task = replace(case.task(), norm="batch" if case.algorithm.Client.local_bn else "group")
    federation = case.federation(make_data(SIZES), task, rounds=ROUNDS, join_ratio=1, local_epochs=1)
    server = federation.server
    privacy, plan = Privacy(CLIENT, clip=CLIP), Plan(Sampling(len(SIZES), len(SIZES)), ROUNDS, 0.0, 0.0)
    protection = Protection(privacy, plan, NoNoise())
    server.average = protection.average
    honest = [id for id in range(len(SIZES)) if id != LIAR]
    try:
        for index in (1, 2):
            replies, round = _honest(federation, honest, Round(index, ROUNDS)), Round(index, ROUNDS)
            protection.begin(index)
            server.aggregate(replies, round)
        round = Round(3, ROUNDS)
        replies = _honest(federation, sorted((LIAR, *honest[:-1])), round)  # somebody known is away
        return next(_found(server, replies, round), "")
    except (RuntimeError, KeyError) as error:  # of a mean that is taken twice, or whose `around` is not of its states
        return f"{type(error).__name__}: {error}"
    finally:
        federation.close()


def _honest(federation: Federation, ids: list[int], round: Round) -> dict[int, Message]:
    results = federation.backend.train(federation.server.messages(ids, round), round)
    replies, rejected = federation._collect(results, round)
    require(not rejected, f"honest replies are rejected: {rejected}")
    return replies


def _found(server: Server, replies: Mapping[int, Message], round: Round) -> Iterator[str]:
    """Yield what a lie does that it must not do."""
    before, mean = _after(server, replies, round)
    for kind in FALSE:
        false = _lie(server, replies[LIAR], kind)
        lied = {id: reply for id, reply in replies.items() if id != LIAR} | ({LIAR: false} if false else {})
        lied = dict(sorted(lied.items()))
        # what a server keeps of a client that sent nothing, such as what it holds, is for that client alone
        after, _ = _after(server, lied, round, mean)
        if what := _differ(before, after, Round(round.index + 1, ROUNDS), whole=bool(false)):
            yield f"a client's reply ({kind}) changes {what}, although the mean is the same"
        _, moved = _after(server, lied, round)
        far = float(torch.stack([(moved[name] - mean[name]).square().sum() for name in mean]).sum().sqrt())
        most = (2 if false else 1) * CLIP / len(SIZES)
        if far > most * (1 + 1e-9):
            yield f"a client's reply ({kind}) moves the mean by {far:.3g}, which is more than {most:.3g}"


def _lie(server: Server, reply: Message, kind: str) -> Message | None:
    """Return a false reply that the server accepts; None for no reply, or where it accepts none of this kind."""
    if kind == "nothing":
        return None
    rng = torch.Generator().manual_seed(0)
    whole = server.contribution(LIAR, reply)
    drawn = {name: FALSE[kind] * torch.randn(t.shape, generator=rng, dtype=t.dtype) for name, t in whole.items()}
    forged = server.forged(reply, drawn)
    meta = {name: _other(value) for name, value in forged.meta.items()}
    for own in (meta, dict(forged.meta)):  # a number that the server knows better, such as a cluster's, is left
        try:
            server.check_reply(LIAR, Message(forged.tensors, own))
        except BadMessage:
            continue
        return Message(forged.tensors, own)
    return None


def _other(value: Any) -> Any:
    """Return another number of the same type."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    return 1 if value == 0 else 1000 * value


def _after(
    server: Server, replies: Mapping[int, Message], round: Round, mean: Mapping[str, Tensor] | None = None
) -> tuple[Server, Mapping[str, Tensor]]:
    """Let a copy of a server take in replies, and return it with the mean of updates that it was given.

    Args:
        mean: what it is given, whatever the replies are; None: what they give.

    Raises:
        RuntimeError: it takes no mean.
    """
    own = copy.deepcopy(server)
    protection: Protection = own.average.protection  # type: ignore[attr-defined]
    given: list[Mapping[str, Tensor]] = []
    release = protection.release

    def listen(updates: Iterable[dict[str, Tensor]], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given.append(release(updates, like))
        return dict(mean or given[-1])

    protection.release = listen  # type: ignore[method-assign]
    protection.begin(round.index)
    own.aggregate(replies, round)
    if not given:
        raise RuntimeError("it takes no mean by `self.average`")
    return own, given[-1]


def _differ(one: Server, other: Server, round: Round, whole: bool) -> str:
    """Return what of a server's messages, models or, if `whole`, of its state differs, bit by bit; '' if nothing does.

    What the liar is sent, and predicts with, does not count.
    """
    ids = list(range(len(SIZES)))
    sent, others = (each.messages(ids, round) for each in (one, other))
    pairs = [(f"the message to client {id}", sent[id], others[id]) for id in ids if id != LIAR]
    own, theirs = (Message(_without_liar(each.networks())) for each in (one, other))
    pairs.append(("the models to predict with", own, theirs))
    if whole:
        pairs.append(("its state", one.save(), other.save()))
        own, theirs = (Message({}, {"figures": repr(each.figures())}) for each in (one, other))
        pairs.append(("what it records", own, theirs))
    return next((what for what, a, b in pairs if not _same(a, b)), "")


def _without_liar(networks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: own for name, own in networks.items() if not name.startswith(f"{LIAR}/")}


def _same(one: Message, other: Message) -> bool:
    same = one.tensors.keys() == other.tensors.keys() and one.meta == other.meta
    return same and all(torch.equal(own, other.tensors[name]) for name, own in one.tensors.items())
