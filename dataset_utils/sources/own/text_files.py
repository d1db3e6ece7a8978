"""Text files: .csv, .tsv, .txt and the like, also packed, and Parquet, which comes as the same frames."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dataset_utils.sources.own import dialect as dialects
from dataset_utils.sources.own.description import Dialect
from dataset_utils.sources.own.labels import Text
from dataset_utils.sources.own.packed import opened
from dataset_utils.sources.own.table import Table, Wanted, check_finite, is_date, is_dates, seconds
from registry.errors import UserError
from registry.parameters import suggest

if TYPE_CHECKING:
    import pandas as pd

ROWS = 100_000
"""Rows that are held as a frame at a time."""
MISSING = ("", "NA", "N/A", "n/a", "NaN", "nan", "-nan", "-NaN", "NULL", "null", "None", "#N/A", "<NA>")
"""Cells of numbers that hold none; in columns of text these are text."""


class _Columns:
    """Columns that grow by a frame at a time."""

    def __init__(self, wanted: Wanted, file: Path) -> None:
        self.wanted, self.file = wanted, file
        self.signals: list[np.ndarray] = []
        self.times: list[np.ndarray] = []
        self.dated = is_dates(wanted.time)
        self.found_out: dict[str, None] = {}
        self.codes: dict[str, list[np.ndarray]] = {name: [] for name in wanted.texts}
        self.values: dict[str, dict[str, int]] = {name: {} for name in wanted.texts}

    def add(self, frame: pd.DataFrame, before: int) -> None:
        """Append a frame; `before` is the number of the line before its first row, for messages."""
        columns = [_numbers(self.file, frame[name], name, before) for name in self.wanted.channels]
        self.signals.append(np.stack(columns, axis=1).astype(np.float32) if columns else np.empty((len(frame), 0)))
        time = self.wanted.time
        if time is not None:
            column = frame[time.column]
            if not self.times and time.unit is None and column.dtype.kind not in "fiu" and len(column):
                self.dated = is_date(str(column.iloc[0]).strip()) or column.dtype.kind == "M"
                if self.dated:
                    self.found_out["times are ISO dates"] = None
                elif not dialects.is_number(str(column.iloc[0])):
                    seconds([str(column.iloc[0])], time, str(self.file))  # says what they could be
            self.times.append(_dates(column) if self.dated else _numbers(self.file, column, time.column, before))
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
        self.codes[name].append(table[codes])

    def table(self) -> Table:
        """All of it. Raises UserError: no rows, or a row without a time."""
        if not sum(map(len, self.signals)):
            raise UserError(f"{self.file}: holds no samples")
        time, unit = self.wanted.time, None
        times = np.concatenate(self.times) if self.times else None
        if time is not None and times is not None:
            unit = "s" if self.dated else time.unit
            if self.dated:
                times = seconds(times, time, str(self.file))
            check_finite(times, self.file)
        texts = {name: Text(np.concatenate(self.codes[name]), tuple(self.values[name])) for name in self.wanted.texts}
        signals = np.concatenate(self.signals)
        return Table(signals, texts, times, unit, None, tuple(self.found_out))


def read_text(file: Path, wanted: Wanted, dialect: Dialect, only_texts: bool = False) -> Table:
    """Read a text file. Raises UserError for a damaged one, or one without the wanted columns."""
    needed = Wanted((), None, wanted.texts) if only_texts else wanted
    columns = _Columns(needed, file)
    for found, frame, before in _frames(file, wanted, needed, dialect):
        columns.add(frame, before)
        columns.found_out |= dict.fromkeys(found.told)
    return columns.table()


def read_parquet(file: Path, wanted: Wanted, dialect: Dialect, only_texts: bool = False) -> Table:
    """Read a Parquet file; needs pyarrow. Raises UserError likewise."""
    import pandas as pd

    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError(f"{file}: Parquet files need pyarrow: pip install pyarrow") from error
    needed = Wanted((), None, wanted.texts) if only_texts else wanted
    columns = _Columns(needed, file)
    try:
        with opened(file) as stream:
            opened_file = parquet.ParquetFile(stream)
            names = opened_file.schema_arrow.names
            for name in wanted.names:
                if name not in names:
                    raise UserError(f"{file}: has no column '{name}'{suggest(name, names)}; it has: {', '.join(names)}")
            before = 0
            for batch in opened_file.iter_batches(ROWS, columns=list(needed.names)):
                frame = pd.DataFrame({name: batch.column(name).to_pandas() for name in needed.names})
                columns.add(frame, before)
                before += len(frame)
    except (ValueError, OSError, NotImplementedError) as error:  # pyarrow's errors are such
        raise UserError(
            f"{file}: is no Parquet file, or a damaged one ({' '.join(str(error).split())[:120]})"
        ) from error
    return columns.table()


def _frames(
    file: Path, wanted: Wanted, needed: Wanted, dialect: Dialect
) -> Iterator[tuple[dialects.Found, pd.DataFrame, int]]:
    """How the file is written, and the needed columns some rows at a time, with the number of the line before them."""
    import pandas as pd

    numbers = [*wanted.channels, *([wanted.time.column] if wanted.time and not is_dates(wanted.time) else [])]
    text = {name: str for name in wanted.names if name not in numbers}
    with opened(file) as stream:
        head = stream.read(dialects.HEAD)
        stream.seek(0)
        found = dialects.find(head, wanted.names, numbers, dialect, file)
        columns = found.columns
        places = [columns.index(name) for name in wanted.names]
        unique = [name if n in places else f"unused {n}" for n, name in enumerate(columns)]
        nameless = [unique[n] for n, name in enumerate(columns) if not name and n not in places]
        before = found.skip
        try:
            reader = pd.read_csv(
                stream,
                sep=r"\s+" if found.separator == " " else found.separator,
                decimal=found.decimal,
                encoding=found.encoding,
                header=None,
                names=unique,  # no `usecols`: with it, cells beyond the last column are dropped in silence
                skiprows=found.skip,
                index_col=False,
                skipinitialspace=True,
                chunksize=ROWS,
                low_memory=False,
                na_values=dict.fromkeys(numbers, MISSING),
                keep_default_na=False,
                dtype=text,
            )
            with reader:
                while (frame := _next(reader)) is not None:
                    for name in nameless:
                        _check_empty(file, frame[name], before)
                    yield found, frame, before
                    before += len(frame)
        except (pd.errors.ParserError, pd.errors.ParserWarning, pd.errors.EmptyDataError) as error:
            raise UserError(f"{file}: its rows are not those of a table ({' '.join(str(error).split())})") from error
        except UnicodeError as error:
            raise UserError(
                f"{file}: is not written in {found.encoding} throughout ({error.reason}); say "
                "dialect: {encoding: ...}"
            ) from error


def _next(reader: Iterator[pd.DataFrame]) -> pd.DataFrame | None:
    """The next frame, or None; cells beyond the last column are an error."""
    import pandas as pd

    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        return next(reader, None)


def _check_empty(file: Path, column: pd.Series, before: int) -> None:
    """Raises UserError where a column without a name holds something."""
    filled = np.flatnonzero((column.notna() & (column.astype(str).str.strip() != "")).to_numpy())
    if len(filled):
        raise UserError(f"{file}: line {before + int(filled[0]) + 1} has more cells than there are columns with a name")


def _numbers(file: Path, column: pd.Series, name: str, before: int) -> np.ndarray:
    """A column as float64. Raises UserError: text among the numbers."""
    import pandas as pd

    if column.dtype.kind in "fiu":
        return column.to_numpy(np.float64)
    if column.dtype.kind == "M":
        raise UserError(f"{file}: column '{name}' holds dates; it can be the 'time' only")
    numbers = pd.to_numeric(column, errors="coerce")
    wrong = np.flatnonzero(
        (numbers.isna() & column.notna()).to_numpy() | np.full(len(column), column.dtype.kind == "b")
    )
    if len(wrong):
        row = int(wrong[0])
        raise UserError(
            f"{file}: line {before + row + 1}, column '{name}': {str(column.iloc[row])[:40]!r} is no number"
        )
    return numbers.to_numpy(np.float64)


def _dates(column: pd.Series) -> np.ndarray:
    """A column of dates as text."""
    return column.astype(str).to_numpy(object)
