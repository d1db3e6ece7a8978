"""`fedkdx export RUN --client K --format onnx` writes the model of a finished run for other programs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from registry.flags import Parser

FORMATS = ("onnx", "torchscript")  # prediction.exporting.FORMATS, which imports torch


def main(words: Sequence[str]) -> int:
    """Write a model and `preprocessing.json`. Returns the exit code. Raises UserError: wrong input.

    Args:
        words: the command line after `fedkdx export`.
    """
    parser = Parser(
        prog="fedkdx export",
        description="Write the model of a run for another program or device, and its preprocessing as JSON.",
        epilog="example: fedkdx export runs/mine/FedKDX-seed0 --client 3 --format onnx -o watch-model",
    )
    parser.add_argument(
        "run",
        type=Path,
        metavar="RUN",
        help="a run folder, a folder with one run, or a site's folder STATE/RUN/client-K",
    )
    parser.add_argument(
        "--client",
        type=int,
        metavar="K",
        help="number of the client whose model is written (default: the shared model; at a site, its own)",
    )
    parser.add_argument("--subject", metavar="NAME", help="name of the client's subject, in place of its number")
    parser.add_argument("--format", choices=FORMATS, required=True, help="onnx needs: pip install 'fedkdx[export]'")
    parser.add_argument(
        "-o", "--out", type=Path, metavar="FOLDER", help="folder to write to (default: one here, named after the run)"
    )
    given = parser.parse_args(words)
    from fedkdx_plugin.experiments.experiment import file_name
    from fedkdx_plugin.prediction import export
    from fedkdx_plugin.prediction.loading import run_folder
    from fedkdx_plugin.results.site_model import is_site

    folder = run_folder(given.run)
    place = folder.resolve()
    who = "shared" if given.client is None else f"client{given.client}"
    who = who if given.subject is None else file_name(given.subject)
    name = f"{place.parent.name}-{place.name}" if is_site(folder) else f"{place.name}-{who}"
    out = given.out or Path(name)
    made = export(folder, given.client, given.format, out, given.subject)
    windows = " and ".join(f"{count} {kind}" for kind, count in made.windows.items() if count)
    for note in made.notes:
        print(note, file=sys.stderr)
    print(f"wrote {made.model} and {made.description}")
    print(f"checked on {windows} windows: probabilities differ from PyTorch's by at most {made.difference:.2g}")
    return 0
