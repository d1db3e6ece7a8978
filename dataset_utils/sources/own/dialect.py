"""Detection of a text file's format: encoding, separator, decimal mark and position of the header."""

from __future__ import annotations

import codecs
import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset_utils.counts import many, some
from dataset_utils.sources.own.description import Dialect
from registry.errors import UserError
from registry.parameters import suggest

HEAD = 1 << 18
"""Number of bytes that are examined."""
LINES = 200
"""Number of lines among which the header must be."""
MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
SEPARATORS = (",", ";", "\t", "|", " ")
CALLED = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars", " ": "blanks"}
CLOCKS = ("t", "time", "timestamp", "times", "datetime", "seconds")
"""Usual names of columns of times."""
COMMA = re.compile(r"[-+]?[0-9]*,[0-9]+([eE][-+]?[0-9]+)?")
NUMBER = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|nan", re.IGNORECASE)


@dataclass(frozen=True)
class Found:
    """Detected format of a file.

    Attributes:
        encoding, separator, decimal: see `Dialect`.
        skip: number of lines before the first row.
        columns: a name for every cell of a row; '' for cells without a name.
        told: in words, what differs from the usual format: UTF-8, commas, points, the header on the first line.
    """

    encoding: str
    separator: str
    decimal: str
    skip: int
    columns: tuple[str, ...]
    told: tuple[str, ...]


def find(
    head: bytes, wanted: Sequence[str], numbers: Sequence[str], given: Dialect, file: Path, timed: bool = False
) -> Found:
    """Detect the format of a text file that begins with `head`.

    The header is the first line that holds all wanted columns, with any separator.

    Args:
        head: first `HEAD` bytes of the file.
        wanted: columns that the file must have.
        numbers: wanted columns that hold numbers.
        given: what the user states about the format.
        file: the file, for messages.
        timed: whether the time is among the wanted columns.

    Raises:
        UserError: the file is empty, has no such header, or has rows with more cells than columns.
    """
    encoding = given.encoding or encoding_of(head)
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: is not written in {encoding} ({error.reason}); say dialect: {{encoding: ...}}"
        ) from error
    lines = re.split(r"\r\n|\r|\n", text)
    if len(head) >= HEAD:
        lines.pop()  # cut short
        if not lines:
            raise UserError(f"{file}: its first line has more than {HEAD} bytes; is it a table of text?")
    if not any(line.strip() for line in lines):
        raise UserError(f"{file}: is empty")
    if "\0" in text or not all(
        character.isprintable() or character in "\t\r\n\f\ufeff" for character in lines[0][:200]
    ):
        raise UserError(
            f"{file}: is no text file, or in another encoding than {encoding}; say dialect: {{encoding: ...}}"
        )
    if given.header is not None:
        separator, columns, skip = _first_row(lines, given, numbers, file)
    else:
        separator, columns, skip = _header(lines, wanted, given, file)
    rows = [cells(line, separator) for line in lines[skip:] if line.strip()][:LINES]
    columns, trailing = _widened(columns, rows, skip, file)
    places = [columns.index(name) for name in numbers]
    values = [row[place].strip() for row in rows for place in places if place < len(row)]
    decimal = given.decimal or ("," if commas(values) else ".")
    clock = next((name for name in columns if name.lower() in CLOCKS and name not in wanted), None)
    told = [
        (given.encoding is None and encoding not in ("utf-8", "utf-8-sig"), f"encoding {encoding}"),
        (given.separator is None and separator != ",", f"cells separated by {CALLED.get(separator, repr(separator))}"),
        (given.decimal is None and decimal != ".", "decimal commas"),
        (
            given.skip is None and given.header is None and skip > 1,
            f"{many(skip - 1, 'line')} before the header skipped",
        ),
        (
            given.skip is None and given.header is not None and skip > 0,
            f"{many(skip, 'line')} before the first row skipped",
        ),
        (trailing, "a separator at the end of each row"),
        (clock is not None and not timed, f"column '{clock}' looks like a time and is not read; say time: {clock}"),
    ]
    return Found(encoding, separator, decimal, skip, columns, tuple(text for holds, text in told if holds))


def encoding_of(head: bytes) -> str:
    """Detect the encoding by its mark, by the zeros of UTF-16, or by decoding; Latin-1 is the last resort."""
    for mark, name in MARKS:
        if head.startswith(mark):
            return name
    sample = head[:1000]
    if len(sample) >= 8:
        if sample[1::2].count(0) > 0.4 * len(sample):
            return "utf-16-le"
        if sample[::2].count(0) > 0.4 * len(sample):
            return "utf-16-be"
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8"


def cells(line: str, separator: str) -> list[str]:
    """Split a line into its cells."""
    if separator == " ":
        return line.split()
    return next(csv.reader([line], delimiter=separator), [])


