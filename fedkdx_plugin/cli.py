"""The command line: `python run.py ...`, or `fedkdx ...` once installed.

Nothing heavy is imported until a run begins, so that `--help` and `--list` answer at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from dataset_utils.spec import Parser, add_arguments
from fedkdx_plugin.config import Config, Options, from_dict, read_yaml
from registry import __version__, catalog
from registry.errors import UserError

EXAMPLE = "example: python run.py -data SPAR -algo Local,FedAvg,FedKDX -m cnn -jr 0.4 -gr 20"


def build_parser() -> Parser:
    """All flags; what is not given is absent from the namespace, or None."""
    parser = Parser(
        prog="fedkdx",
        description="Compare federated-learning algorithms on wearable and healthcare data.",
        epilog=EXAMPLE,
        allow_abbrev=False,
    )
    parser.add_argument(
        "-data", "--dataset", dest="data", help="a data set's name, a YAML file of your own, or a folder of shards"
    )
    for option in fields(Options):
        flags, default = option.metadata["flags"], option.default
        if not flags:
            continue
        choices, text = option.metadata.get("choices"), option.metadata["help"]
        shown = ",".join(default) if isinstance(default, tuple) else default
        parser.add_argument(
            *flags,
            dest=option.name,
            metavar="|".join(choices) if choices else option.name.rpartition("_")[2].upper(),
            help=text if default is None else f"{text} (default: {shown})",
        )
    parser.add_argument(
        "--set",
        action="append",
        metavar="NAME=VALUE",
        help="a hyper-parameter (FedKDX.gamma=0.5 for one algorithm alone)",
    )
    parser.add_argument("--config", metavar="YAML", help="read options from a file; the command line wins over it")
    parser.add_argument(
        "--resume", metavar="FOLDER", help="go on with an interrupted comparison; takes no other option"
    )
    parser.add_argument(
        "--experiment", metavar="NAME", help="make all runs of experiments/NAME.yaml, or of a YAML file, and a report"
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="KEY=VALUES",
        help="of an experiment: the runs of these values alone (data=SLEEP)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="of an experiment: runs side by side (default: one a CPU thread, one on a GPU)",
    )
    parser.add_argument(
        "--report", nargs="+", metavar="FOLDER", help="write a report of the runs in these folders; goes with -o alone"
    )
    parser.add_argument(
        "--tensorboard", action="store_true", help="of a comparison: write its figures for TensorBoard, too"
    )
    parser.add_argument("--list", action="store_true", help="show algorithms, models and data sets, then stop")
    parser.add_argument("--dry-run", action="store_true", help="show the resolved configuration, then stop")
    parser.add_argument("--version", action="version", version=f"fedkdx {__version__}")
    add_arguments(parser, seed_flag="--data-seed")
    return parser


def read_config(arguments: argparse.Namespace) -> Config:
    """The checked configuration: defaults <- YAML <- command line. Raises UserError."""
    given = {key: value for key, value in vars(arguments).items() if value is not None}
    for key in ("list", "dry_run", "tensorboard"):
        given.pop(key)
    for key in ("only", "jobs"):
        if key in given:
            raise UserError(f"--{key} goes with --experiment")
    path = given.pop("config", None)
    values: dict[str, Any] = read_yaml(Path(path)) if path else {}
    sets, assigned = values.get("set") or {}, dict(map(_assignment, given.pop("set", [])))
    if isinstance(sets, Mapping):  # else `from_dict` says so
        sets = dict(sets) | assigned
    return from_dict(values | given | {"set": sets}, path or "command line")


def _experiment(arguments: argparse.Namespace, command: list[str]) -> int:
    """`--experiment`: returns the exit code. Raises UserError."""
    from fedkdx_plugin import experiment, runner

    given = {key: value for key, value in vars(arguments).items() if value is not None}
    dry, _ = given.pop("dry_run"), given.pop("list")
    if given.pop("tensorboard"):
        raise UserError("--tensorboard goes with a comparison; of an experiment, see --report")
    if "config" in given:
        raise UserError("--experiment and --config exclude each other: an experiment's file is its configuration")
    name, only, jobs = given.pop("experiment"), given.pop("only", []), given.pop("jobs", None)
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs {jobs}: must be at least 1")
    planned = experiment.plan(name, given | {"set": dict(map(_assignment, given.pop("set", [])))}, only)
    if any(job.settings["engine"] != "local" for job in planned.jobs):
        raise UserError("--engine flower: the runs of an experiment take place in this process alone; leave it out")
    if dry:
        runner.show(planned)
        return 0
    return runner.run(planned, command, jobs)


def _report(arguments: argparse.Namespace) -> None:
    """`--report`. Raises UserError."""
    from fedkdx_plugin.reports import report

    given = [name for name, value in vars(arguments).items() if value not in (None, False)]
    other = [name for name in given if name not in ("report", "out")]
    if other:
        raise UserError(f"--report takes -o and no other option, such as {other[0]}")
    report.command_line(arguments.report, arguments.out)


def resumed(arguments: argparse.Namespace) -> Path | None:
    """The folder of `--resume`, whose configuration `arguments` then names; None without it. Raises UserError."""
    folder, arguments.resume = arguments.resume, None
    if folder is None:
        return None
    other = [name for name, value in vars(arguments).items() if value not in (None, False)]
    other = [name for name in other if name != "tensorboard"]
    if other:
        raise UserError(f"--resume takes the folder's own configuration and no other option, such as {other[0]}")
    arguments.config = str(Path(folder) / "config.yaml")
    if not Path(arguments.config).is_file():
        raise UserError(f"--resume {folder}: no comparison there (it should hold a config.yaml)")
    return Path(folder)


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UserError(f"--set {text}: write NAME=VALUE")
    return name.strip(), value.strip()


def show_catalog() -> None:
    """Print algorithms, models and data sets: name, one line, paper, origin; why a broken one is broken."""
    for kind in catalog.BUILT_IN:
        print(f"{'data sets' if kind == 'datasets' else kind}:")
        entries = catalog.entries(kind)
        claims = [entry.name.lower() for entry in entries]
        width = max(len(entry.name) for entry in entries)
        for entry in entries:
            about = catalog.describe(entry)
            if claims.count(entry.name.lower()) > 1:
                text = "AMBIGUOUS: several packages claim this name"
            else:
                text = f"BROKEN: {about.broken}" if about.broken else about.summary
            print(f"  {entry.name:{width}}  {text}")
            if about.sends:
                print(f"  {'':{width}}  {about.sends}")
            print(f"  {'':{width}}  " + "; ".join(filter(None, (about.paper, entry.origin))))
        print()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, 2 for wrong input, 130 after Ctrl-C."""
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        if words[:1] and words[0] in ("serve", "join", "certificates"):
            from fedkdx_plugin.distributed import commands

            return commands.main(words)
        arguments = build_parser().parse_args(words)
        if arguments.list:
            show_catalog()
            return 0
        if arguments.report:
            _report(arguments)
            return 0
        command = ["fedkdx", *words]
        folder = resumed(arguments)
        if arguments.experiment:
            return _experiment(arguments, command)
        config = read_config(arguments)
        from fedkdx_plugin import comparison

        if arguments.dry_run:
            comparison.show(config)
            return 0
        if config.engine == "flower":
            if arguments.tensorboard:
                raise UserError("--tensorboard: not with --engine flower; `fedkdx --report` reads its folders")
            from fedkdx_plugin.distributed import require_flower

            require_flower()
            from fedkdx_plugin.distributed import loopback

            return loopback.run(config, command, folder)
        return comparison.run(config, command, folder, arguments.tensorboard)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of `--list | head` has gone
        sys.stderr.close()
        return 1


if __name__ == "__main__":
    sys.exit(main())
