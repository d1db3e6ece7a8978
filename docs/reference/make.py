"""Write the pages of this folder that follow from the declarations in the code: `python docs/reference/make.py`.

`command-line.md` has every command, flag and option, `hyper-parameters.md` those of every algorithm. A test fails where
a page differs from what this script would write.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from dataset_utils.spec import Files, ShardSpec
from fedkdx_plugin.cli.main import COMMANDS
from fedkdx_plugin.cli.options import GROUPS, Making
from fedkdx_plugin.cli.run import EXAMPLE
from fedkdx_plugin.configuration.config import Options
from registry import catalog
from registry.parameters import Params, bounds, key_of

FOLDER = Path(__file__).parent
MADE = "<!-- Written by docs/reference/make.py: change the declarations in the code, and run it again. -->"
DATA_WORDS = ("init", "describe", "make", "import-pfllib")


class _Found(Exception):
    """Carries a parser out of the command that was about to use it."""


def parser_of(words: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser that a command such as ('data', 'make') makes, without running the command."""

    def found(self: argparse.ArgumentParser, *_: object, **__: object) -> None:
        raise _Found(self)

    with mock.patch.object(argparse.ArgumentParser, "parse_args", found):
        try:
            importlib.import_module(COMMANDS[words[0]]).main(list(words[1:]))
        except _Found as carried:
            return carried.args[0]
    raise RuntimeError(f"{' '.join(words)} parses nothing")


def commands() -> list[tuple[str, ...]]:
    """Return every command, `data` as its own."""
    return [
        (name, *rest) for name in COMMANDS for rest in ([(word,) for word in DATA_WORDS] if name == "data" else [()])
    ]


def command_line() -> str:
    """Return the page of commands, flags and options."""
    run = parser_of(["run"])
    data = ("`-data`, `--dataset`", "`data`", "", "", _help_of(run, "--dataset"))
    head = ("flag", "option", "default", "values", "meaning")
    declared = {own.name: row for own, row in zip(_declared(Options), _declared_rows([Options]), strict=True)}
    first = [data, ("`--set NAME=VALUE`", "`set`", "", "", _help_of(run, "--set"))]
    parts = [
        "# Command line",
        MADE,
        "`fedkdx COMMAND ...`, or `python run.py COMMAND ...` in a checkout. Without a command, the flags are those of "
        "`run`; `--list`, `--report`, `--resume` and `--experiment` stand for the commands of these names. Long flags "
        "are accepted with hyphens and with underscores. Every command has `--help`.",
        _table(("command", "purpose"), [(f"[`{' '.join(c)}`](#{'-'.join(c)})", _about(c)) for c in commands()]),
        "The exit code is 0 for success, 1 where some runs failed or accepted no reply in any round, 2 for wrong "
        "input, for what cannot be read or written, and where all runs failed so, 130 after Ctrl-C, and 141 where "
        "nobody reads the output any more.",
        "## run",
        _about(["run"]),
        f"{EXAMPLE[0].upper()}{EXAMPLE[1:]}",
        "An option in a YAML file (`--config`, `base:` of an experiment) or in Python (`fedkdx.compare`) has the name "
        "in the second column.",
    ]
    for title, names in GROUPS.items():
        parts += [f"### {title.capitalize()}", _table(head, [*first, *(declared[name] for name in names)])]
        first = []
    parts += [
        "### Data options",
        _table(head, _declared_rows([ShardSpec, Files], ["data"])),
        "### Other flags of run",
        _table(
            ("flag", "default", "values", "meaning"),
            [(flag, *rest) for flag, _, *rest in _declared_rows([Making])]
            + [("`--config YAML`", "", "", _help_of(run, "--config")), ("`--version`", "", "", "print the version")],
        ),
    ]
    for command in commands():
        if command != ("run",):
            parts += _other(command, run)
    return "\n\n".join(parts) + "\n"


