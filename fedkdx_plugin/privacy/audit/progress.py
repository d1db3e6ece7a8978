"""Progress of an audit on stderr: one line that changes on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

CALM = 10.0  # seconds between lines where there is no terminal


class Progress:
    """Tells what an audit is doing.

    Args:
        name: of the run.
        shown: whether to tell anything.
    """

    def __init__(self, name: str, shown: bool) -> None:
        self.name, self.shown = name, shown
        self.bar = tqdm(disable=not shown or not sys.stderr.isatty(), bar_format="{desc} [{elapsed}]")
        self.began, self.said = time.monotonic(), time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def __call__(self, text: str) -> None:
        """Say what is being done now."""
        if not self.shown:
            return
        if not self.bar.disable:
            self.bar.set_description_str(f"{self.name}: {text}")
        elif (now := time.monotonic()) - self.said >= CALM:
            print(f"{self.name}: {text} [{now - self.began:.0f} s]", file=sys.stderr, flush=True)
            self.said = now
