"""The command line: `python run.py ...`, or `fedkdx ...` once installed.

Nothing heavy is imported until a run begins, so that `--help` and `--list` answer at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dataset_utils.consoles import safe_output
from dataset_utils.interrupts import sigterm_as_ctrl_c
from fedkdx_plugin.cli.arguments import assignment, build_parser, read_config, resumed
from fedkdx_plugin.configuration.config import Config
from registry import catalog
from registry.errors import UserError


def _experiment(arguments: argparse.Namespace, command: list[str]) -> int:
    """`--experiment`: returns the exit code. Raises UserError."""
    from fedkdx_plugin.experiments import experiment, runner

    given = {key: value for key, value in vars(arguments).items() if value is not None}
    dry, _ = given.pop("dry_run"), given.pop("list")
    if given.pop("tensorboard"):
        raise UserError("--tensorboard goes with a comparison; of an experiment, see --report")
    if "config" in given:
        raise UserError("--experiment and --config exclude each other: an experiment's file is its configuration")
    name, only, jobs = given.pop("experiment"), given.pop("only", []), given.pop("jobs", None)
    if jobs is not None and jobs < 1:
        raise UserError(f"--jobs {jobs}: must be at least 1")
    planned = experiment.plan(name, given | {"set": dict(map(assignment, given.pop("set", [])))}, only)
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


def _compare(config: Config, arguments: argparse.Namespace, command: list[str], folder: Path | None) -> int:
    """A comparison, in this process or on Flower. Returns the exit code; raises UserError."""
    from fedkdx_plugin.experiments import comparison

    if arguments.dry_run:
        return comparison.show(config)
    if config.engine == "flower":
        if arguments.tensorboard:
            raise UserError("--tensorboard: not with --engine flower; `fedkdx --report` reads its folders")
        from fedkdx_plugin.flower import require_flower

        require_flower()
        from fedkdx_plugin.flower import loopback

        return loopback.run(config, command, folder)
    return comparison.run(config, command, folder, arguments.tensorboard)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, 2 for wrong input, 130 after Ctrl-C."""
    safe_output()
    with sigterm_as_ctrl_c():
        return _main(list(sys.argv[1:] if argv is None else argv))


def _main(words: list[str]) -> int:
    try:
        if words[:2] == ["data", "describe"]:
            from dataset_utils import describe

            return describe.main(words[2:], "fedkdx data describe")
        if words[:1] and words[0] in ("serve", "join", "certificates"):
            from fedkdx_plugin.flower import commands

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
        from fedkdx_plugin.experiments import comparison

        with comparison.where_it_began(folder):
            return _compare(config, arguments, command, folder)
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
