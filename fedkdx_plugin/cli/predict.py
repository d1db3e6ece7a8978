"""`fedkdx predict RUN recording.csv` predicts the classes of a recording with the model of a finished run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from registry.errors import UserError
from registry.flags import Parser


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
        "run", type=Path, metavar="RUN", help="a run folder, or the folder of a comparison with one run"
    )
    parser.add_argument("recording", type=Path, help="a file like those of the run's data; labels are not needed")
    parser.add_argument(
        "--client", type=int, metavar="K", help="number of the client whose model predicts (default: the shared model)"
    )
    parser.add_argument("--subject", metavar="NAME", help="name of the client's subject, in place of its number")
    parser.add_argument("-o", "--out", type=Path, metavar="CSV", help="file to write (default: print)")
    given = parser.parse_args(words)
    from dataset_utils.files import replacing
    from fedkdx_plugin.prediction import load_model

    if given.out is not None:
        _check_spared(given.recording, given.out)
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


def _check_spared(recording: Path, out: Path) -> None:
    """Raise UserError where writing `out` would replace the recording, or a file of it."""
    if out.exists() and recording.exists():
        own = [recording.resolve(), *(recording.rglob("*") if recording.is_dir() else ())]
        if any(out.samefile(file) for file in own):
            raise UserError(f"-o {out}: this is the recording, which would be lost; name another file")
