"""A look into a file: its columns, of a bounded number of rows, read by the readers of own recordings."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dataset_utils import limits
from dataset_utils.counts import some
from dataset_utils.draft.layout import layout_of
from dataset_utils.draft.words import RATES
from dataset_utils.files import parsing
from dataset_utils.sources.own import dialect as dialects
from dataset_utils.sources.own.containers import open_arrays
from dataset_utils.sources.own.description import Dialect
from dataset_utils.sources.own.labels import Text
from dataset_utils.sources.own.packed import opened
from dataset_utils.sources.own.reading import READERS, kind_of
from dataset_utils.sources.own.signal_files import edf_annotations, rates_of
from dataset_utils.sources.own.table import Wanted
from dataset_utils.sources.own.text_files import MISSING, read_parquet, read_text
from registry.errors import UserError

ROWS = 50_000
"""Most rows that are looked at in a file."""
CELLS = 500_000
"""Most cells that are looked at in a file."""
BYTES = 256 << 20
"""Most bytes of a file of a kind that can be read as a whole only."""


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        text: (rows,), its cells as text.
        numbers: (rows,), float64, NaN where missing; None where not all cells are numbers.
    """

    text: Text
    numbers: np.ndarray | None

    @staticmethod
    def of(text: Text, comma: bool = False) -> Column:
        """Return a column of these cells; `comma`: numbers have decimal commas."""
        import pandas as pd

        texts = [
            value.replace(",", ".") if comma and dialects.COMMA.fullmatch(value) else value for value in text.values
        ]
        texts = ["" if value in MISSING else value for value in texts]
        numbers = pd.to_numeric(pd.Series(texts, dtype=object), errors="coerce").to_numpy(np.float64)
        words = bool((np.isnan(numbers) & np.array([value != "" for value in texts], dtype=bool)).any())
        filled = not np.isnan(numbers).all()
        return Column(text, None if words or not filled else numbers[text.codes])

    @cached_property
    def distinct(self) -> dict[str, int]:
        """Text -> rows with it, empty ones left out."""
        return {value: count for value, count in self.text.counts().items() if value not in MISSING}

    @cached_property
    def runs(self) -> int:
        """Number of stretches of rows with one value."""
        return int(np.count_nonzero(np.diff(self.text.codes))) + 1 if len(self.text.codes) else 0


