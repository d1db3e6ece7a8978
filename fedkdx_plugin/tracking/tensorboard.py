"""`--track tensorboard`: metrics of each run as TensorBoard scalars, written during the run."""

from __future__ import annotations

from typing import Any

from fedkdx_plugin.engine.record import RoundRecord
from fedkdx_plugin.tracking.callbacks import Callback, RunInfo
from fedkdx_plugin.tracking.scalars import scalars

FOLDER = "tensorboard"
PACKAGES = ("tensorboard",)


class Tracker(Callback):
    """Callback that writes each round into `tensorboard/` in the run folder."""

    def __init__(self) -> None:
        self._writers: dict[str, Any] = {}

    def on_round_end(self, run: RunInfo, record: RoundRecord) -> None:
        """Write the round's scalars."""
        if run.name not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            # hides rounds that an interrupted run wrote here, but did not save
            self._writers[run.name] = SummaryWriter(str(run.folder / FOLDER), purge_step=record.round)
        writer = self._writers[run.name]
        for name, value in scalars(record).items():
            writer.add_scalar(name, value, record.round)
        writer.flush()

    def on_run_end(self, run: RunInfo, error: BaseException | None) -> None:
        """Close the run's file."""
        if writer := self._writers.pop(run.name, None):
            writer.close()
