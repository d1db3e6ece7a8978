"""The command line: `fedkdx WORD ...`, or `python run.py ...` with PFLlib's flags.

Nothing heavy is imported until a run begins, so that `--help` and `list` answer at once.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from dataset_utils.consoles import safe_output
from dataset_utils.interrupts import sigterm_as_ctrl_c
from registry.errors import UserError
from registry.parameters import suggest

COMMANDS = {
    "run": "fedkdx_plugin.cli.run",
    "experiment": "fedkdx_plugin.cli.experiment",
    "report": "fedkdx_plugin.cli.report",
    "resume": "fedkdx_plugin.cli.resume",
    "list": "fedkdx_plugin.cli.list",
    "data": "fedkdx_plugin.cli.data",
    "predict": "fedkdx_plugin.cli.predict",
    "export": "fedkdx_plugin.cli.export",
    "serve": "fedkdx_plugin.cli.serve",
    "join": "fedkdx_plugin.cli.join",
    "certificates": "fedkdx_plugin.cli.certificates",
}
AS_FLAGS = ("list", "report", "resume", "experiment")  # which run.py takes as --list, --report, ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, 1 where runs failed, 2 for wrong input, 130 after Ctrl-C."""
    safe_output()
    with sigterm_as_ctrl_c():
        return _main(list(sys.argv[1:] if argv is None else argv))


def _main(words: list[str]) -> int:
    try:
        name, rest = _command(words)
        command: Callable[[list[str]], int] = importlib.import_module(COMMANDS[name]).main
        return command(rest)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of `list | head` has gone
        sys.stderr.close()
        return 1


def _command(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return a command's name and its words; without a name, what `run` is given, or the flag that stands for one."""
    if words and words[0] in COMMANDS:
        return words[0], list(words[1:])
    if words and not words[0].startswith("-"):
        raise UserError(f"unknown command '{words[0]}'{suggest(words[0], COMMANDS)}; commands: {', '.join(COMMANDS)}")
    for name in AS_FLAGS:
        for place, word in enumerate(words):
            flag, equals, value = word.partition("=")
            if flag == f"--{name}":
                # its value comes first, then all else: `-t 3 --experiment table2` is `experiment table2 -t 3`
                after = [value, *words[place + 1 :]] if equals else list(words[place + 1 :])
                return name, [*after, *words[:place]]
    return "run", list(words)


if __name__ == "__main__":
    sys.exit(main())
