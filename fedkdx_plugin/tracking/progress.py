"""How far the work is: one bar on a terminal, calm lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Mapping

from tqdm import tqdm

from fedkdx_plugin.engine.evaluation import SERVED
from fedkdx_plugin.engine.rounds import RoundRecord

CALM = 10.0  # seconds between lines where there is no terminal


class Progress:
    """Shows the whole of the work, and the run that spoke last, on stderr.

    The time left is the sum over kinds of work, each by the pace of its own rounds; a kind of which no round has been
    seen goes at the mean pace of the others.

    Args:
        rounds: kind of work (an algorithm on some data) -> its rounds in all runs together.
        at_once: runs side by side.
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

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def begin(self, kind: str, name: str, rounds: int, done: int = 0) -> RunProgress:
        """A callback for a run of so many rounds, of which some were done before."""
        self.skip(kind, done)
        return RunProgress(self, kind, name, rounds)

    def skip(self, kind: str, rounds: int) -> None:
        """Rounds that need no time: done before, or given up."""
        self.ahead[kind] -= rounds
        self.bar.update(rounds)

    def say(self, text: str) -> None:
        """A line that stays."""
        tqdm.write(text, file=sys.stderr)

    def left(self) -> float:
        """Seconds until all is done; NaN before the first round."""
        paces = {kind: seconds / self.done[kind] for kind, seconds in self.seconds.items()}
        if not paces:
            return math.nan
        usual = sum(paces.values()) / len(paces)
        return sum(rounds * paces.get(kind, usual) for kind, rounds in self.ahead.items()) / self.at_once

    def step(self, kind: str, seconds: float, text: str, important: bool) -> None:
        """One more round; `text` says which. An important one is said where others are passed over.

        Args:
            seconds: since the round before of the same run.
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


class RunProgress:
    """One run's part in the progress: a callback of its rounds."""

    def __init__(self, progress: Progress, kind: str, name: str, rounds: int) -> None:
        self.progress, self.kind, self.name, self.rounds = progress, kind, name, rounds
        self.accuracy, self.last = math.nan, time.monotonic()

    def on_round(self, record: RoundRecord) -> None:
        """One more round is done."""
        if record.metrics:
            self.accuracy = record.metrics[SERVED].accuracy
        for reason in record.rejected.values():
            self.progress.say(f"{self.name} round {record.round}: dropped an update: {reason}")
        text = f"{self.name} round {record.round}/{self.rounds} loss {record.train_loss:.3f}"
        if not math.isnan(self.accuracy):
            text += f" accuracy {100 * self.accuracy:.1f} %"
        now = time.monotonic()
        self.progress.step(self.kind, now - self.last, text, important=record.round == self.rounds)
        self.last = now
