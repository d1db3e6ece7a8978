"""Command-line flags of declared values (see `registry.parameters.option`)."""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from registry.errors import UserError
from registry.parameters import Params, key_of, suggest
from registry.text import shown


class Parser(argparse.ArgumentParser):
    """A parser of command lines that reports a wrong one as a UserError: one line.

    `--join_ratio` and `--join-ratio` are the same flag; flags are not abbreviated.

    Args:
        elsewhere: flags of other commands, which this one does not have, each with what to say to whoever gives it.
    """

    def __init__(self, *args: Any, elsewhere: Mapping[str, str] | None = None, **options: Any) -> None:
        super().__init__(*args, **options | {"allow_abbrev": False})
        self.elsewhere = elsewhere or {}

    @property
    def flags(self) -> frozenset[str]:
        """All flags."""
        return frozenset(flag for action in self._actions for flag in action.option_strings)

    def error(self, message: str) -> NoReturn:
        """Raise a UserError with what argparse says, and which flag may be meant."""
        unknown = re.fullmatch(r"unrecognized arguments: (-[^\s=]+)\b.*", message, re.DOTALL)
        if unknown and unknown[1] in self.elsewhere:
            raise UserError(f"{shown(message)}; {self.elsewhere[unknown[1]]}")
        meant = suggest(unknown[1], [flag for flag in self.flags if flag.startswith("--")]) if unknown else ""
        listed = message.startswith("unrecognized arguments: ")  # all that a pattern of the shell stands for, perhaps
        raise UserError(f"{shown(message) if listed else message}{meant}; see --help")

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print a text. Raises OSError where it cannot be written, which argparse keeps to itself."""
        (file or sys.stderr).write(message)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse words as argparse does, long flags in snake case like those in kebab case."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([_kebab(word) for word in words], namespace)


def _kebab(word: str) -> str:
    """Return a long flag with '-' instead of '_', and any other word as it is."""
    flag = re.match(r"--[A-Za-z][\w-]*", word)
    return flag[0].replace("_", "-") + word[flag.end() :] if flag else word


def add_flags(
    parser: argparse._ActionsContainer,
    declared: type[Params],
    flags: Mapping[str, str] | None = None,
    only: Sequence[str] | None = None,
) -> None:
    """Add a flag for each value of a class that has one. Values come as text or None, to be checked by `parse`.

    Args:
        declared: a class whose fields are made by `option`.
        flags: field name -> flags that take the place of its own.
        only: names of the fields to add, in this order; by default all.
    """
    fields = {own.name: own for own in dataclasses.fields(declared)}
    for own in fields.values() if only is None else (fields[name] for name in only):
        names = (flags or {}).get(own.name, " ".join(own.metadata["flags"])).split()
        if not names:
            continue
        text, default = own.metadata["help"], own.default
        if default is not None and not own.metadata["switch"]:
            words = (
                ",".join(default) if isinstance(default, tuple) else f"{default:g}" if _is_number(default) else default
            )
            text = f"{text} (default: {words})" if words != "" else text
        text = text.replace("%", "%%")
        if own.metadata["switch"]:
            parser.add_argument(*names, dest=key_of(own), action="store_true", default=None, help=text)
        else:
            choices = own.metadata["choices"]
            metavar = "|".join(choices) if choices else own.name.rpartition("_")[2].upper()
            parser.add_argument(*names, dest=key_of(own), metavar=metavar, help=text)


def given(arguments: argparse.Namespace, declared: type[Params]) -> dict[str, Any]:
    """Take the values of a class out of parsed arguments: by key, without those that were not given."""
    keys = [key_of(own) for own in dataclasses.fields(declared) if hasattr(arguments, key_of(own))]
    values = {key: vars(arguments).pop(key) for key in keys}
    return {key: value for key, value in values.items() if value is not None}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
