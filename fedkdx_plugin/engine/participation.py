"""Availability of clients for selection: unseen clients never take part, others join late or are rarely reached."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedkdx_plugin.engine.randomness import derive, uniform
from registry.errors import UserError

UNSEEN, LATE, RARE = "unseen", "late", "rare"
ATTACKERS = "attackers"  # see `attacks`


@dataclass(frozen=True)
class Participation:
    """Restrictions of which clients can be selected; by default none.

    Attributes:
        unseen: clients that are never selected: their number, or a share below 1.
        late: share of the other clients that can be selected only from a round on, and that round.
        rare: share of the other clients that is reached in a round only with a probability, and that probability.
    """

    unseen: float = 0.0
    late: tuple[float, int] | None = None
    rare: tuple[float, float] | None = None

    @staticmethod
    def parse(unseen: float, late: str | None, rare: str | None, rounds: int) -> Participation:
        """Parse `--unseen`, `--late SHARE@ROUND` and `--rare SHARE@PROBABILITY`. Raises UserError."""
        if unseen > 1 and unseen != int(unseen):
            raise UserError(f"--unseen {unseen:g}: neither a whole number of clients nor a share below 1")
        joins = _pair("--late", late, "SHARE@ROUND, such as 0.3@50")
        if joins and (joins[1] != int(joins[1]) or not 2 <= joins[1] <= rounds):
            raise UserError(f"--late {late}: the round must be a whole number from 2 to {rounds}, the last round")
        reached = _pair("--rare", rare, "SHARE@PROBABILITY, such as 0.3@0.1")
        if reached and not 0 < reached[1] < 1:
            raise UserError(f"--rare {rare}: the probability must be between 0 and 1, both excluded")
        return Participation(unseen, joins and (joins[0], int(joins[1])), reached)

    def groups(self, clients: int, seed: int) -> dict[str, list[int]]:
        """Return group name -> ascending ids of its clients: the same for every algorithm.

        Late and rare clients are drawn independently, so that a client may be both.

        Raises:
            UserError: no client would be left to train.
        """
        groups: dict[str, list[int]] = {}
        if self.unseen:
            count = int(self.unseen) if self.unseen >= 1 else max(1, round(self.unseen * clients))
            if count >= clients:
                raise UserError(f"--unseen {self.unseen:g}: of {clients} clients, one at least must train")
            groups[UNSEEN] = draw(range(clients), count, seed, UNSEEN)
        seen = [id for id in range(clients) if id not in groups.get(UNSEEN, ())]
        for name, option in ((LATE, self.late), (RARE, self.rare)):
            if option:
                groups[name] = draw(seen, max(1, round(option[0] * len(seen))), seed, name)
        if self.late and len(groups[LATE]) == len(seen):
            share, joins = self.late
            raise UserError(f"--late {share:g}@{joins}: all {len(seen)} clients would be late; lower the share")
        return groups

    def reachable(self, groups: Mapping[str, list[int]], clients: int, round: int, seed: int) -> list[int]:
        """Return the ascending ids of the clients that can be selected in a round: the same for every algorithm."""
        away = set(groups.get(UNSEEN, ()))
        if self.late and round < self.late[1]:
            away.update(groups[LATE])
        if self.rare:
            away.update(id for id in groups[RARE] if uniform(seed, RARE, round, id) >= self.rare[1])
        return [id for id in range(clients) if id not in away]


def measured(groups: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """Return the groups whose clients are measured among all others: not unseen clients, nor attackers."""
    return {name: ids for name, ids in groups.items() if name not in (UNSEEN, ATTACKERS)}


def draw(ids: Iterable[int], count: int, seed: int, name: str) -> list[int]:
    """Draw the clients of a group, ascending."""
    rng = np.random.default_rng(derive(seed, "group", name))
    return sorted(int(id) for id in rng.choice(list(ids), size=count, replace=False))


def _pair(flag: str, text: str | None, form: str) -> tuple[float, float] | None:
    """Parse SHARE@VALUE as two numbers, the first of which is a share in (0, 1]."""
    if text is None:
        return None
    try:
        share, value = map(float, text.split("@"))
    except ValueError:
        raise UserError(f"{flag} {text}: write {form}") from None
    if not 0 < share <= 1:
        raise UserError(f"{flag} {text}: the share must be above 0 and at most 1")
    return share, value
