"""Readers of text files (.csv, .tsv, .txt and the like, also compressed) and of Parquet, as pandas frames."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dataset_utils import limits
from dataset_utils.counts import some
from dataset_utils.files import parsing
from dataset_utils.growing import Growing
from dataset_utils.sources.own import dialect as dialects
from dataset_utils.sources.own.description import Dialect
from dataset_utils.sources.own.labels import Text
from dataset_utils.sources.own.packed import most_unpacked, opened
from dataset_utils.sources.own.table import Table, Wanted, check_finite, is_date, is_dates, seconds
from registry.errors import UserError
from registry.parameters import suggest
from registry.text import shown

if TYPE_CHECKING:
    import pandas as pd

NUMBER = 4  # bytes of a number in memory
ROWS = 25_000
"""Number of rows held as a frame at a time."""
MISSING = ("", "NA", "N/A", "n/a", "NaN", "nan", "-nan", "-NaN", "NULL", "null", "None", "#N/A", "<NA>")
"""Cells that mean a missing number; in columns of text they are text."""


class _Columns:
    """Columns that grow by one frame at a time."""

    def __init__(self, wanted: Wanted, file: Path) -> None:
        self.wanted, self.file = wanted, file
        most = ROWS
        self.signals = Growing(most, (len(wanted.channels),), np.float32)
        self.times: Growing | None = None
        self.dates: list[str] = []
        self.dated = is_dates(wanted.time)
        self.found_out: dict[str, None] = {}
        self.codes = {name: Growing(most, (), np.int32) for name in wanted.texts}
        self.values: dict[str, dict[str, int]] = {name: {} for name in wanted.texts}

    def add(self, frame: pd.DataFrame, before: int) -> None:
        """Append a frame; `before` is the number of the line before its first row, for messages."""
        columns = [_numbers(self.file, frame[name], name, before) for name in self.wanted.channels]
        self.signals.add(np.stack(columns, axis=1) if columns else np.empty((len(frame), 0)))
        time = self.wanted.time
        if time is not None:
            column = frame[time.column]
            if self.times is None and time.unit is None and column.dtype.kind not in "fiu" and len(column):
                self.dated = is_date(str(column.iloc[0]).strip()) or column.dtype.kind == "M"
                if self.dated:
                    self.found_out["times are ISO dates"] = None
                elif not dialects.is_number(str(column.iloc[0])):
                    seconds([str(column.iloc[0])], time, str(self.file))  # its message names the alternatives
            if self.times is None:
                self.times = Growing(len(self.signals.buffer), (), np.float64)
            if self.dated:
                self.dates += [str(value) for value in column]
            else:
                self.times.add(_numbers(self.file, column, time.column, before))
        for name in self.wanted.texts:
            self._add_text(name, frame[name])

    def _add_text(self, name: str, column: pd.Series) -> None:
        import pandas as pd

        codes, found = pd.factorize(column, use_na_sentinel=True)
        known = self.values[name]
        texts = [str(value).strip() for value in found]
        table = np.array([known.setdefault(text, len(known)) for text in texts] + [-1], dtype=np.int32)
        if (codes < 0).any():
            table[-1] = known.setdefault("", len(known))
        self.codes[name].add(table[codes])

    def table(self) -> Table:
        """Return all rows. Raises UserError if there are none, or a row has no time."""
        if not self.signals.rows:
            raise UserError(f"{self.file}: holds no samples")
        times, unit = None, None
        if self.times is not None and self.wanted.time is not None:
            unit = "s" if self.dated else self.wanted.time.of_numbers
            dates = self.dates
            times = seconds(dates, self.wanted.time, str(self.file)) if self.dated else self.times.whole()
            check_finite(times, self.file)
        texts = {name: Text(self.codes[name].whole(), tuple(self.values[name])) for name in self.wanted.texts}
        return Table(self.signals.whole(), texts, times, unit, None, tuple(self.found_out))


def read_text(file: Path, wanted: Wanted, dialect: Dialect, only_texts: bool = False, most: int | None = None) -> Table:
    """Read a text file, of at most `most` rows. Raises UserError if it is damaged or lacks a wanted column."""
    needed = Wanted((), None, wanted.texts) if only_texts else wanted
    columns = _Columns(needed, file)
    for found, frame, before in _frames(file, wanted, needed, dialect, most):
        columns.add(frame, before)
        columns.found_out |= dict.fromkeys(found.told)
    return columns.table()


def read_parquet(
    file: Path, wanted: Wanted, dialect: Dialect, only_texts: bool = False, most: int | None = None
) -> Table:
    """Read a Parquet file, of at most `most` rows; needs pyarrow. Raises UserError likewise."""
    import pandas as pd

    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError(f"{file}: Parquet files need pyarrow: pip install pyarrow") from error
    needed = Wanted((), None, wanted.texts) if only_texts else wanted
    columns = _Columns(needed, file)
    size = most_unpacked(file)
    with opened(file) as stream, parsing(file, "Parquet file"):
        opened_file = parquet.ParquetFile(stream)
        names = opened_file.schema_arrow.names
        for name in wanted.names:
            if name not in names:
                raise UserError(f"{file}: has no column '{name}'{suggest(name, names)}; it has: {some(names)}")
        # runs of equal values take no space in the file, but do in memory
        rows = opened_file.metadata.num_rows if most is None else min(most, opened_file.metadata.num_rows)
        limits.check_unpacked(file, rows * len(needed.names) * NUMBER, size)
        before = 0
        for batch in opened_file.iter_batches(ROWS, columns=list(needed.names)):
            if most is not None and before >= most:
                break
            frame = pd.DataFrame({name: batch.column(name).to_pandas() for name in needed.names})
            columns.add(frame, before)
            before += len(frame)
    return columns.table()


def _frames(
    file: Path, wanted: Wanted, needed: Wanted, dialect: Dialect, most: int | None = None
) -> Iterator[tuple[dialects.Found, pd.DataFrame, int]]:
    """Yield the detected format, the needed columns of some rows, and the number of the line before them."""
    import pandas as pd

    numbers = [*wanted.channels, *([wanted.time.column] if wanted.time and not is_dates(wanted.time) else [])]
    text = {name: str for name in wanted.names if name not in numbers}
    with opened(file) as stream:
        head = stream.read(dialects.HEAD)
        stream.seek(0)
        found = dialects.find(head, wanted.names, numbers, dialect, file, wanted.time is not None)
        columns = found.columns
        places = [columns.index(name) for name in wanted.names]
        unique = [name if n in places else f"unused {n}" for n, name in enumerate(columns)]
        last = max(n for n, name in enumerate(columns) if name)
        nameless = unique[last + 1 :]  # one before them may hold the numbers of rows, as pandas writes it
        before = found.skip
        try:
            reader = pd.read_csv(
                stream,
                sep=r"\s+" if found.separator == " " else found.separator,
                decimal=found.decimal,
                encoding=found.encoding,
                header=None,
                names=unique,
                # `usecols` drops cells beyond the last column silently: used only where all is read again later
                usecols=None if needed is wanted else [*needed.names],
                skiprows=found.skip,
                index_col=False,
                skipinitialspace=True,
                nrows=most,
                chunksize=ROWS if most is None else min(ROWS, most),
                low_memory=False,
                na_values=dict.fromkeys(numbers, MISSING),
                keep_default_na=False,
                dtype=text,
            )
            with reader:
                while (frame := _next(reader)) is not None:
                    for name in nameless if needed is wanted else ():
                        _check_empty(file, frame[name], before)
                    yield found, frame, before
                    before += len(frame)
        except (pd.errors.ParserError, pd.errors.ParserWarning, pd.errors.EmptyDataError) as error:
            raise UserError(f"{file}: its rows are not those of a table ({shown(error)})") from error
        except UnicodeError as error:
            raise UserError(
                f"{file}: is not written in {found.encoding} throughout ({getattr(error, 'reason', error)}); "
                "say dialect: {encoding: ...}"
            ) from error


def _next(reader: Iterator[pd.DataFrame]) -> pd.DataFrame | None:
    """Return the next frame, or None; cells beyond the last column are an error."""
    import pandas as pd

    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        return next(reader, None)


def _check_empty(file: Path, column: pd.Series, before: int) -> None:
    """Raise UserError if a column without a name holds something."""
    filled = np.flatnonzero((column.notna() & (column.astype(str).str.strip() != "")).to_numpy())
    if len(filled):
        raise UserError(f"{file}: line {before + int(filled[0]) + 1} has more cells than there are columns with a name")


def _numbers(file: Path, column: pd.Series, name: str, before: int) -> np.ndarray:
    """Convert a column to float64. Raises UserError for text among the numbers."""
    import pandas as pd

    if column.dtype.kind in "fiu":
        values: np.ndarray = column.to_numpy(np.float64)
        return values
    if column.dtype.kind == "M":
        raise UserError(f"{file}: column '{name}' holds dates; it can be the 'time' only")
    if column.dtype == object:  # whole numbers of hundreds of digits are Python's own, and too large for a float
        column = column.map(lambda cell: str(cell) if isinstance(cell, int) else cell)
    numbers = pd.to_numeric(column, errors="coerce")
    wrong = np.flatnonzero(
        (numbers.isna() & column.notna()).to_numpy() | np.full(len(column), column.dtype.kind == "b")
    )
    if len(wrong):
        row = int(wrong[0])
        cell = str(column.iloc[row])[:40]
        hint = "; say dialect: {decimal: ','}" if dialects.COMMA.fullmatch(cell) else ""
        raise UserError(f"{file}: line {before + row + 1}, column '{name}': {cell!r} is no number{hint}")
    converted: np.ndarray = numbers.to_numpy(np.float64)
    return converted
