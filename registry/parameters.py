"""Declared values: frozen dataclasses whose fields carry their own help, range and flag."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin, get_type_hints

from registry.errors import UserError
from registry.text import shown

SMALLEST = 1e-9  # a positive lower bound up to here stands for: not 0
WIDEST = 2**63  # whole numbers of 64 bits lie below it
WORDS = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)


def option(
    default: Any,
    help: str,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    *,
    above: float | None = None,
    below: float | None = None,
    flags: str = "",
    key: str = "",
    switch: bool = False,
    filled: bool = False,
) -> Any:
    """Declare a value as a dataclass field: its default, one line of help, and what it may be.

    From this one declaration come the check of a value wherever it is given (Python, YAML, command line), its
    command-line flag and its help.

    Args:
        low, high: inclusive bounds of a number.
        choices: what a text, or each item of a tuple of texts, may be.
        above, below: exclusive bounds of a number.
        flags: of the command line, separated by spaces, in kebab case; '' where it has none.
        key: its name in YAML and on the command line, where that is not the field's.
        switch: of a truth value: the flag alone means true.
        filled: of a list: a text without a name, such as ',', is an error rather than the empty list.
    """
    limits = {"low": low, "high": high, "above": above, "below": below, "choices": choices}
    shape = {"flags": flags.split(), "key": key, "switch": switch, "filled": filled}
    return field(default=default, metadata={"help": help, **shape, **limits})


@functools.lru_cache(maxsize=256)
def _hints(cls: type) -> dict[str, Any]:
    """Return name -> type of a class's fields, resolved once."""
    return get_type_hints(cls)


@dataclass(frozen=True)
class Params:
    """Declared values that have checked themselves, wherever an instance is made.

    The base class of every algorithm's hyper-parameters; an algorithm without any uses it as it is. Each value is
    converted to the type of its field and must lie in the field's range (see `option`).

    Raises:
        UserError: a value has the wrong type or is out of range.
    """

    def __post_init__(self) -> None:
        cls: type = type(self)
        hints = _hints(cls)
        for own in dataclasses.fields(self):
            if "help" not in own.metadata:
                continue
            where = (own.metadata.get("flags") or [f"{type(self).__name__}: {own.name}"])[0]
            object.__setattr__(self, own.name, _typed(getattr(self, own.name), own, hints[own.name], where))


def key_of(own: dataclasses.Field[Any]) -> str:
    """Return a field's name in YAML and on the command line."""
    return own.metadata.get("key") or own.name


def parse(cls: type, values: Mapping[str, Any], where: str = "") -> Any:
    """Make an instance of the dataclass `cls`, with `values` (text or typed, by key) over its defaults.

    Args:
        where: what the values belong to, for error messages; '' names each by its flag.

    Raises:
        UserError: a name is unknown, or a value has the wrong type or is out of range.
    """
    hints = _hints(cls)
    fields = {key_of(f): f for f in dataclasses.fields(cls)}
    typed = {}
    for key, value in values.items():
        if key not in fields:
            known = ", ".join(fields) or "none"
            raise UserError(f"{where}: unknown name '{key}'{suggest(str(key), fields)}; it has: {known}")
        own = fields[key]
        label = f"{where}: {key}" if where else (own.metadata.get("flags") or [key])[0]
        typed[own.name] = _typed(value, own, hints[own.name], label)
    return cls(**typed)


def _typed(value: Any, own: dataclasses.Field[Any], kind: Any, where: str) -> Any:
    """Return the value of a field as its type, checked. Raises UserError: it is not of that type, or out of range."""
    typed = convert(value, kind, where)
    if own.metadata.get("filled") and not typed and value not in ([], ()):
        raise UserError(f"{where}: {value!r} names nothing; write a,b,c, or leave it out")
    check(typed, own.metadata, where)
    return typed


