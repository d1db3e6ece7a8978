"""`fedkdx resume FOLDER`: go on with a comparison or an experiment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedkdx_plugin.cli.options import Making
from fedkdx_plugin.flower.options import ELSEWHERE
from registry.errors import UserError
from registry.flags import Parser, add_flags, given
from registry.parameters import parse


def main(words: Sequence[str]) -> int:
    """Go on with the runs of a folder. Returns the exit code; raises UserError."""
    parser = Parser(
        prog="fedkdx resume",
        description="Go on with a comparison or an experiment that was interrupted, or to more rounds.",
        epilog="all else is as it was begun, and so takes no other option",
    )
    parser.add_argument("folder", metavar="FOLDER", help="of the comparison or experiment, or of one of its runs")
    text = "number of rounds to go on to, instead of the planned one"
    parser.add_argument("-gr", "--global-rounds", "--rounds", dest="rounds", help=text)
    add_flags(parser, Making)
    arguments = parser.parse_args(words)
    making = parse(Making, given(arguments, Making))
    given_folder = Path(arguments.folder).absolute()

    from fedkdx_plugin.cli.making import make
    from fedkdx_plugin.experiments.experiment import FILE, Experiment, experiment_folder
    from fedkdx_plugin.experiments.runner import where_it_began

    folder = experiment_folder(given_folder) or given_folder
    if (folder / "environment.json").is_file():
        raise UserError(f"{folder}: a run without its experiment ({FILE} in a folder above), which alone can go on")
    command = ["fedkdx", "resume", *words]
    with where_it_began(folder):
        experiment = Experiment.resumed(folder, arguments.rounds)
        if experiment.runs[0].settings["data"] == ELSEWHERE:
            raise UserError(
                f"{folder}: of a federation between sites; `fedkdx serve --resume {folder} ...` goes on with it"
            )
        return make(experiment, command, making)
