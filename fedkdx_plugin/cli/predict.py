"""`fedkdx predict RUN recording.csv` predicts the classes of a recording with the model of a finished run."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path

from dataset_utils.files import is_file, is_folder, state_of
from registry.errors import UserError
from registry.flags import Parser

PREDICTIONS = re.compile(rb"(recording,)?(start,end,)?class,probability,")  # how a table of predictions begins
LINE = 1000  # bytes of a first line that are looked at


def main(words: Sequence[str]) -> int:
    """Predict on a recording, and print or write a CSV. Returns the exit code. Raises UserError: wrong input.

    Args:
        words: the command line after `fedkdx predict`.
    """
    parser = Parser(
        prog="fedkdx predict",
        description="Cut a recording into windows as the run's data were, and print the model's prediction for each.",
        epilog="example: fedkdx predict runs/mine/FedKDX-seed0 walk.csv --client 3 -o walk-predicted.csv",
    )
    parser.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help="a run folder, a folder with one run, or a site's folder STATE/RUN/client-K",
    )
    parser.add_argument("recording", type=Path, help="a file like those of the run's data; labels are not needed")
    parser.add_argument(
        "--client",
        type=int,
        metavar="K",
        help="number of the client whose model predicts (default: the shared model; at a site, its own)",
    )
    parser.add_argument("--subject", metavar="NAME", help="name of the client's subject, in place of its number")
    parser.add_argument("-o", "--out", type=Path, metavar="CSV", help="file to write (default: print)")
    given = parser.parse_args(words)
    from dataset_utils.files import replacing
    from fedkdx_plugin.prediction import load_model

    if given.out is not None:
        _check_spared(given.out, given.recording)
    found = load_model(given.run, given.client, given.subject).predict(given.recording)
    for note in found.notes:
        print(note, file=sys.stderr)
    if given.out is None:
        print(found.table.to_csv(index=False, lineterminator="\n"), end="", flush=True)
        return 0
    with replacing(given.out) as part:
        found.table.to_csv(part, index=False, lineterminator="\n", encoding="utf-8")
    print(f"{len(found.labels)} windows: {given.out}")
    return 0


def _check_spared(out: Path, recording: Path) -> None:
    """Raise UserError where writing `out` would replace a file of anything else than predictions."""
    if state_of(out) is None or is_folder(out):  # of which the writing itself speaks
        return
    if not is_file(out):
        raise UserError(f"-o {out}: is no regular file; name one, or leave -o out to print")
    with out.open("rb") as file:
        start = file.readline(LINE)
    if start and not PREDICTIONS.match(start):
        what = "the recording" if recording.exists() and out.samefile(recording) else "no table of predictions"
        raise UserError(f"-o {out}: holds {what}, which would be lost; name another file")
