"""`fedkdx predict RUN recording.csv`: what a finished run's model says of a recording."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from registry.flags import Parser


def main(words: Sequence[str]) -> int:
    """Predict on a recording, print or write a CSV. Returns the exit code; raises UserError.

    Args:
        words: of the command line, after `fedkdx predict`.
    """
    parser = Parser(
        prog="fedkdx predict",
        description="Cut a recording into windows as a run's own were, and print what the run's model says of each.",
        epilog="example: fedkdx predict runs/mine/FedKDX-seed0 walk.csv --client 3 -o walk-predicted.csv",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or that of a comparison with one run")
    parser.add_argument("recording", type=Path, help="a file like those of the run's data, but without labels")
    parser.add_argument("--client", type=int, metavar="K", help="whose model (default: the one that all share)")
    parser.add_argument("-o", "--out", type=Path, metavar="CSV", help="write a file (default: print)")
    given = parser.parse_args(words)
    from dataset_utils.files import replacing
    from fedkdx_plugin.prediction import load_model

    found = load_model(given.run, given.client).predict(given.recording)
    for note in found.notes:
        print(note, file=sys.stderr)
    if given.out is None:
        print(found.table.to_csv(index=False, lineterminator="\n"), end="", flush=True)
        return 0
    with replacing(given.out) as part:
        found.table.to_csv(part, index=False, lineterminator="\n", encoding="utf-8")
    print(f"{len(found.labels)} windows: {given.out}")
    return 0
