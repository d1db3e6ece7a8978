"""`fedkdx resume FOLDER` goes on with a comparison or an experiment."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedkdx_plugin.cli.options import Making
from fedkdx_plugin.cli.run import parser as run_parser
from fedkdx_plugin.flower.options import ELSEWHERE
from registry.errors import UserError
from registry.flags import Parser, add_flags, given
from registry.parameters import parse


def main(words: Sequence[str]) -> int:
    """Go on with the runs of a folder. Returns the exit code. Raises UserError: wrong input."""
    parser = Parser(
        prog="fedkdx resume",
        description="Go on with a comparison or an experiment that was interrupted, or run more rounds of it.",
        epilog="other options are those of the start, and cannot be given",
        elsewhere=dict.fromkeys(run_parser().flags, "options are those of the start, and of these only -gr may change"),
    )
    parser.add_argument(
        "folder", metavar="FOLDER", help="folder of the comparison or experiment, or of one of its runs"
    )
    text = "new number of rounds, instead of the planned one"
    parser.add_argument("-gr", "--global-rounds", "--rounds", dest="rounds", help=text)
    add_flags(parser, Making)
    arguments = parser.parse_args(words)
    making = parse(Making, given(arguments, Making))
    given_folder = Path(arguments.folder).absolute()

    from dataset_utils.files import is_file
    from fedkdx_plugin.cli.making import make
    from fedkdx_plugin.experiments.experiment import FILE, Experiment, experiment_folder
    from fedkdx_plugin.experiments.runner import where_it_began

    folder = experiment_folder(given_folder) or given_folder
    if is_file(folder / "environment.json"):
        raise UserError(
            f"{folder}: a run without its experiment; move it back into the folder with its {FILE}, which resume needs"
        )
    command = ["fedkdx", "resume", *words]
    with where_it_began(folder):
        experiment = Experiment.resumed(folder, arguments.rounds)
        if experiment.runs[0].settings["data"] == ELSEWHERE:
            raise UserError(
                f"{folder}: is of a federation between sites; go on with `fedkdx serve --resume {folder} ...`"
            )
        return make(experiment, command, making)
