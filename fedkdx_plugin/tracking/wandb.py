"""`--track wandb`: each run as a run of Weights & Biases (WANDB_MODE=offline keeps it on this machine)."""

from __future__ import annotations

from typing import Any

from fedkdx_plugin.engine.rounds import RoundRecord
from fedkdx_plugin.tracking.callbacks import Callback, RunInfo
from fedkdx_plugin.tracking.scalars import scalars

PACKAGES = ("wandb",)
PROJECT = "fedkdx"


class Tracker(Callback):
    """Logs settings, and each round's metrics, to Weights & Biases. Runs may go on side by side."""

    def __init__(self) -> None:
        self._runs: dict[str, Any] = {}

    def on_run_start(self, run: RunInfo) -> None:
        """Begin a run that holds the settings."""
        import wandb

        config = {**run.settings, "folder": str(run.folder), "rounds done before": run.done}
        self._runs[run.name] = wandb.init(project=PROJECT, name=run.name, config=config, reinit="create_new")

    def on_round_end(self, run: RunInfo, record: RoundRecord) -> None:
        """Log the round's scalars."""
        self._runs[run.name].log(scalars(record), step=record.round)

    def on_run_end(self, run: RunInfo, error: BaseException | None) -> None:
        """End the run; an exit code of 1 marks one that did not come to its end."""
        if made := self._runs.pop(run.name, None):
            made.finish(exit_code=0 if error is None else 1)
