"""Command line: `fedkdx WORD ...`, or `python run.py ...` with PFLlib's flags.

Torch and other large packages are imported when a run begins, so that `--help` and `list` take no time.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress

from dataset_utils.consoles import safe_output
from dataset_utils.interrupts import stopping_as_ctrl_c
from registry.blame import blamed, is_expected
from registry.errors import UserError
from registry.parameters import suggest
from registry.text import shown

COMMANDS = {
    "run": "fedkdx_plugin.cli.run",
    "experiment": "fedkdx_plugin.cli.experiment",
    "report": "fedkdx_plugin.cli.report",
    "audit": "fedkdx_plugin.cli.audit",
    "resume": "fedkdx_plugin.cli.resume",
    "list": "fedkdx_plugin.cli.list",
    "data": "fedkdx_plugin.cli.data",
    "predict": "fedkdx_plugin.cli.predict",
    "export": "fedkdx_plugin.cli.export",
    "serve": "fedkdx_plugin.cli.serve",
    "join": "fedkdx_plugin.cli.join",
    "certificates": "fedkdx_plugin.cli.certificates",
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF)  # of a print, whose error names no file
BROKEN_PIPE = 141  # as of a program that SIGPIPE ends
AS_FLAGS = ("list", "report", "resume", "experiment")  # commands that are flags of run.py, too: --list, --report, ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code (see `guarded`)."""
    words = list(sys.argv[1:] if argv is None else argv)

    def command() -> int:
        name, rest = _command(words)
        chosen: Callable[[list[str]], int] = importlib.import_module(COMMANDS[name]).main
        return chosen(rest)

    return guarded(command)


def guarded(command: Callable[[], int]) -> int:
    """Run a command, and tell what stops it in one line.

    Returns:
        The exit code: 0; 1 if some runs failed; 2 for wrong input, what cannot be read or written, or if all runs
        failed; 130 after Ctrl-C; 141 where nobody reads the output any more.
    """
    safe_output()
    with stopping_as_ctrl_c() as stopping:
        try:
            return _flushed(_caught(command, stopping))
        except SystemExit as end:  # of --help, and of flags that argparse refuses
            end.code = _flushed(end.code if isinstance(end.code, int) else 0)
            raise


def _caught(command: Callable[[], int], stopping: Callable[[], bool]) -> int:
    try:
        return command()
    except UserError as error:
        kept = "" if is_expected(error) else f"; its traceback is in {_kept(error)}"
        print(f"error: {error}{kept}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return _stopped()
    except BrokenPipeError:
        return BROKEN_PIPE
    except Exception as error:
        if stopping() and not isinstance(error, OSError):  # an OSError may be that nothing could be saved
            return _stopped()
        if reason := blamed(error):
            print(f"error: {reason}; its traceback is in {_kept(error)}", file=sys.stderr)
            return 2
        if not isinstance(error, OSError):
            raise
        where = "standard output" if error.filename is None and error.errno in FULL else error.filename
        if not _flushed(0) or error.filename:  # else it was standard output, and said
            print(f"error: {f'{shown(where)}: ' if where else ''}{error.strerror or error}", file=sys.stderr)
        return 2


def _stopped() -> int:
    print("stopped", file=sys.stderr)
    return 130


def _flushed(code: int) -> int:
    """Write out what is left for standard output, now rather than when Python ends.

    Returns:
        The exit code: `code`, or another one where it cannot be written.
    """
    try:
        if sys.stdout is not None:  # as under `fedkdx list >&-`
            sys.stdout.flush()
        return code
    except OSError as error:
        with suppress(OSError, ValueError):  # a stream without a file, as in a notebook, is not tried again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):  # as in `fedkdx list | head`
            return BROKEN_PIPE
        print(f"error: standard output: {error.strerror or error}", file=sys.stderr)
        return 2


def _kept(error: Exception) -> str:
    """Write a traceback to a file and return its path, or why there is none."""
    try:
        with tempfile.NamedTemporaryFile("w", prefix="fedkdx-", suffix=".txt", delete=False, encoding="utf-8") as file:
            file.writelines(traceback.format_exception(error))
        return file.name
    except OSError as failed:
        return f"no file ({failed.strerror or failed})"


def _command(words: Sequence[str]) -> tuple[str, list[str]]:
    """Return the command and its words; without a command, it is `run`, or one of `AS_FLAGS` given as a flag."""
    if words and words[0] in COMMANDS:
        return words[0], list(words[1:])
    if words and not words[0].startswith("-"):
        raise UserError(f"unknown command '{words[0]}'{suggest(words[0], COMMANDS)}; commands: {', '.join(COMMANDS)}")
    for name in AS_FLAGS:
        for place, word in enumerate(words):
            flag, equals, value = word.partition("=")
            if flag == f"--{name}":
                # its value comes first, then the other words: `-t 3 --experiment table2` is `experiment table2 -t 3`
                after = [value, *words[place + 1 :]] if equals else list(words[place + 1 :])
                return name, [*after, *words[:place]]
    return "run", list(words)


if __name__ == "__main__":
    sys.exit(main())
