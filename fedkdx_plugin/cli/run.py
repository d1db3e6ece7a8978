"""`fedkdx run` compares algorithms in one setting, as `python run.py` does with the same flags."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fedkdx_plugin.cli.options import Making, add_config, add_options, read_config, refuse_hyper_parameters
from registry import __version__
from registry.errors import UserError
from registry.flags import Parser, add_flags, given
from registry.parameters import parse
from registry.text import shown

EXAMPLE = "example: python run.py -data SPAR -algo Local,FedAvg,FedKDX -m cnn -jr 0.4 -gr 20"
OTHERS = {
    "experiment": "make a grid of runs from a YAML file",
    "report": "write tables, plots and significance tests of finished runs",
    "audit": "attack runs, and measure what they leak",
    "resume": "go on with interrupted runs",
    "list": "show algorithms, models and data sets",
    "data": "describe, make or import data",
    "predict": "apply a trained model to a recording",
    "export": "write a trained model for a device",
    "serve": "run the server of a federation between sites",
    "join": "take part in a federation, as a site",
    "certificates": "make keys for a federation",
}
WORDS = "other commands (fedkdx COMMAND --help):\n" + "\n".join(f"  {name:<14}{use}" for name, use in OTHERS.items())


def parser() -> Parser:
    """Return the parser of all flags."""
    made = Parser(
        prog="fedkdx run",
        usage="fedkdx run -data DATA [-algo ALGORITHM[,ALGORITHM]] [OPTION ...]",
        description="Compare federated-learning algorithms on wearable and healthcare data.",
        epilog=f"{EXAMPLE}\n\n{WORDS}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(made)
    add_config(made)
    add_flags(made, Making)
    made.add_argument("--version", action="version", version=f"fedkdx {__version__}")
    return made


def main(words: Sequence[str]) -> int:
    """Run a comparison. Returns the exit code. Raises UserError: wrong input."""
    made = parser()
    refuse_hyper_parameters(words, made.flags)
    if words and not words[0].startswith("-"):
        raise UserError(
            f"{shown(words[0])}: which option is this? write -data {shown(words[0])} for a data set; {EXAMPLE}"
        )
    arguments = made.parse_args(words)
    making = parse(Making, given(arguments, Making))
    config = read_config(arguments)
    command = ["fedkdx", "run", *words]
    from fedkdx_plugin.cli.making import check, make
    from fedkdx_plugin.experiments.experiment import Experiment

    experiment = Experiment.comparison(config)
    if making.dry_run:
        from fedkdx_plugin.cli.dry_run import show

        check(experiment, making)
        return show(experiment, config)
    return make(experiment, command, making)
