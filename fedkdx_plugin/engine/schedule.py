"""Schedule of a federation: its rounds, and who takes part in them."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedkdx_plugin.engine.participation import Participation
from fedkdx_plugin.privacy.accounting import FIXED


@dataclass(frozen=True)
class Schedule:
    """Number of rounds, selection of clients, and times of evaluation.

    Attributes:
        rounds: number of communication rounds.
        join_ratio: share of the available clients that is selected in a round.
        eval_gap: number of rounds between evaluations; the last round is always evaluated.
        participation: restrictions of which clients are available in a round.
        outliers: replies are set aside whose norm is more than so many times the usual one; 0: none. None: 0 in one
            process, whose clients are honest (see `flower.coordinator`).
        sampling: one of `accounting.SAMPLINGS`; with 'poisson', each client is selected with a probability of
            `join_ratio`, so that a round may have none.
        secure: whether the server learns the replies' mean alone (`--secure-aggregation`, see `secure_sums`).
    """

    rounds: int
    join_ratio: float = 0.4
    eval_gap: int = 1
    participation: Participation = field(default_factory=Participation)
    outliers: float | None = None
    sampling: str = FIXED
    secure: bool = False
