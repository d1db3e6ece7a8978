"""Text from outside, as it may be shown and as it may be part of a path: one function for each."""

from __future__ import annotations

LONGEST = 200  # letters of a text that is shown
LONGEST_NAME = 100  # letters; with a run's own ending it stays below what file systems take
FORBIDDEN = frozenset('/\\:*?"<>|')  # in the names of files, on some system


def shown(text: object, longest: int = LONGEST) -> str:
    """Return a text in one line that a terminal shows as it is: control characters replaced by '?', shortened."""
    line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(text).split()))
    return line if len(line) <= longest else f"{line[:longest]}..."


def is_shown_as_it_is(text: str, longest: int = LONGEST_NAME) -> bool:
    """Return whether a text is short, printable and without spaces at its ends."""
    return 0 < len(text) <= longest and text.isprintable() and text == text.strip()


def is_plain_name(name: object) -> bool:
    """Return whether `name` can name a folder on any system: a short, printable text, no path, not hidden."""
    if not isinstance(name, str) or not is_shown_as_it_is(name):
        return False
    return name == name.strip(" .") and not FORBIDDEN & set(name)
