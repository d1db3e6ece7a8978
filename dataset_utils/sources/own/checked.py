"""Checked access to the values of a YAML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from registry.errors import UserError
from registry.parameters import suggest
from registry.text import can_be_shown, shown

LARGEST = 1e15
"""Numbers lie below it, so that products of them are finite."""
TO_FILL = "???"
"""Value of what a draft leaves to its author."""


def quoted(value: Any) -> str:
    """Return a value of a YAML file as messages quote it."""
    return shown(repr(value))


class Checked:
    """A mapping in a YAML file.

    Attributes:
        path: the file, for messages.
        values: the mapping.
        within: key whose value the mapping is; '' for the whole file.
    """

    def __init__(
        self, path: Path, values: Any, required: Sequence[str], optional: Sequence[str] = (), within: str = ""
    ) -> None:
        """Raise UserError if `values` is no mapping, or a key of it is unknown, missing or to be filled in."""
        self.path, self.values, self.within = path, values, within
        known = (*required, *optional)
        if not isinstance(values, Mapping):
            raise self.error(f"must hold keys and values ({', '.join(known)}); see docs/guide/own-data.md")
        for key in values:
            if key not in known:
                name = quoted(key) if not isinstance(key, str) else shown(key)
                raise self.error(f"unknown key '{name}'{suggest(name, known)}; it has: {', '.join(known)}")
            if values[key] == TO_FILL:
                raise self.error(f"'{key}' is to be filled in: replace {TO_FILL}; see docs/guide/own-data.md")
        for key in required:
            if key not in values:
                raise self.error(f"the key '{key}' is missing; it needs: {', '.join(required)}")

    def error(self, text: str) -> UserError:
        """Return an error that names the file and the key."""
        return UserError(f"{self.path}: {f'{self.within}: ' if self.within else ''}{text}")

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value unchecked; `default` where it is left out or empty."""
        value = self.values.get(key)
        return default if value is None else value

    def text(self, key: str, default: Any = ...) -> Any:
        """Return a word."""
        value = self.values.get(key, default)
        if value is not default and not (isinstance(value, str) and value.strip() and value.isprintable()):
            raise self.error(f"'{key}' must be a word, not {quoted(value)}")
        return value

    def column(self, key: str, default: Any = ...) -> Any:
        """Return the name of a column, which may look like a number."""
        value = self.values.get(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, str | int) or not can_be_shown(str(value)):
            raise self.error(f"'{key}' must name a column, not {quoted(value)}")
        return str(value)

    def names(self, key: str, default: Any = ...) -> Any:
        """Return a tuple of distinct names."""
        value = self.values.get(key, default)
        if value is default:
            return value
        if not isinstance(value, list) or not value or not all(can_be_shown(item) for item in value):
            raise self.error(f"'{key}' must be a list of column names like [ax, ay, az], not {quoted(value)}")
        if len(set(value)) < len(value):
            raise self.error(f"'{key}' names a column twice")
        return tuple(value)

    def number(self, key: str, default: Any = ..., low: float = 0, high: float = LARGEST) -> Any:
        """Return a number of at least `low` and below `high`."""
        value = self.values.get(key, default)
        if value is default:
            return value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
            limits = f"of at least {low:g}" + (f" and below {high:g}" if high < LARGEST else "")
            raise self.error(f"'{key}' must be a number {limits}, not {quoted(value)}")
        return float(value)

    def choice(self, key: str, choices: Sequence[str], default: Any = ...) -> Any:
        """Return one of several words."""
        value = self.values.get(key, default)
        if value is not default and value not in choices:
            raise self.error(f"'{key}' must be one of {', '.join(choices)}, not {quoted(value)}")
        return value