@dataclass(frozen=True)
class Look:
    """Content of a file, as far as it was looked at.

    Attributes:
        file: the file.
        kind: its ending, in lower case.
        columns: name -> its column, in order; signals of EDF and WFDB have no rows.
        dialect: what the key `dialect` must say; {} where the reader finds out.
        skip: lines before the first row of a text file.
        rate: sampling rate that the file states, Hz, or None.
        rates: signal -> its rate, of EDF and WFDB.
        rows: number of rows looked at.
        whole: whether these are all.
        windows: shape of an array `x` of windows, or None.
        annotations: durations, seconds, of the annotations in the file; None where it has none.
        told: remarks.
    """

    file: Path
    kind: str
    columns: dict[str, Column]
    dialect: dict[str, Any] = field(default_factory=dict)
    skip: int = 0
    rate: float | None = None
    rates: dict[str, float] = field(default_factory=dict)
    rows: int = 0
    whole: bool = True
    windows: tuple[int, ...] | None = None
    annotations: np.ndarray | None = None
    told: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns or signals."""
        return tuple(self.columns) or tuple(self.rates)


def look(file: Path, most: int = ROWS) -> Look:
    """Return what is in a file, of at most `most` rows. Raises UserError where it cannot be read."""
    kind = kind_of(file)
    reader = READERS[kind]
    if reader is read_text:
        return _text(file, kind, most)
    if reader is read_parquet:
        return _parquet(file, kind, most)
    if kind in (".edf", ".bdf", ".hea"):
        rates = rates_of(file)
        found = None if kind == ".hea" else edf_annotations(file)
        return Look(file, kind, {}, rates=rates, annotations=found.duration if found and len(found.onset) else None)
    return _arrays(file, kind)


def _text(file: Path, kind: str, most: int) -> Look:
    with opened(file) as stream, parsing(file, "file of text"):
        head = stream.read(dialects.HEAD)
    layout = layout_of(head, file)
    limits.check_count(file, len(layout.names), limits.CHANNELS, "columns", "is it a table?")
    given = layout.dialect
    dialect = Dialect(given.get("separator"), None, None, given.get("skip"), tuple(given.get("header", ())) or None)
    rows = max(100, min(most, CELLS // len(layout.names)))
    table = read_text(file, Wanted((), None, layout.names), dialect, most=rows)
    values = [value for text in table.texts.values() for value in text.values[:1000]]
    comma = dialects.commas(values)
    columns = {name: Column.of(text, comma) for name, text in table.texts.items()}
    told = layout.told + (("decimal commas",) if comma else ())
    found = len(table.signals)
    return Look(file, kind, columns, given, layout.skip, layout.rate, rows=found, whole=found < rows, told=told)


def _parquet(file: Path, kind: str, most: int) -> Look:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise UserError(f"{file}: Parquet files need pyarrow: pip install pyarrow") from error
    with opened(file) as stream, parsing(file, "Parquet file"):
        names = tuple(parquet.ParquetFile(stream).schema_arrow.names)
    rows = max(100, min(most, CELLS // max(1, len(names))))
    table = read_parquet(file, Wanted((), None, names), Dialect(), most=rows)
    found = len(table.signals)
    columns = {name: Column.of(text) for name, text in table.texts.items()}
    return Look(file, kind, columns, rows=found, whole=found < rows)


def _arrays(file: Path, kind: str) -> Look:
    if file.stat().st_size > BYTES:
        raise UserError(f"{file}: has more than {BYTES >> 20} MB, which is not looked into")
    names = tuple(open_arrays(file, (), Dialect()))
    arrays = {name: np.asarray(array) for name, array in open_arrays(file, names, Dialect()).items()}
    if kind == ".npy" and names == ("x",) and arrays["x"].ndim == 2 and arrays["x"].dtype.kind in "fiu":
        header = [f"c{n + 1}" for n in range(arrays["x"].shape[1])]
        columns = dict(zip(header, map(_column, arrays["x"][:ROWS].T), strict=True))
        told = ("columns of the array are numbered",)
        rows = len(arrays["x"])
        return Look(file, kind, columns, {"header": header}, rows=min(rows, ROWS), whole=rows <= ROWS, told=told)
    x = arrays.get("x")
    windows = x.shape if x is not None and x.ndim in (3, 4) and x.dtype.kind in "fiu" else None
    rows = (
        len(x) if x is not None and windows else max((len(a) for a in map(_flat, arrays.values()) if a.ndim), default=0)
    )
    columns, odd, rate = dict[str, Column](), list[str](), None
    for name, array in arrays.items():
        flat = _flat(array)
        if flat.size == 1 and flat.dtype.kind in "fiu" and name.rpartition(".")[2].rpartition("/")[2].lower() in RATES:
            rate = float(flat.ravel()[0])
        elif flat.ndim == 1 and len(flat) == rows and flat.dtype.kind in "fiubUSMO":
            columns[name] = _column(flat[:ROWS])
        elif flat.ndim == 2 and len(flat) == rows and flat.dtype.kind in "fiu":
            for n in range(min(flat.shape[1], limits.CHANNELS)):
                columns[f"{name}[{n}]"] = _column(flat[:ROWS, n])
        elif flat.ndim and not (name == "x" and windows):
            odd.append(f"{name} of shape {array.shape}")
    left = (f"arrays that are no columns of {rows} rows: {some(odd)}",) if odd else ()
    rate = rate if rate and np.isfinite(rate) and 1e-3 <= rate < limits.RATE else None
    return Look(file, kind, columns, {}, 0, rate, rows=min(rows, ROWS), whole=rows <= ROWS, windows=windows, told=left)


def _flat(array: np.ndarray) -> np.ndarray:
    return array.ravel() if array.ndim == 2 and 1 in array.shape else array  # MATLAB's columns and rows


def _column(array: np.ndarray) -> Column:
    if array.dtype == object:  # cells of MATLAB
        array = np.array(["" if np.size(cell) == 0 else str(np.ravel(cell)[0]) for cell in array])
    numbers = array.astype(np.float64) if array.dtype.kind in "fiu" else None
    return Column(Text.of_array(array), numbers)