def names_in(line: str, separator: str) -> list[str]:
    """Split a header into its names."""
    found = [cell.strip().strip("\"'").strip() for cell in cells(line, separator)]
    if found and found[0].startswith("#"):  # numpy.savetxt writes its header as a comment
        found[0] = found[0].lstrip("# ")
        if not found[0]:
            found.pop(0)
    return found


def _candidates(lines: list[str], given: Dialect) -> tuple[str, ...]:
    """Return the separators to try; that of a line such as 'sep=;' comes first."""
    if given.separator is not None:
        return (given.separator,)
    hit = re.fullmatch(r'"?sep=(.)"?', lines[0].strip("\ufeff \r\n"), re.IGNORECASE) or re.fullmatch(
        "sep=(\t)", lines[0]
    )
    return (hit[1], *(s for s in SEPARATORS if s != hit[1])) if hit else SEPARATORS


def _header(lines: list[str], wanted: Sequence[str], given: Dialect, file: Path) -> tuple[str, tuple[str, ...], int]:
    """Return separator, columns and number of lines up to the header's end."""
    best: tuple[int, str, list[str], int] = (0, "", [], 0)
    numbered = list(enumerate(lines[:LINES]))
    if given.skip is not None:
        numbered = numbered[given.skip : given.skip + 1]
    for number, line in numbered:
        for separator in _candidates(lines, given):
            names = names_in(line, separator)
            hits = len(set(wanted) & set(names))
            if hits == len(set(wanted)):
                for name in wanted:
                    if names.count(name) > 1:
                        raise UserError(
                            f"{file}: has {names.count(name)} columns '{name}'; name all columns with dialect: "
                            f"{{header: [...], skip: {number + 1}}}"
                        )
                return separator, tuple(names), number + 1
            if hits > best[0]:
                best = (hits, separator, names, number)
    if best[0]:
        missing = next(name for name in wanted if name not in best[2])
        raise UserError(
            f"{file}: has no column '{missing}'{suggest(missing, best[2])}; it has: {some(filter(None, best[2]))}"
        )
    line = next((line for _, line in numbered if line.strip()), "")
    separator = max(_candidates(lines, given), key=lambda s: len(cells(line, s)))
    names = names_in(line, separator)
    if any(NUMBER.fullmatch(name) for name in names):
        raise UserError(
            f"{file}: has no header with '{wanted[0]}', its first line is {line[:60]!r}; where files have no "
            "header, name their columns with dialect: {header: [...]}"
        )
    raise UserError(
        f"{file}: has no column '{wanted[0]}'{suggest(wanted[0], names)}; it has: {some(filter(None, names))}"
    )


def _first_row(
    lines: list[str], given: Dialect, numbers: Sequence[str], file: Path
) -> tuple[str, tuple[str, ...], int]:
    """Return separator, columns and number of lines before the first row of a file without a header."""
    columns = tuple(given.header or ())
    places = [columns.index(name) for name in numbers if name in columns]
    numbered = list(enumerate(lines[:LINES]))[given.skip or 0 :]
    if given.skip is not None:
        numbered = [pair for pair in numbered if pair[1].strip()][:1]
    for number, line in numbered:
        for separator in _candidates(lines, given):
            row = [cell.strip() for cell in cells(line, separator)]
            while len(row) > len(columns) and not row[-1]:
                row.pop()
            if len(row) != len(columns):
                continue
            if all(not row[p] or NUMBER.fullmatch(row[p]) or COMMA.fullmatch(row[p]) for p in places):
                return separator, columns, number
    line = next((line for _, line in numbered if line.strip()), "")
    raise UserError(
        f"{file}: no row fits dialect: {{header: ...}} of {len(columns)} columns; its first line is {line[:60]!r}"
    )


def _widened(columns: tuple[str, ...], rows: list[list[str]], skip: int, file: Path) -> tuple[tuple[str, ...], bool]:
    """Return the columns, with nameless ones added for separators at the ends of rows, and whether there are any."""
    widest = max((len(row) for row in rows), default=len(columns))
    if widest <= len(columns):
        return columns, False
    for number, row in enumerate(rows, start=skip + 1):
        if any(cell.strip() for cell in row[len(columns) :]):
            raise UserError(
                f"{file}: line {number} has {len(row)} cells, but there are {len(columns)} columns; where commas are "
                "both separators and decimal marks, write semicolons between cells"
            )
    return columns + ("",) * (widest - len(columns)), True


def is_number(cell: str) -> bool:
    """Return whether a cell is certainly a number."""
    return bool(NUMBER.fullmatch(cell.strip()) or COMMA.fullmatch(cell.strip()))


def commas(values: list[str]) -> bool:
    """Return whether numbers have decimal commas: some have one, and none has a point. Dates are no numbers."""
    points = any("." in value and NUMBER.fullmatch(value) for value in values)
    return not points and any(COMMA.fullmatch(value) for value in values)
