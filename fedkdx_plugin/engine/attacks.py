"""Simulated attacks: some clients send false replies of the right form, for comparisons of how methods stand them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.participation import ATTACKERS, UNSEEN, draw
from fedkdx_plugin.engine.randomness import generator
from registry import contract
from registry.errors import UserError
from registry.interface import Message, Server, float_state

State = dict[str, Tensor]

NONE, LABEL_FLIP, GAUSSIAN, LITTLE = "none", "label-flip", "gaussian", "little-is-enough"
STRENGTHS = {"sign-flip": 1.0, "scaling": 10.0, GAUSSIAN: 10.0, LITTLE: 1.5}  # by default, where it means anything
KINDS = (NONE, "sign-flip", "scaling", LABEL_FLIP, GAUSSIAN, LITTLE)


@dataclass(frozen=True)
class Attack:
    """Attack by some of the clients, the same ones for every algorithm.

    Attributes:
        kind: one of `KINDS` (`--attack`); with 'none', the attackers are honest, but not measured either.
        share: share of the clients that attack (`--attackers`).
        strength: strength of the attack (`--attack-strength`); None: that of `STRENGTHS`.
    """

    kind: str = NONE
    share: float = 0.0
    strength: float | None = None

    def check(self) -> None:
        """Raise UserError where the options do not go together."""
        if self.kind != NONE and not self.share:
            raise UserError(
                f"--attack {self.kind}: nobody attacks; add a share of the clients, such as --attackers 0.2"
            )
        if self.strength is not None and self.kind not in STRENGTHS:
            raise UserError(f"--attack-strength: --attack {self.kind} has no strength; leave it out")

    @property
    def factor(self) -> float:
        """Strength of the attack."""
        return STRENGTHS[self.kind] if self.strength is None else self.strength

    def group(self, clients: int, groups: Mapping[str, Sequence[int]], seed: int) -> dict[str, list[int]]:
        """Return 'attackers' -> ascending ids, drawn from the clients that are not unseen; {} if nobody attacks.

        Raises:
            UserError: no honest client would be left.
        """
        if not self.share:
            return {}
        seen = [id for id in range(clients) if id not in groups.get(UNSEEN, ())]
        count = max(1, round(self.share * len(seen)))
        if count >= len(seen):
            raise UserError(f"--attackers {self.share:g}: of {len(seen)} clients, one at least must be honest")
        return {ATTACKERS: draw(seen, count, seed, ATTACKERS)}

    def on_data(self, data: DeviceData, attackers: Collection[int], classes: int) -> DeviceData:
        """Return the data without the attackers' test windows and, for label flip, with their training labels flipped.

        Class c becomes classes - 1 - c (Fang et al. 2020, arXiv:1911.11815).
        """
        if self.kind == LABEL_FLIP:
            flipped = [classes - 1 - y if id in attackers else y for id, y in enumerate(data.train_y)]
            data = replace(data, train_y=flipped)
        return data.without_tests(attackers) if attackers else data


class Attackers:
    """The clients of one federation that attack.

    They forge what is trained. Statistics of batch norm they send as they are: a negative variance would make every
    prediction NaN, and all other differences between methods vanish.

    Args:
        attack: the attack.
        ids: the clients that attack.
        seed: the run's seed.
        nets: the networks of the algorithm, by name.
    """

    def __init__(self, attack: Attack, ids: Sequence[int], seed: int, nets: Mapping[str, nn.Module]) -> None:
        self.attack, self.ids, self.seed = attack, frozenset(ids), seed
        trained = {f"{net}.{name}" for net, module in nets.items() for name, _ in module.named_parameters()}
        self.statistics = float_state(nets).keys() - trained

    def forge(
        self, server: Server, sent: Mapping[int, Message], replies: Mapping[int, Message], round: int
    ) -> dict[int, Message]:
        """Return what the attackers of a round send instead of their honest replies; {} if none of them forges.

        Args:
            server: knows what a reply does to it.
            sent: what each client was sent.
            replies: the honest replies of all clients.
            round: number of the round.
        """
        if self.attack.kind not in STRENGTHS:
            return {}
        honest = {id: reply for id, reply in sorted(replies.items()) if id in self.ids and reply.tensors}
        whole = {id: contract.contribution(server, id, reply) for id, reply in honest.items()}
        idle = {id: contract.idle(server, sent[id]) for id in honest}
        updates = {id: self._update(whole[id], idle[id]) for id in honest}
        forged = {}
        for id, update in self._false(updates, round).items():
            changed = {name: t + idle[id][name] if _fits(name, t, idle[id]) else t for name, t in update.items()}
            forged[id] = contract.forged(server, honest[id], {**whole[id], **changed})
        return forged

    def _update(self, whole: Mapping[str, Tensor], idle: Mapping[str, Tensor]) -> State:
        """Return the part of a contribution that is forged, less what the client would give back untrained."""
        names = (name for name, t in whole.items() if t.is_floating_point() and name not in self.statistics)
        return {n: whole[n] - idle[n] if _fits(n, whole[n], idle) else whole[n] for n in names}

    def _false(self, updates: Mapping[int, State], round: int) -> dict[int, State]:
        """Return client -> false update, from the attackers' honest updates of a round."""
        factor = self.attack.factor
        if self.attack.kind == LITTLE:
            return dict.fromkeys(updates, little_is_enough(list(updates.values()), factor)) if updates else {}
        if self.attack.kind == GAUSSIAN:
            return {id: gaussian(own, factor, generator(self.seed, "attack", round, id)) for id, own in updates.items()}
        sign = -factor if self.attack.kind == "sign-flip" else factor
        return {id: {name: sign * t for name, t in own.items()} for id, own in updates.items()}


def gaussian(update: Mapping[str, Tensor], factor: float, rng: torch.Generator) -> State:
    """Return normal noise in place of an update, in each tensor of `factor` times its root mean square."""
    result = {}
    for name in sorted(update):  # the order of a message's tensors may differ after a restart
        tensor = update[name]
        drawn = torch.randn(tensor.shape, generator=rng, dtype=tensor.dtype).to(tensor.device)
        result[name] = factor * tensor.square().mean().sqrt() * drawn if tensor.numel() else tensor
    return result


def little_is_enough(updates: Sequence[Mapping[str, Tensor]], z: float) -> State:
    """Return μ - z·σ of each coordinate over the updates that the attackers see, their own (Baruch et al. 2019).

    With a single attacker σ is 0, and it sends its honest update.
    """
    result = {}
    for name in updates[0]:
        rows = torch.stack([update[name] for update in updates])
        result[name] = rows.mean(0) - z * rows.std(0, correction=0)
    return result


def _fits(name: str, tensor: Tensor, idle: Mapping[str, Tensor]) -> bool:
    return name in idle and idle[name].shape == tensor.shape
