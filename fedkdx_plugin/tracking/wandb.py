"""`--track wandb`: each run as a run of Weights & Biases (with WANDB_MODE=offline, on this machine only)."""

from __future__ import annotations

from typing import Any

from fedkdx_plugin.engine.record import RoundRecord
from fedkdx_plugin.tracking.callbacks import Callback, RunInfo
from fedkdx_plugin.tracking.scalars import scalars

PACKAGES = ("wandb",)
PROJECT = "fedkdx"


class Tracker(Callback):
    """Callback that logs options, and the metrics of each round, to Weights & Biases. Runs may go on in parallel."""

    def __init__(self) -> None:
        self._runs: dict[str, Any] = {}

    def on_run_start(self, run: RunInfo) -> None:
        """Start a run of Weights & Biases with the options."""
        import wandb

        config = {**run.settings, "folder": str(run.folder), "rounds done before": run.done}
        self._runs[run.name] = wandb.init(project=PROJECT, name=run.name, config=config, reinit="create_new")

    def on_round_end(self, run: RunInfo, record: RoundRecord) -> None:
        """Log the round's scalars."""
        self._runs[run.name].log(scalars(record), step=record.round)

    def on_run_end(self, run: RunInfo, error: BaseException | None) -> None:
        """End the run; an exit code of 1 marks one that is not complete."""
        if made := self._runs.pop(run.name, None):
            made.finish(exit_code=0 if error is None else 1)
