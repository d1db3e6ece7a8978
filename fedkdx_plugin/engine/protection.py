"""Client-level differential privacy of a federation: who is drawn, what that protects, and replies with noise."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch

from fedkdx_plugin.engine.backends.base import Trained
from fedkdx_plugin.engine.randomness import count_selected
from fedkdx_plugin.privacy.accounting import FIXED, Sampling
from fedkdx_plugin.privacy.client import Plan, Protection
from fedkdx_plugin.privacy.noise import Noise
from fedkdx_plugin.privacy.options import CLIENT, Privacy
from registry.errors import UserError
from registry.interface import UNSTATED, Message, NonFinite, Server, beyond_average

SCALED = (
    "--scale federated: not with --dp client: clients send means and variances of their windows once, without noise; "
    "use --scale client or none"
)


def sampling_of(kind: str, clients: int, join_ratio: float) -> Sampling:
    """Return how a round's clients are drawn.

    Args:
        kind: 'fixed' or 'poisson'.
        clients: those that can be selected.
        join_ratio: share, or probability, of being selected.
    """
    return Sampling(clients, count_selected(clients, join_ratio) if kind == FIXED else join_ratio * clients, kind)


def protection(
    privacy: Privacy, server: type[Server], sampling: Sampling, rounds: int, source: Noise
) -> Protection | None:
    """Return what keeps a federation private on the level of clients; None where that is not asked for.

    Raises:
        UserError: the algorithm is not covered, δ is too large, or ε too small.
    """
    if privacy.level != CLIENT:
        return None
    if reason := uncovered(server):
        raise UserError(f"--dp client: not with {server.__name__}, {reason}")
    return Protection(privacy, Plan.of(privacy, sampling, rounds), source)


def shares_missing(protection: Protection | None, replied: int) -> list[str]:
    """Return why a round does not count where clients add the noise and not all of them replied; [] where it counts."""
    planned = protection.plan.sampling.selected if protection and protection.distributed else replied
    if replied == planned:
        return []
    return [
        f"the round does not count, as {replied} of {planned} clients replied, and without the others' shares there is "
        "too little noise (--dp-noise distributed)"
    ]


def fewest(protection: Protection | None, least: int) -> int:
    """Return of how many replies at least the server may learn the sum: all that bring noise, else `least`."""
    if protection and protection.distributed:
        return max(least, math.ceil(protection.plan.sampling.selected))
    return least


def uncovered(server: type[Server]) -> str:
    """Return why client-level privacy cannot be had with an algorithm; '' where it can."""
    if server.pools_data:
        return "which uploads all windows"
    if not server.averages:
        return "which does not average what its clients send"
    beyond = beyond_average(server)
    if beyond == UNSTATED:
        return "whose author has not stated what of the clients' replies reaches the server beside their mean"
    return f"whose clients' {beyond} would reach the server without noise" if beyond else ""


def replies_with_states(server: type[Server]) -> bool:
    """Return whether replies are states that clients can noise, and not something made of them, such as factors."""
    return not any(getattr(server, name) is not getattr(Server, name) for name in ("contribution", "idle", "forged"))


def noised(
    protection: Protection, results: Mapping[int, Trained | NonFinite], sent: Mapping[int, Message]
) -> dict[int, Trained | NonFinite]:
    """Return the results of clients that clip their updates and add their shares of the noise before they send them.

    A client whose training was not finite sends noise alone, so that nobody learns of it.

    Args:
        results: of the round's clients.
        sent: what they were sent.
    """
    return {
        id: Trained(private_reply(protection, id, sent[id], None), torch.tensor(torch.nan))
        if isinstance(result, NonFinite)
        else replace(result, reply=private_reply(protection, id, sent[id], result.reply))
        for id, result in results.items()
    }


def private_reply(protection: Protection, client: int, sent: Message, reply: Message | None) -> Message:
    """Return a reply of states whose difference to what was sent is clipped, and has the client's share of the noise.

    Its `samples` is 1, as that of all others: the mean has equal weights, also where the server knows it alone.

    Args:
        reply: the honest reply; None: the client has none, and changes nothing.
    """
    reply = reply or Message(sent.tensors, {})
    update = {name: t.double() - sent.tensors[name].double() for name, t in reply.tensors.items()}
    private = protection.noised(update, client)
    return Message(
        {n: (sent.tensors[n].double() + t).to(sent.tensors[n].dtype) for n, t in private.items()},
        {**reply.meta, "samples": 1},
    )
