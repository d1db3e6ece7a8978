"""`fedkdx serve` runs algorithms between sites, each of which joins with its own data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedkdx_plugin.cli.options import add_config, add_options, read_config
from fedkdx_plugin.flower import require_flower
from fedkdx_plugin.flower.options import ELSEWHERE, Address, Security, Terms
from registry.errors import UserError
from registry.flags import Parser, add_flags, given
from registry.parameters import parse


def main(words: Sequence[str]) -> int:
    """Run the server of a federation. Returns the exit code. Raises UserError: wrong input."""
    parser = Parser(
        prog="fedkdx serve",
        usage="fedkdx serve --sites N --certificates FOLDER [-algo ALGORITHM[,ALGORITHM]] [OPTION ...]",
        description="Run algorithms between sites, each of which joins with its own data (`fedkdx join`).",
        epilog="the folder of certificates holds server.pem, server.key, and the sites' public keys in 'keys'; "
        "example: fedkdx serve --sites 3 --certificates keys/server -algo FedKDX -m cnn -gr 20 -jr 1",
    )
    text = "go on with an interrupted federation; its other options are those of the start, and cannot be given"
    parser.add_argument("--resume", metavar="FOLDER", help=text)
    group = parser.add_argument_group("the federation")
    add_flags(group, Terms)
    add_flags(group, Address)
    add_flags(group, Security)
    add_options(parser)
    add_config(parser)
    arguments = parser.parse_args(words)
    resume = arguments.resume
    del arguments.resume
    terms, address, security = (parse(declared, given(arguments, declared)) for declared in (Terms, Address, Security))
    certificates = security.folder
    if arguments.data:
        raise UserError("-data: the data are the sites' own (fedkdx join); leave it out")
    if resume is not None:
        other = [name for name, value in vars(arguments).items() if value is not None]
        if other:
            raise UserError(f"--resume: uses the options in the folder; leave {other[0]} out")

    from fedkdx_plugin.experiments.experiment import Experiment, experiment_folder
    from fedkdx_plugin.experiments.runner import where_it_began

    asked = Path(resume).absolute() if resume is not None else None
    folder = asked and (experiment_folder(asked) or asked)
    with where_it_began(folder):
        if folder is not None:
            experiment = Experiment.resumed(folder)
            if experiment.runs[0].settings["data"] != ELSEWHERE:
                raise UserError(f"{folder}: of runs on this machine; `fedkdx resume {folder}` goes on with them")
        else:
            arguments.data = ELSEWHERE
            experiment = Experiment.comparison(read_config(arguments))
        for planned in experiment.runs:
            terms.check_updates(planned.config.join_ratio)
        require_flower()
        from fedkdx_plugin.flower import superlink

        return superlink.serve(experiment, ["fedkdx", "serve", *words], terms, address, certificates)
