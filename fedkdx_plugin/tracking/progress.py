"""Progress of runs: one bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Mapping

from tqdm import tqdm

from fedkdx_plugin.engine.evaluation import SERVED
from fedkdx_plugin.engine.record import RoundRecord
from fedkdx_plugin.privacy.client import SPENT
from fedkdx_plugin.tracking.callbacks import Callback, RunInfo
from registry.blame import is_expected

CALM = 10.0  # seconds between lines where there is no terminal


class Progress(Callback):
    """Callback that shows the progress of all runs, and the run of the last event, on stderr; a context manager.

    The time left is the sum over kinds of runs of the rounds ahead times the mean time of a round of that kind; for a
    kind without a finished round, the mean over the other kinds is used.

    Args:
        rounds: kind of run (see `RunInfo.kind`) -> rounds ahead, of all its runs together.
        at_once: number of runs in parallel.
    """

    def __init__(self, rounds: Mapping[str, int], at_once: int = 1) -> None:
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=sum(rounds.values()),
            disable=not self.terminal,
            unit="round",
            dynamic_ncols=True,
            bar_format="{desc} |{bar}| {percentage:3.0f}% [{elapsed} so far{postfix}]",
        )
        self.at_once, self.said = at_once, -math.inf
        self.ahead, self.done = Counter(rounds), Counter[str]()
        self.seconds: dict[str, float] = {}
        self._round: dict[str, int] = {}  # run -> its last round
        self._accuracy: dict[str, float] = {}
        self._last: dict[str, float] = {}  # run -> when its last round ended

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def on_run_start(self, run: RunInfo) -> None:
        """Skip the rounds made before, and start the run's clock."""
        self.skip(run.kind, run.done)
        self._round[run.name], self._last[run.name] = run.done, time.monotonic()

    def on_round_end(self, run: RunInfo, record: RoundRecord) -> None:
        """Count the round and show the run's progress."""
        if record.metrics:
            self._accuracy[run.name] = record.metrics[SERVED].accuracy
        for reason in record.rejected.values():
            self.say(f"{run.name} round {record.round}: dropped an update: {reason}")
        text = f"{run.name} round {record.round}/{run.rounds} loss {record.train_loss:.3f}"
        if run.name in self._accuracy:
            text += f" accuracy {100 * self._accuracy[run.name]:.1f} %"
        if (spent := record.server.get(SPENT)) is not None:
            text += f" ε {spent:.2f}"
        now = time.monotonic()
        self.step(run.kind, now - self._last[run.name], text, important=record.round == run.rounds)
        self._round[run.name], self._last[run.name] = record.round, now

    def on_run_end(self, run: RunInfo, error: BaseException | None) -> None:
        """Print why a run failed, and skip its remaining rounds."""
        told_anyway = is_expected(error) and self.at_once == 1
        if error is not None and not isinstance(error, KeyboardInterrupt) and not told_anyway:
            self.skip(run.kind, run.rounds - self._round.get(run.name, 0))
            self.say(f"failed: {run.name}: {' '.join(str(error).split())}")

    def skip(self, kind: str, rounds: int) -> None:
        """Leave out rounds that take no time: made before, or of a failed run."""
        self.ahead[kind] -= rounds
        self.bar.update(rounds)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        tqdm.write(text, file=sys.stderr)

    def left(self) -> float:
        """Return the estimated seconds until all runs are finished; NaN before the first round."""
        paces = {kind: seconds / self.done[kind] for kind, seconds in self.seconds.items()}
        if not paces:
            return math.nan
        usual = sum(paces.values()) / len(paces)
        return sum(rounds * paces.get(kind, usual) for kind, rounds in self.ahead.items()) / self.at_once

    def step(self, kind: str, seconds: float, text: str, important: bool) -> None:
        """Count a finished round and show it.

        Args:
            kind: kind of its run.
            seconds: time since the previous round of the same run.
            text: the round in words.
            important: print it in any case; without a terminal, other rounds are printed every `CALM` seconds at most.
        """
        self.done[kind] += 1
        self.ahead[kind] -= 1
        self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds
        left = f"{tqdm.format_interval(self.left())} left"
        if self.terminal:
            self.bar.set_description_str(text, refresh=False)
            self.bar.set_postfix_str(left, refresh=False)
            self.bar.update()
            return
        now = time.monotonic()
        if now - self.said >= CALM or important:
            print(f"{text}, {left}", file=sys.stderr, flush=True)
            self.said = now
