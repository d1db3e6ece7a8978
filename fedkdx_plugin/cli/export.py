"""`fedkdx export RUN --client K --format onnx`: a finished run's model as a file that runs elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from registry.flags import Parser

FORMATS = ("onnx", "torchscript")  # prediction.exporting.FORMATS, which imports torch


def main(words: Sequence[str]) -> int:
    """Write a model and `preprocessing.json`. Returns the exit code; raises UserError.

    Args:
        words: of the command line, after `fedkdx export`.
    """
    parser = Parser(
        prog="fedkdx export",
        description="Write a run's model for another program or device, with how windows are made beside it.",
        epilog="example: fedkdx export runs/mine/FedKDX-seed0 --client 3 --format onnx -o watch-model",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="a run's folder, or that of a comparison with one run")
    parser.add_argument("--client", type=int, metavar="K", help="whose model (default: the one that all share)")
    parser.add_argument("--format", choices=FORMATS, required=True, help="onnx needs: pip install 'fedkdx[export]'")
    parser.add_argument(
        "-o", "--out", type=Path, metavar="FOLDER", help="where to write (default: a folder here, named after the run)"
    )
    given = parser.parse_args(words)
    from fedkdx_plugin.prediction import export
    from fedkdx_plugin.prediction.loading import run_folder

    folder = run_folder(given.run)
    who = "shared" if given.client is None else f"client{given.client}"
    made = export(folder, given.client, given.format, given.out or Path(f"{folder.resolve().name}-{who}"))
    windows = " and ".join(f"{count} {kind}" for kind, count in made.windows.items() if count)
    print(f"wrote {made.model} and {made.description}")
    print(f"checked on {windows} windows: probabilities differ from PyTorch's by at most {made.difference:.2g}")
    return 0
