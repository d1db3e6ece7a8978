"""A draft as the text of a YAML file, with a comment on each key, and in words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dataset_utils.counts import many
from dataset_utils.draft.drafting import Draft
from dataset_utils.draft.entries import FOUND, GUESSED, MISSING, Entry
from dataset_utils.sources.own.checked import TO_FILL
from registry.text import shown

BESIDE = 60
"""Longest line that has its comment beside it rather than above."""
COMMENT = 400
"""Letters of a comment."""


def text_of(draft: Draft, path: Path) -> str:
    """Return the text of the YAML file at `path`."""
    lines = [
        f"# A draft, from {_looked(draft)}. Check it, above all what is marked as a guess, and replace each {TO_FILL}.",
        f"# Then: fedkdx data describe {shown(path)}",
        "# What a description may hold: docs/guide/own-data.md",
    ]
    for entry in draft.entries:
        value = _value(entry.value)
        line = f"{entry.key}:{value}" if value.startswith("\n") else f"{entry.key}: {value}"
        words = "" if entry.how == FOUND else f"{entry.how}: "
        comment = f"# {words}{shown(entry.why, COMMENT)}" if entry.why else ""
        if not comment:
            lines.append(line)
        elif len(line) <= BESIDE and "\n" not in line:
            lines.append(f"{line:<28}{comment}" if len(line) < 28 else f"{line}  {comment}")
        else:
            lines += [comment, line]
    return "\n".join(lines) + "\n"


def told(draft: Draft) -> Iterator[str]:
    """Yield lines on what was found, guessed, left out and could not be found."""
    yield f"{shown(draft.folder)}: {_looked(draft)}"
    for how in (FOUND, GUESSED, MISSING):
        for entry in draft.entries:
            if entry.how == how and entry.why:
                yield f"{how}: {_in_words(entry)}"
    for text in draft.told:
        yield f"note: {shown(text, COMMENT)}"


def missing(draft: Draft) -> list[str]:
    """Return the keys that are to be filled in."""
    return [entry.key for entry in draft.entries if entry.how == MISSING]


def _in_words(entry: Entry) -> str:
    value = "" if entry.value == TO_FILL else f" {_value(entry.value)}"
    return shown(f"{entry.key}{value} ({entry.why})", COMMENT)


def _looked(draft: Draft) -> str:
    if draft.looked == len(draft.files):
        return many(draft.looked, "file")
    return f"many rows of {draft.looked} of {many(len(draft.files), 'file')}"


def _value(value: Any) -> str:
    """Return a value as YAML in one line; a list of mappings has a line each."""
    import yaml

    if isinstance(value, list) and value and isinstance(value[0], dict):
        return "".join(f"\n  - {_value(own)}" for own in value)
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=float("inf"))
    return text.removesuffix("...\n").strip()
