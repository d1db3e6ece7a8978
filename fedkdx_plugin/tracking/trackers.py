"""Trackers of `--track`, made by name."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from fedkdx_plugin.engine.metrics import Metrics
from fedkdx_plugin.engine.record import RoundRecord
from fedkdx_plugin.tracking.callbacks import Callback, RunInfo
from registry.errors import UserError
from registry.interface import Round


def trackers(names: Sequence[str]) -> list[Callback]:
    """Return the trackers of `--track`. Raises UserError: a package is missing, or a service cannot be reached."""
    found: list[Callback] = []
    for name in dict.fromkeys(names):
        module = importlib.import_module(f"fedkdx_plugin.tracking.{name}")
        for package in module.PACKAGES:
            if importlib.util.find_spec(package) is None:
                raise UserError(f"--track {name} needs a package: pip install {package}")
        with _named(name):
            found.append(_Named(name, module.Tracker()))
    return found


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Turn any exception of a tracker's package (no login, no network, no disk) into a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"--track {name}: {reason}") from error


class _Named(Callback):
    """Tracker whose exceptions are UserErrors that name it."""

    def __init__(self, name: str, tracker: Callback) -> None:
        self.name, self.tracker = name, tracker

    def on_run_start(self, run: RunInfo) -> None:
        with _named(self.name):
            self.tracker.on_run_start(run)

    def on_round_start(self, run: RunInfo, round: Round) -> None:
        with _named(self.name):
            self.tracker.on_round_start(run, round)

    def on_evaluation(self, run: RunInfo, round: int, metrics: Mapping[str, Metrics]) -> None:
        with _named(self.name):
            self.tracker.on_evaluation(run, round, metrics)

    def on_round_end(self, run: RunInfo, record: RoundRecord) -> None:
        with _named(self.name):
            self.tracker.on_round_end(run, record)

    def on_run_end(self, run: RunInfo, error: BaseException | None) -> None:
        with _named(self.name):
            self.tracker.on_run_end(run, error)