def convert(value: Any, kind: Any, where: str) -> Any:
    """Return `value` as `kind`: bool, int, float, str, tuple[str, ...], or a union of these with each other or None.

    Raises:
        UserError: it is not of that kind, and no text that says one.
    """
    kinds = [kind] if not (options := get_args(kind)) or get_origin(kind) is tuple else list(options)
    if type(None) in kinds:
        if value is None:
            return None
        kinds.remove(type(None))
    for last, candidate in enumerate(kinds, 1):
        try:
            return _as(value, candidate, where)
        except UserError:
            if last == len(kinds):
                raise
    raise UserError(f"{where}: {value!r} cannot be understood")


def _as(value: Any, kind: Any, where: str) -> Any:
    if get_origin(kind) is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)):
            raise UserError(f"{where}: {value!r} is not a list; write a,b,c")
        return tuple(str(item).strip() for item in items if str(item).strip())
    if kind is bool:
        word = str(value).strip().lower()
        if word not in WORDS:
            raise UserError(f"{where}: {value!r} is neither true nor false")
        return WORDS[word]
    if kind is str:
        if value is None or isinstance(value, (dict, list)):
            raise UserError(f"{where}: {value!r} is not a text")
        return str(value)
    return _number(value, kind, where)


def _number(value: Any, kind: type, where: str) -> int | float:
    noun = "a whole number" if kind is int else "a number"
    if not isinstance(value, (str, int, float)) and hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()  # of NumPy or PyTorch
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise UserError(f"{where}: {value!r} is not {noun}")
    try:  # a whole number is read as one: as a float it loses its last digits above 2**53
        number = int(value) if kind is int and not isinstance(value, float) else float(value)
    except (ValueError, OverflowError):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise UserError(f"{where}: {value!r} is not {noun}") from None
    if isinstance(number, float) and (not math.isfinite(number) or (kind is int and number != int(number))):
        raise UserError(f"{where}: {value!r} is not {noun}")
    if kind is int and abs(number) >= WIDEST:
        raise UserError(f"{where}: {shown(value)} is too large; whole numbers lie below {WIDEST}")
    return int(number) if kind is int else number


def check(value: Any, metadata: Mapping[str, Any], where: str) -> None:
    """Raise UserError where `value` is outside the range that `metadata` (see `option`) states."""
    if value is None or isinstance(value, bool):
        return
    limits = bounds(metadata)
    if limits and not isinstance(value, (str, tuple)) and not all(fits(value) for _, fits in limits):
        text = " and ".join(words for words, _ in limits)
        written = f"{value:g}" if isinstance(value, float) else value
        raise UserError(f"{where}: {written} is out of range; it must be {text}")
    choices = metadata.get("choices")
    for item in value if isinstance(value, tuple) else (value,):
        if choices and item not in choices:
            raise UserError(
                f"{where}: '{item}' is unknown{suggest(str(item), choices)}; choose from {', '.join(choices)}"
            )


def bounds(metadata: Mapping[str, Any]) -> list[tuple[str, Callable[[float], bool]]]:
    """Return the bounds of a number, each in words and as a test."""
    low, high, above, below = (metadata.get(name) for name in ("low", "high", "above", "below"))
    found: list[tuple[str, Callable[[float], bool]]] = []
    if low is not None:
        words = "above 0" if 0 < low <= SMALLEST else f"at least {low:g}"
        found.append((words, lambda value: value >= low))
    if above is not None:
        found.append((f"above {above:g}", lambda value: value > above))
    if high is not None:
        found.append((f"at most {high:g}", lambda value: value <= high))
    if below is not None:
        found.append((f"below {below:g}", lambda value: value < below))
    return found


def suggest(word: str, known: Any) -> str:
    """Return ' (did you mean X?)', or '' if no known name is close; upper and lower case are equal.

    The same number written otherwise, such as 00 for 0, is nearest, and the first of names that are equally near.
    """
    matcher = difflib.SequenceMatcher()
    matcher.set_seq2(word.lower())
    nearest, best = 0.6, ""
    for name in map(str, known):
        matcher.set_seq1(name.lower())
        same = word.isdecimal() and name.isdecimal() and int(word) == int(name)
        if (near := 2.0 if same else matcher.ratio()) > nearest or (near == nearest and not best):
            nearest, best = near, name
    return f" (did you mean {best}?)" if best else ""
