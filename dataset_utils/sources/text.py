"""Fast reading of tables of numbers in text files; errors name the damaged line."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pandas as pd

from dataset_utils.sources.archive import Archive
from registry.errors import UserError


def read_numbers(archive: Archive, name: str, columns: int, wide: tuple[int, ...] = ()) -> pd.DataFrame:
    """Read a table of numbers separated by blanks; a missing one is written `NaN`.

    Args:
        archive: the data set's files.
        name: the file in `archive`.
        columns: number of columns of each line.
        wide: columns to read as float64; the others become float32.

    Returns:
        frame with columns 0 to `columns` - 1.

    Raises:
        UserError: no rows, a line with more or fewer columns, or text where a number belongs.
    """
    reason = f"not {columns} columns"
    kinds = {column: np.float64 if column in wide else np.float32 for column in range(columns)}
    with archive.open(name) as file:
        try:
            # Only `NaN` counts as missing, so that a short line is an error and not a row of gaps.
            table = pd.read_csv(
                file,
                sep=r"\s+",
                header=None,
                dtype=kinds,
                na_values=["NaN"],
                keep_default_na=False,
                engine="c",
            )
        except ValueError as error:  # ParserError, EmptyDataError and UnicodeDecodeError are subclasses
            table, reason = None, str(error).partition("\n")[0]
    if table is None or table.shape[1] != columns:
        with archive.open(name) as file:
            raise UserError(f"{archive.where(name)}: {_first_fault(file, columns) or f'cannot be read ({reason})'}")
    return table


def _first_fault(lines: Iterable[bytes], columns: int) -> str:
    """Return what is wrong with the first damaged line, or ''."""
    number = 0
    for number, line in enumerate(lines, start=1):
        cells = line.split()
        if cells and len(cells) != columns:
            return f"line {number} has {len(cells)} columns instead of {columns}"
        for cell in cells:
            try:
                float(cell)
            except ValueError:
                return f"line {number} has {cell[:40].decode('ascii', 'replace')!r} where a number belongs"
    return "" if number else "is empty"
