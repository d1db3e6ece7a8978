"""Text from outside, as it may be shown and as it may be part of a path: one function for each."""

from __future__ import annotations

import re
from unicodedata import normalize

LONGEST = 200  # letters of a text that is shown
LONGEST_NAME = 100  # letters; with a run's own ending it stays below what file systems take
NAMES = f"names have 1 to {LONGEST_NAME} letters that can be printed"
FORBIDDEN = frozenset('/\\:*?"<>|')  # in the names of files, on some system


def in_one_line(text: object) -> str:
    """Return a text with each character that a terminal does not show as it is, such as a newline, replaced by '?'."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text))


def shown(text: object, longest: int = LONGEST) -> str:
    """Return a text in one line that a terminal shows as it is: control characters replaced by '?', shortened."""
    line = in_one_line(" ".join(str(text).split()))
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


def spelt_alike(name: str) -> str:
    """Return the form by which names are compared: an ö is one letter, where some systems write an o and two dots."""
    return normalize("NFC", name)


def natural(name: str) -> tuple[list[str | int], str]:
    """Return a sorting key that puts "subject2" before "subject10"."""
    parts: list[str | int] = list(re.split(r"(\d+)", name))
    parts[1::2] = [int(digits) for digits in parts[1::2]]
    return parts, name


def is_shown_as_it_is(text: str, longest: int = LONGEST_NAME) -> bool:
    """Return whether a text is short, printable and without spaces at its ends."""
    return 0 < len(text) <= longest and text.isprintable() and text == text.strip()


def can_be_shown(name: object) -> bool:
    """Return whether `name` can name a class, a channel or a subject: a short, printable text that is not blank."""
    return isinstance(name, str) and len(name) <= LONGEST_NAME and name.isprintable() and bool(name.strip())


def is_plain_name(name: object) -> bool:
    """Return whether `name` can name a folder on any system: a short, printable text, no path, not hidden."""
    if not isinstance(name, str) or not is_shown_as_it_is(name):
        return False
    return name == name.strip(" .") and not FORBIDDEN & set(name)
