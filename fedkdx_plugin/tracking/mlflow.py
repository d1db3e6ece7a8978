"""`--track mlflow`: each run as a run of MLflow at MLFLOW_TRACKING_URI (default: in the current folder)."""

from __future__ import annotations

import time
from typing import Any

from fedkdx_plugin.engine.record import RoundRecord
from fedkdx_plugin.tracking.callbacks import Callback, RunInfo
from fedkdx_plugin.tracking.scalars import scalars

PACKAGES = ("mlflow",)
EXPERIMENT = "fedkdx"
LONGEST = 500  # characters of a parameter's value that MLflow accepts


class Tracker(Callback):
    """Callback that logs options, and the metrics of each round, to MLflow. Runs may go on in parallel."""

    def __init__(self) -> None:
        from mlflow.tracking import MlflowClient

        self.client = MlflowClient()
        found = self.client.get_experiment_by_name(EXPERIMENT)
        self._experiment = found.experiment_id if found else self.client.create_experiment(EXPERIMENT)
        self._ids: dict[str, str] = {}

    def on_run_start(self, run: RunInfo) -> None:
        """Start a run of MLflow with the options; a resumed run is a new one, with the number of rounds done before."""
        from mlflow.entities import Param

        made = self.client.create_run(self._experiment, run_name=run.name)
        self._ids[run.name] = made.info.run_id
        texts = {"folder": str(run.folder), "rounds done before": str(run.done)}
        texts |= {key: _text(value) for key, value in run.settings.items()}
        self.client.log_batch(made.info.run_id, params=[Param(key, text) for key, text in texts.items()])

    def on_round_end(self, run: RunInfo, record: RoundRecord) -> None:
        """Log the round's scalars."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(name, value, now, record.round) for name, value in scalars(record).items()]
        self.client.log_batch(self._ids[run.name], metrics=metrics)

    def on_run_end(self, run: RunInfo, error: BaseException | None) -> None:
        """End the run as finished, failed or killed."""
        status = "FINISHED" if error is None else "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        if run.name in self._ids:
            self.client.set_terminated(self._ids.pop(run.name), status)


def _text(value: Any) -> str:
    text = str(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."
