"""Layout of a text file of which no column is known yet: separator, header, first row."""

from __future__ import annotations

import codecs
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset_utils.sources.own import dialect as dialects
from dataset_utils.sources.own.table import is_date
from dataset_utils.sources.own.text_files import MISSING
from registry.errors import UserError
from registry.text import can_be_shown, shown

DATE = re.compile(r"\d{1,4}[./-]\d{1,2}[./-]\d{2,4}([ T].*)?")
"""Dates of any order."""
CLOCK_START = 1e9
"""Seconds since 1970 of a first line that says when a recording begins (Empatica)."""

WIDE = 32
"""Columns without names from which on a row may be a window."""


@dataclass(frozen=True)
class Layout:
    """Layout of a text file.

    Attributes:
        names: columns with a name, in order.
        dialect: what the key `dialect` must say for the file to be read; {} where the reader finds out by itself.
        skip: lines before the first row.
        rate: sampling rate that the file states, Hz, or None.
        told: remarks.
    """

    names: tuple[str, ...]
    dialect: dict[str, Any]
    skip: int
    rate: float | None
    told: tuple[str, ...]


def layout_of(head: bytes, file: Path) -> Layout:
    """Return the layout of a text file that begins with `head`. Raises UserError where it is no table."""
    lines = _lines(head, file)
    separator, rows = _separated(lines, file)
    width = Counter(len(row) for _, row in rows).most_common(1)[0][0]
    rows = [(number, row) for number, row in rows if len(row) == width]
    numeric = _numeric([row for _, row in rows], width)
    first = next((at for at, row in rows if numeric and all(_fits(row[n]) for n in numeric) and _any(row, numeric)), 0)
    used = width - 1 if width > 1 and all(not row[-1].strip() for at, row in rows if at >= first) else width
    block = _above(lines, first if numeric else 1, separator, {width, used})
    if not block:
        return _nameless(rows, first, used, separator)
    at, names = block[0]
    names = names[:used]
    unique = _unique(names)
    skip = first if numeric else at + 1
    between = [line for line in lines[at + 1 : first] if line.strip()] if numeric else []
    if names == unique and not between:
        return Layout(tuple(name for name in names if name), {}, skip, None, ())
    told = []
    if names != unique:
        told.append("names in its header stand twice, are missing or cannot be shown: renamed")
    if between:
        told.append(f"a line between header and rows is skipped ({shown(between[0], 60)})")
    return Layout(tuple(unique), _stated(unique, separator) | {"skip": skip}, skip, None, tuple(told))


def _lines(head: bytes, file: Path) -> list[str]:
    encoding = dialects.encoding_of(head)
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is no text ({error.reason})") from error
    lines = re.split(r"\r\n|\r|\n", text)
    if len(head) >= dialects.HEAD:
        lines.pop()  # cut short
    lines = lines[: dialects.LINES]
    if not any(line.strip() for line in lines):
        raise UserError(f"{file}: is empty, or its first line is no row of a table")
    if "\0" in text or not all(letter.isprintable() or letter in "\t\f\ufeff" for letter in lines[0][:200]):
        raise UserError(f"{file}: is no text")
    return lines


def _separated(lines: list[str], file: Path) -> tuple[str, list[tuple[int, list[str]]]]:
    """Return the separator, and the cells of each line that is not blank, with its number.

    It is the one by which most rows have one number of cells, and most cells are numbers or dates.
    """
    best: tuple[tuple[float, ...], str, list[tuple[int, list[str]]]] | None = None
    for separator in dialects.SEPARATORS:
        rows = [(n, dialects.cells(line, separator)) for n, line in enumerate(lines) if line.strip()]
        later = [row for _, row in rows[len(rows) // 2 :]]  # the first lines may be notes
        width, count = Counter(map(len, later)).most_common(1)[0]
        cells = [cell for row in later if len(row) == width for cell in row]
        values = sum(map(_is_value, cells)) / max(1, len(cells))
        score = (width > 1, count / len(later) >= 0.9, round(values, 2), width)
        if width and (best is None or score > best[0]):
            best = (score, separator, rows)
    if best is None or not (best[0][2] or best[0][0]):
        raise UserError(f"{file}: is no table, it has no columns of numbers")
    if not best[0][1]:
        raise UserError(f"{file}: is no table, its lines have different numbers of cells")
    return best[1], best[2]


def _is_value(cell: str) -> bool:
    cell = cell.strip().strip('"')
    return dialects.is_number(cell) or is_date(cell) or bool(DATE.fullmatch(cell))


def _fits(cell: str) -> bool:
    return cell.strip() in MISSING or _is_value(cell)


def _any(row: list[str], numeric: list[int]) -> bool:
    return any(_is_value(row[n]) for n in numeric)


def _numeric(rows: list[list[str]], width: int) -> list[int]:
    """Return the columns that hold numbers or dates, but for a few cells."""
    found = []
    for n in range(width):
        cells = [row[n] for row in rows[len(rows) // 2 :] if row[n].strip() not in MISSING]
        if cells and sum(map(_is_value, cells)) >= 0.8 * len(cells):
            found.append(n)
    return found


def _above(lines: list[str], first: int, separator: str, widths: set[int]) -> list[tuple[int, list[str]]]:
    """Return the lines before the first row that have as many names as it has cells, and no numbers, with number."""
    block: list[tuple[int, list[str]]] = []
    for number in range(first - 1, -1, -1):
        if not lines[number].strip():
            continue
        names = dialects.names_in(lines[number].lstrip("\ufeff"), separator)
        if len(names) not in widths or any(dialects.is_number(name) for name in names) or not any(names):
            break
        block.insert(0, (number, names))
    return block


def _unique(names: list[str]) -> list[str]:
    """Return distinct names that can be shown; empty ones at the ends of files with numbered rows stay empty."""
    found: list[str] = []
    for n, name in enumerate(names):
        own = name if can_be_shown(name) or (not name and names.count("") == 1) else f"c{n + 1}"
        number = 2
        while own and own in found:
            own, number = f"{name}_{number}", number + 1
        found.append(own)
    return found


def _nameless(rows: list[tuple[int, list[str]]], first: int, width: int, separator: str) -> Layout:
    """Return the layout of a file without a header: columns c1, c2, ...

    Empatica's files begin with a line of the start, in seconds since 1970, and one of the rate.
    """
    names = [f"c{n + 1}" for n in range(width)]
    told = "has no header: columns are numbered"
    if width >= WIDE:
        told += f"; {width} columns without names: is each row a window? Rows must be samples, save windows as arrays"
    start, rate = ([cell.strip() for cell in row] for _, row in (rows + rows)[:2])
    empatica = len(rows) > 2 and len({*start}) == len({*rate}) == 1 and all(map(dialects.is_number, start + rate))
    if empatica and float(start[0]) > CLOCK_START and 0 < float(rate[0]) < 1e4:
        stated = _stated(names, separator) | {"skip": rows[2][0]}
        told += f"; its first line says the start, its second the rate, {rate[0]} Hz"
        return Layout(tuple(names), stated, rows[2][0], float(rate[0]), (told,))
    return Layout(tuple(names), _stated(names, separator) | ({"skip": first} if first else {}), first, None, (told,))


def _stated(names: list[str], separator: str) -> dict[str, Any]:
    return {"header": names} | ({} if separator == "," else {"separator": separator})
