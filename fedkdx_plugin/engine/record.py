"""Record of a round, and who is told of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedkdx_plugin.engine.metrics import Metrics
from registry.interface import Round


@dataclass(frozen=True)
class RoundRecord:
    """Record of one round.

    Attributes:
        round: index of the round, from 1.
        selected: ids of the selected clients.
        rejected: id -> reason, for clients whose update was dropped.
        lost: id -> 'dropout' or 'straggler', for clients whose reply never arrived (see `Faults`).
        train_loss: mean over the honest clients that trained, weighted by samples; NaN if none did.
        bytes_up, bytes_down: serialised bytes of all clients together.
        seconds: 'train', 'aggregate' and 'evaluate' -> wall time.
        metrics: result of `evaluation.Evaluator`; empty in rounds without evaluation.
        server: result of `Server.figures` without NaN; empty in rounds without aggregation. With client-level privacy,
            in every round, also those of `privacy.client.Protection.figures`, with example-level privacy those of
            `budget.Budget.figures`.
        notes: what the server had to say about its means (see `registry.aggregation.Average` and `SecureSums`); not
            kept on disk.
    """

    round: int
    selected: list[int]
    rejected: dict[int, str]
    train_loss: float
    bytes_up: int
    bytes_down: int
    seconds: dict[str, float]
    metrics: dict[str, Metrics] = field(default_factory=dict)
    lost: dict[int, str] = field(default_factory=dict)
    server: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Observer:
    """Is told of the rounds of one federation; by default does nothing."""

    def on_round_start(self, round: Round) -> None:
        """Take note of a round that begins."""

    def on_round_end(self, record: RoundRecord) -> None:
        """Take note of a round that is done."""
