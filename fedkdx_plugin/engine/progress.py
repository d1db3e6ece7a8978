"""How far the work is: one bar on a terminal, calm lines elsewhere."""

from __future__ import annotations

import math
import sys
import time

from tqdm import tqdm

from fedkdx_plugin.engine.evaluation import SERVED
from fedkdx_plugin.engine.rounds import RoundRecord

CALM = 10.0  # seconds between lines where there is no terminal


class Progress:
    """Shows the whole of the work, and the run that spoke last, on stderr.

    Args:
        rounds: of all runs together.
    """

    def __init__(self, rounds: int) -> None:
        self.terminal = sys.stderr.isatty()
        self.bar = tqdm(
            total=rounds,
            disable=not self.terminal,
            unit="round",
            dynamic_ncols=True,
            bar_format="{desc} |{bar}| {percentage:3.0f}% [{elapsed} so far, {remaining} left]",
        )
        self.done, self.total, self.began, self.said = 0, rounds, time.monotonic(), -math.inf

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def begin(self, name: str, rounds: int, done: int = 0) -> RunProgress:
        """A callback for a run of so many rounds, of which some were done before."""
        self.skip(done)
        return RunProgress(self, name, rounds)

    def skip(self, rounds: int) -> None:
        """Rounds that need no time: done before, or given up."""
        self.total -= rounds  # for the time left, they do not count
        self.bar.update(rounds)

    def say(self, text: str) -> None:
        """A line that stays."""
        tqdm.write(text, file=sys.stderr)

    def step(self, text: str, important: bool) -> None:
        """One more round; `text` says which. An important one is said where others are passed over."""
        self.done += 1
        if self.terminal:
            self.bar.set_description_str(text, refresh=False)
            self.bar.update()
            return
        now = time.monotonic()
        if now - self.said >= CALM or important:
            left = (now - self.began) / self.done * (self.total - self.done)
            print(f"{text}, {tqdm.format_interval(left)} left", file=sys.stderr, flush=True)
            self.said = now


class RunProgress:
    """One run's part in the progress: a callback of its rounds."""

    def __init__(self, progress: Progress, name: str, rounds: int) -> None:
        self.progress, self.name, self.rounds, self.accuracy = progress, name, rounds, math.nan

    def on_round(self, record: RoundRecord) -> None:
        """One more round is done."""
        if record.metrics:
            self.accuracy = record.metrics[SERVED].accuracy
        for reason in record.rejected.values():
            self.progress.say(f"{self.name} round {record.round}: dropped an update: {reason}")
        text = f"{self.name} round {record.round}/{self.rounds} loss {record.train_loss:.3f}"
        if not math.isnan(self.accuracy):
            text += f" accuracy {100 * self.accuracy:.1f} %"
        self.progress.step(text, important=record.round == self.rounds)
