"""Callbacks: objects that receive the events of runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedkdx_plugin.engine.metrics import Metrics
from fedkdx_plugin.engine.record import Observer, RoundRecord
from registry.interface import Round


@dataclass(frozen=True)
class RunInfo:
    """Description of a run, known before its first round.

    Attributes:
        name: name in messages, unique among the runs that a callback sees.
        kind: algorithm and setting, without the seed; rounds of one kind take about the same time.
        folder: the run folder.
        settings: the resolved configuration, with 'algorithm', 'seed' and 'global_rounds' among its keys.
        done: number of rounds made before, by an interrupted command.
    """

    name: str
    kind: str
    folder: Path
    settings: Mapping[str, Any]
    done: int = 0

    @property
    def rounds(self) -> int:
        """Planned number of rounds."""
        return int(self.settings["global_rounds"])


class Callback:
    """Base class whose methods do nothing; override those of the events you need.

    Events come in this order: `on_run_start`, then for each round `on_round_start`, `on_evaluation` (where the round is
    evaluated) and `on_round_end`, then `on_run_end`. Runs may go on in parallel; `run` is the one that an event is of.
    Between sites, the metrics of a round arrive with the next round, and so do its last two events.
    """

    def on_run_start(self, run: RunInfo) -> None:
        """Handle the start of a run, or its resumption."""

    def on_round_start(self, run: RunInfo, round: Round) -> None:
        """Handle the start of a round."""

    def on_evaluation(self, run: RunInfo, round: int, metrics: Mapping[str, Metrics]) -> None:
        """Handle the metrics of a round: view -> metrics (see `engine.evaluation`)."""

    def on_round_end(self, run: RunInfo, record: RoundRecord) -> None:
        """Handle the end of a round."""

    def on_run_end(self, run: RunInfo, error: BaseException | None) -> None:
        """Handle the end of a run; `error` is the exception that ended it early, None if it is complete."""


class Relay(Observer):
    """Observer that passes the rounds of one run on to callbacks.

    Args:
        run: the run.
        callbacks: called in this order.
    """

    def __init__(self, run: RunInfo, callbacks: Sequence[Callback]) -> None:
        self.run, self.callbacks = run, callbacks

    def on_round_start(self, round: Round) -> None:
        """Pass the start of a round on."""
        for callback in self.callbacks:
            callback.on_round_start(self.run, round)

    def on_round_end(self, record: RoundRecord) -> None:
        """Pass the end of a round on, after its evaluation if there was one."""
        for callback in self.callbacks:
            if record.metrics:
                callback.on_evaluation(self.run, record.round, record.metrics)
            callback.on_round_end(self.run, record)
