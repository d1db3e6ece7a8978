"""Check that one reply with the mean of all does to a server what all replies do, where it declares so."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor

from fedkdx_plugin.testing.case import AlgorithmCase, run
from fedkdx_plugin.testing.made import make_data
from fedkdx_plugin.testing.running import Checks, float64, require
from registry.aggregation import sample_weights, weighted_sum
from registry.interface import Message, Round

CHECKS = Checks()
SIZES = (12, 7, 20, 9)
ROUNDS = 3  # what a server remembers of its clients shows up in the later ones
CLOSE = 1e-9  # relative to the largest value of a tensor, in float64


@CHECKS
def check_sums(case: AlgorithmCase) -> None:
    """Require of an algorithm with `sums` that its server is as well off with the mean of all replies."""
    if case.algorithm.sums:
        reason = why_no_sum(case)
        require(not reason, f"declares `sums`, but {reason}: declare False")


def why_no_sum(case: AlgorithmCase) -> str:
    """Return what the server does not do alike with one reply that holds the mean of all; '' where it does."""
    if case.algorithm.pools_data:
        return "all data are pooled"
    with float64():
        federation = case.federation(make_data(SIZES), rounds=ROUNDS, join_ratio=0.75, local_epochs=1)
        server, found = federation.server, list[str]()
        other, aggregate = copy.deepcopy(server), server.aggregate

        def both(replies: Mapping[int, Message], round: Round) -> None:
            try:
                mean = mean_of(replies)
                other.check_reply(next(iter(mean)), mean[next(iter(mean))])
                other.aggregate(mean, round)
            except Exception as error:  # of a server that is not made for it
                found.append(f"{type(error).__name__}: {error}")
            aggregate(replies, round)
            clients = range(len(SIZES))
            following = Round(round.index + 1, ROUNDS + 1)
            pairs = [("its state", server.save(), other.save())]
            sent, others = (each.messages(clients, following) for each in (server, other))
            pairs += [(f"its message to client {id}", sent[id], others[id]) for id in clients]
            found.extend(f"round {round.index}: {what}: {why}" for what, *two in pairs if (why := _differ(*two)))

        server.aggregate = both  # type: ignore[method-assign]
        run(federation)
    return found[0] if found else ""


def mean_of(replies: Mapping[int, Message]) -> dict[int, Message]:
    """Return one reply with the mean of all, as secure aggregation makes it. Raises ValueError: it cannot."""
    others = {name for reply in replies.values() for name in reply.meta if name != "samples"}
    kinds = {tensor.is_floating_point() for reply in replies.values() for tensor in reply.tensors.values()}
    shapes = {tuple((name, own.shape) for name, own in reply.tensors.items()) for reply in replies.values()}
    if others or kinds - {True} or len(shapes) > 1:
        raise ValueError("replies hold more than tensors of floating point of one form, and `samples`")
    total = sum(reply.meta["samples"] for reply in replies.values())
    mean = weighted_sum([reply.tensors for reply in replies.values()], sample_weights(replies))
    return {next(iter(replies)): Message(mean, {"samples": total})}


def _differ(one: Message, other: Message) -> str:
    """Return the first difference beyond rounding; '' if there is none."""
    if one.meta != other.meta:
        return f"metadata {one.meta} and {other.meta}"
    if one.tensors.keys() != other.tensors.keys():
        return "tensors of other names"
    return next((f"'{name}' differs" for name, own in one.tensors.items() if not _close(own, other.tensors[name])), "")


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or not one.numel():
        return one.shape == other.shape
    scale = max(1.0, float(one.double().abs().max()))
    return bool(torch.allclose(one.double(), other.double(), rtol=0, atol=CLOSE * scale))
