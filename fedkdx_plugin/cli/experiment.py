"""`fedkdx experiment NAME`: make all runs of a grid, and their report."""

from __future__ import annotations

from collections.abc import Sequence

from fedkdx_plugin.cli.options import Making, add_options, given_values
from registry.errors import UserError
from registry.flags import Parser, add_flags, given
from registry.parameters import parse


def main(words: Sequence[str]) -> int:
    """Make the runs of a grid. Returns the exit code; raises UserError."""
    parser = Parser(
        prog="fedkdx experiment",
        description="Make all runs of a grid of configurations that are not done, and a report.",
        epilog="example: fedkdx experiment table2 --only data=SLEEP -t 3; an option takes the place of the file's",
    )
    parser.add_argument("name", metavar="NAME", help="of experiments/NAME.yaml, or a YAML file")
    text = "make the runs of these values alone (data=SLEEP)"
    parser.add_argument("--only", action="append", metavar="KEY=VALUES", help=text)
    add_options(parser)
    add_flags(parser, Making)
    arguments = parser.parse_args(words)
    making = parse(Making, given(arguments, Making))
    name, only = arguments.name, arguments.only or []
    del arguments.name, arguments.only

    from fedkdx_plugin.cli.making import make
    from fedkdx_plugin.experiments.experiment import Experiment

    experiment = Experiment.grid(name, given_values(arguments), only)
    if any(planned.settings["engine"] != "local" for planned in experiment.runs):
        raise UserError("--engine flower: the runs of an experiment are made on this machine; leave it out")
    folder = experiment.out / experiment.name
    experiment.folder = folder if folder.is_dir() else None
    return make(experiment, ["fedkdx", "experiment", *words], making)
