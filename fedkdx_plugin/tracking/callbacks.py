"""Callbacks: objects that are told what happens in runs while they go on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkdx_plugin.engine.metrics import Metrics
from fedkdx_plugin.engine.rounds import Observer, RoundRecord
from registry.interface import Round


@dataclass(frozen=True)
class RunInfo:
    """What is known of a run before its first round.

    Attributes:
        name: for people, unique among the runs that a callback sees.
        kind: runs of one kind take about as long: one algorithm in one setting, under any seed.
        folder: the run folder.
        settings: its resolved configuration; 'algorithm', 'seed' and 'global_rounds' are among its keys.
        done: rounds that an earlier, interrupted command has made.
    """

    name: str
    kind: str
    folder: Path
    settings: Mapping[str, Any]
    done: int = 0

    @property
    def rounds(self) -> int:
        """Number of rounds that the run is to have."""
        return int(self.settings["global_rounds"])


class Callback:
    """Base class: every method does nothing; override those of the events that matter.

    Events come in this order: `on_run_start`, then for each round `on_round_start`, `on_evaluation` (where the round is
    evaluated) and `on_round_end`, then `on_run_end`. Runs may go on side by side; `run` says which one an event is of.
    Between sites, the metrics of a round arrive with the next round, and with them its last two events.
    """

    def on_run_start(self, run: RunInfo) -> None:
        """Take note of a run that begins or goes on."""

    def on_round_start(self, run: RunInfo, round: Round) -> None:
        """Take note of a round that begins."""

    def on_evaluation(self, run: RunInfo, round: int, metrics: Mapping[str, Metrics]) -> None:
        """Take note of a round's metrics: view -> metrics (see `engine.evaluation`)."""

    def on_round_end(self, run: RunInfo, record: RoundRecord) -> None:
        """Take note of a round that is done."""

    def on_run_end(self, run: RunInfo, error: BaseException | None) -> None:
        """Take note of a run that has ended; `error` says why it ended early, None where it is complete."""


class Relay(Observer):
    """Tells callbacks of one run's rounds, in their order.

    Args:
        run: the run.
        callbacks: who is told.
    """

    def __init__(self, run: RunInfo, callbacks: Sequence[Callback]) -> None:
        self.run, self.callbacks = run, callbacks

    def on_round_start(self, round: Round) -> None:
        """Pass a round's begin on."""
        for callback in self.callbacks:
            callback.on_round_start(self.run, round)

    def on_round_end(self, record: RoundRecord) -> None:
        """Pass a round's end on, and its evaluation before it where there was one."""
        for callback in self.callbacks:
            if record.metrics:
                callback.on_evaluation(self.run, record.round, record.metrics)
            callback.on_round_end(self.run, record)
