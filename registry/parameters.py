"""Hyper-parameters: frozen dataclasses whose fields carry their help and range."""

from __future__ import annotations

import dataclasses
import difflib
import math
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin, get_type_hints

from registry.errors import UserError


@dataclass(frozen=True)
class Params:
    """Base class of the hyper-parameters of an algorithm; an algorithm without any uses it as it is.

    Instances check themselves when they are made: every value is converted to the type of its field and must lie in
    the field's range (see `hyper`).

    Raises:
        UserError: a value has the wrong type or is out of range.
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for own in dataclasses.fields(self):
            where = f"{type(self).__name__}: {own.name}"
            value = convert(getattr(self, own.name), hints[own.name], where)
            check(value, own.metadata, where)
            object.__setattr__(self, own.name, value)


def hyper(
    default: Any, help: str, low: float | None = None, high: float | None = None, choices: tuple[str, ...] = ()
) -> Any:
    """Declare a hyper-parameter as a dataclass field.

    Args:
        default: default value.
        help: one line of help.
        low, high: inclusive bounds of a number.
        choices: allowed values of a string, or of each item of a tuple of strings.
    """
    return field(default=default, metadata={"help": help, "low": low, "high": high, "choices": choices})


def parse(cls: type, values: dict[str, Any], where: str) -> Any:
    """Return an instance of the parameter dataclass `cls`, with `values` in place of its defaults.

    Args:
        cls: a dataclass whose fields `hyper` declares.
        values: name -> value, as text or typed.
        where: what the values belong to, for error messages.

    Raises:
        UserError: a name is unknown, or a value has the wrong type or is out of range.
    """
    hints = get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    typed = {}
    for name, value in values.items():
        if name not in fields:
            known = ", ".join(fields) or "none"
            raise UserError(f"{where}: unknown name '{name}'{suggest(name, fields)}; it has: {known}")
        typed[name] = convert(value, hints[name], f"{where}: {name}")
        check(typed[name], fields[name].metadata, f"{where}: {name}")
    return cls(**typed)


def convert(value: Any, kind: Any, where: str) -> Any:
    """Convert `value` to `kind` (bool, int, float, str, X | None or tuple[str, ...]). Raises UserError."""
    options = get_args(kind)
    if type(None) in options:
        if value is None:
            return None
        kind = next(option for option in options if option is not type(None))
    if get_origin(kind) is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise UserError(f"{where}: {value!r} is not a list; write a,b,c")
        return tuple(str(item).strip() for item in items if str(item).strip())
    if kind is bool:
        words = {
            "true": True,
            "1": True,
            "yes": True,
            "on": True,
            "false": False,
            "0": False,
            "no": False,
            "off": False,
        }
        word = str(value).strip().lower()
        if word not in words:
            raise UserError(f"{where}: {value!r} is neither true nor false; write one of them")
        return words[word]
    if kind is str:
        if isinstance(value, (dict, list)):
            raise UserError(f"{where}: {value!r} is not a text")
        return str(value)
    return _number(value, kind, where)


def _number(value: Any, kind: type, where: str) -> int | float:
    noun = "a whole number" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(f"{where}: {value!r} is not {noun}")
    try:
        number = float(value)
    except ValueError:
        raise UserError(f"{where}: {value!r} is not {noun}") from None
    if not math.isfinite(number) or (kind is int and number != int(number)):
        raise UserError(f"{where}: {value!r} is not {noun}")
    return int(number) if kind is int else number


def check(value: Any, metadata: Any, where: str) -> None:
    """Raise UserError if `value` is outside the range in `metadata` (see `hyper`)."""
    if value is None:
        return
    low, high, choices = metadata.get("low"), metadata.get("high"), metadata.get("choices")
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"at most {high}" if low is None else f"in [{low}, {high}]"
        raise UserError(f"{where}: {value:g} is out of range; it must be {bounds}")
    for item in value if isinstance(value, tuple) else (value,):
        if choices and item not in choices:
            raise UserError(
                f"{where}: '{item}' is unknown{suggest(str(item), choices)}; choose from {', '.join(choices)}"
            )


def suggest(word: str, known: Any) -> str:
    """Return ' (did you mean X?)', or '' if no known name is close; upper and lower case are equal."""
    by_lower = {str(name).lower(): str(name) for name in known}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.6)
    return f" (did you mean {by_lower[close[0]]}?)" if close else ""