def hyper_parameters() -> str:
    """Return the page of every algorithm's hyper-parameters."""
    parts = [
        "# Hyper-parameters",
        MADE,
        "Set one with `--set NAME=VALUE`, or `--set ALGORITHM.NAME=VALUE` for one algorithm alone; in YAML and in "
        'Python under `set` (`set={"FedKDX.gamma": 0.5}`). [algorithms.md](algorithms.md) says what each is for.',
    ]
    without = []
    for entry in catalog.entries("algorithms"):
        if entry.origin != catalog.OURS:
            continue
        rows = [row[1:] for row in _declared_rows([catalog.load("algorithms", entry.name).Params])]
        if rows:
            parts += [f"## {entry.name}", _table(("name", "default", "values", "meaning"), rows)]
        else:
            without.append(f"`{entry.name}`")
    return "\n\n".join([*parts, f"Without hyper-parameters: {', '.join(without)}."]) + "\n"


def _other(command: Sequence[str], run: argparse.ArgumentParser) -> list[str]:
    """Return the section of a command that is not `run`; options that it shares with `run` are not repeated."""
    parser = parser_of(command)
    of_data = {
        flag for own in (ShardSpec, Files) for field in dataclasses.fields(own) for flag in field.metadata["flags"]
    }
    of_run = {_identity(action) for action in run._actions}
    actions = [action for action in parser._actions if action.dest not in ("help", "version")]
    shared = [action for action in actions if _identity(action) in of_run]
    data = [action for action in shared if of_data.issuperset(action.option_strings)]
    parts, hidden = [f"## {' '.join(command)}", _usage(command)], []
    if len(shared) > len(data) + len(dataclasses.fields(Making)):
        parts, hidden = [*parts, "It takes the options of [`run`](#run), and these:"], shared
    elif data:
        parts, hidden = [*parts, "It takes the [data options](#data-options), and these:"], data
    rows = [(_name(action), _help(parser, action)) for action in actions if action not in hidden]
    return [*parts, _table(("argument", "meaning"), rows)] if rows else parts


def _identity(action: argparse.Action) -> tuple[object, ...]:
    return (*action.option_strings, action.dest, action.help)


def _usage(command: Sequence[str]) -> str:
    parser = parser_of(command)
    return "\n\n".join(f"{text[0].upper()}{text[1:]}" for text in filter(None, (parser.description, parser.epilog)))


def _about(command: Sequence[str]) -> str:
    return parser_of(command).description or ""


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return parser._get_formatter()._expand_help(action) if action.help else ""


def _help_of(parser: argparse.ArgumentParser, flag: str) -> str:
    return next(_help(parser, action) for action in parser._actions if flag in action.option_strings)


def _name(action: argparse.Action) -> str:
    """Return a flag with the place of its value, or the name of a positional argument."""
    value = action.metavar or ("|".join(map(str, action.choices)) if action.choices else action.dest.upper())
    if not action.option_strings:
        return f"`{value}`"
    names = ", ".join(f"`{flag}`" for flag in action.option_strings)
    return names if action.nargs == 0 else f"{names} `{value}`"


def _declared(cls: type[Params]) -> list[dataclasses.Field[Any]]:
    return [own for own in dataclasses.fields(cls) if "help" in own.metadata]


def _declared_rows(declared: Iterable[type[Params]], leave_out: Iterable[str] = ()) -> list[tuple[str, ...]]:
    """Return a row for each declared value: flags, name, default, values, help."""
    rows = []
    for cls in declared:
        for own in _declared(cls):
            if own.name not in set(leave_out):
                flags = ", ".join(f"`{flag}`" for flag in own.metadata["flags"])
                default = _shown(own.default)
                rows.append((flags, f"`{key_of(own)}`", default, _values(own.metadata), own.metadata["help"]))
    return rows


def _shown(default: Any) -> str:
    if default in (None, "", ()) or default is dataclasses.MISSING:
        return ""
    text = ",".join(default) if isinstance(default, tuple) else f"{default:g}" if _is_number(default) else str(default)
    return f"`{text.lower() if isinstance(default, bool) else text}`"


def _values(limits: Mapping[str, Any]) -> str:
    """Return what a declared value may be."""
    if limits["choices"]:
        return ", ".join(f"`{choice}`" for choice in limits["choices"])
    return ", ".join(words for words, _ in bounds(limits))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in lines)


PAGES = {"command-line.md": command_line, "hyper-parameters.md": hyper_parameters}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")
