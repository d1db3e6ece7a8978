"""`fedkdx experiment NAME` makes all runs of a grid, and their report."""

from __future__ import annotations

from collections.abc import Sequence

from fedkdx_plugin.cli.options import Making, add_options, given_values
from registry.errors import UserError
from registry.flags import Parser, add_flags, given
from registry.parameters import parse


def main(words: Sequence[str]) -> int:
    """Make the runs of a grid. Returns the exit code. Raises UserError: wrong input."""
    parser = Parser(
        prog="fedkdx experiment",
        description="Make all runs of a grid of configurations that are not finished, and a report.",
        epilog="example: fedkdx experiment table2 --only data=SLEEP -t 3; an option replaces that of the file",
    )
    parser.add_argument("name", metavar="NAME", help="name of a file experiments/NAME.yaml, or path of a YAML file")
    text = "make only the runs with these values (data=SLEEP)"
    parser.add_argument("--only", action="append", metavar="KEY=VALUES", help=text)
    add_options(parser)
    add_flags(parser, Making)
    arguments = parser.parse_args(words)
    making = parse(Making, given(arguments, Making))
    name, only = arguments.name, arguments.only or []
    del arguments.name, arguments.only

    from dataset_utils.files import is_folder
    from fedkdx_plugin.cli.making import make
    from fedkdx_plugin.experiments.experiment import Experiment

    experiment = Experiment.grid(name, given_values(arguments), only)
    if any(planned.settings["engine"] != "local" for planned in experiment.runs):
        raise UserError("--engine flower: is for comparisons (fedkdx run) only; leave it out")
    folder = experiment.out / experiment.name
    experiment.folder = folder if is_folder(folder) else None
    return make(experiment, ["fedkdx", "experiment", *words], making)
