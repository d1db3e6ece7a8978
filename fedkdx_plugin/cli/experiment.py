"""`fedkdx experiment NAME` makes all runs of a grid, and their report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedkdx_plugin.cli.options import Making, add_options, given_values
from registry.errors import UserError
from registry.flags import Parser, add_flags, given
from registry.parameters import parse

if TYPE_CHECKING:
    from fedkdx_plugin.experiments.experiment import Experiment


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
    text = "when all runs are finished, write the best candidate of each method (see `search`) into this new preset"
    parser.add_argument("--write-preset", metavar="YAML", type=Path, help=text)
    add_options(parser)
    add_flags(parser, Making)
    arguments = parser.parse_args(words)
    making = parse(Making, given(arguments, Making))
    name, only, preset = arguments.name, arguments.only or [], arguments.write_preset
    del arguments.name, arguments.only, arguments.write_preset

    from dataset_utils.files import is_folder
    from fedkdx_plugin.cli.making import make
    from fedkdx_plugin.experiments.experiment import Experiment
    from fedkdx_plugin.experiments.search import check_windows

    if preset and preset.exists():
        raise UserError(f"--write-preset {preset}: exists already; name another file, or remove it")
    experiment = Experiment.grid(name, given_values(arguments), only)
    if any(planned.settings["engine"] != "local" for planned in experiment.runs):
        raise UserError("--engine flower: is for comparisons (fedkdx run) only; leave it out")
    folder = experiment.out / experiment.name
    experiment.folder = folder if is_folder(folder) else None
    if preset and not experiment.is_search:
        raise UserError(f"--write-preset: {name} has no part 'search', so nothing is chosen; leave it out")
    if preset:
        check_windows(planned.settings["evaluate_on"] for planned in experiment.runs)
    code = make(experiment, ["fedkdx", "experiment", *words], making)
    if preset and not making.dry_run:
        _choose(experiment, preset)
    return code


def _choose(experiment: Experiment, path: Path) -> None:
    """Print the best candidates of a search, if it is finished, and write them into a preset. Raises UserError."""
    from fedkdx_plugin.experiments import search
    from fedkdx_plugin.experiments.results import Results

    results = Results.of(experiment)
    if results.missing:
        return
    found = search.best(results.runs)
    search.write_preset(path, found, f"The best candidates of the experiment {experiment.name}, on validation windows.")
    print(f"\n{search.table(found)}\nwritten: {path}")
