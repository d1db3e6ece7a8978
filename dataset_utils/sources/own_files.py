"""One recording file of the user's own data: .csv or .npz."""

from __future__ import annotations

import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from registry.errors import UserError
from registry.parameters import suggest

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Layout:
    """What is where in a file.

    Attributes:
        channels: CSV columns of the signals, or the names of the columns of the array `x`.
        label: CSV column of the labels (in .npz it is the array `y`).
        time: CSV column of the time in seconds, or None (in .npz it is the array `time`, where there is one).
        subject: CSV column or .npz array that names the subject, or None.
        part: CSV column or .npz array that tells test rows from others, or None.
    """

    channels: tuple[str, ...]
    label: str
    time: str | None
    subject: str | None
    part: str | None = None


@dataclass(frozen=True)
class Table:
    """A file's contents.

    Attributes:
        signals: (samples, channels), float32.
        labels: (samples,), text; '' where there is none.
        time: (samples,), seconds, or None.
        subjects: (samples,), text, or None.
        parts: (samples,), text, or None.
    """

    signals: np.ndarray
    labels: np.ndarray
    time: np.ndarray | None
    subjects: np.ndarray | None
    parts: np.ndarray | None = None


def read(file: Path, layout: Layout) -> Table:
    """Read a recording. Raises UserError for a damaged file or one that does not fit `layout`."""
    table = READERS[file.suffix](file, layout)
    if not len(table.labels):
        raise UserError(f"{file}: holds no samples")
    if table.time is not None and not np.isfinite(table.time).all():
        raise UserError(f"{file}: sample {int(np.argmin(np.isfinite(table.time))) + 1} has no time")
    return table


def read_labels(file: Path, layout: Layout) -> np.ndarray:
    """The distinct labels of a file, as text."""
    if file.suffix == ".npz":
        return np.unique(_arrays(file, ("y",))["y"].astype(str))
    return np.unique(_csv(file, layout, [layout.label])[layout.label].to_numpy(str))


def _read_csv(file: Path, layout: Layout) -> Table:
    numbers = [*layout.channels, *([layout.time] if layout.time else [])]
    texts = [layout.label, *filter(None, (layout.subject, layout.part))]
    frame = _csv(file, layout, [*numbers, *texts])
    values = {name: _as_numbers(file, frame, name) for name in numbers}
    return Table(
        signals=np.stack([values[name] for name in layout.channels], axis=1).astype(np.float32),
        labels=frame[layout.label].to_numpy(str),
        time=values[layout.time] if layout.time else None,
        subjects=frame[layout.subject].to_numpy(str) if layout.subject else None,
        parts=frame[layout.part].to_numpy(str) if layout.part else None,
    )


def _csv(file: Path, layout: Layout, wanted: list[str]) -> pd.DataFrame:
    """The wanted columns: those of the signals and the time as numbers where they are, the others as text."""
    import pandas as pd

    texts = dict.fromkeys(filter(None, (layout.label, layout.subject, layout.part)), str)
    try:
        header = list(pd.read_csv(file, nrows=0, encoding="utf-8-sig").columns)
        for name in wanted:
            if name not in header:
                known = ", ".join(map(str, header))
                raise UserError(f"{file}: has no column '{name}'{suggest(name, header)}; it has: {known}")
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)  # more cells than the header has columns
            warnings.simplefilter("ignore", pd.errors.DtypeWarning)  # text among numbers: found below
            frame = pd.read_csv(file, dtype=texts, index_col=False, encoding="utf-8-sig")
    except (
        pd.errors.ParserError,
        pd.errors.ParserWarning,
        pd.errors.EmptyDataError,
        UnicodeDecodeError,
    ) as error:
        raise UserError(
            f"{file}: is no CSV with one header line and commas ({' '.join(str(error).split())})"
        ) from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error
    return frame[list(dict.fromkeys(wanted))].fillna(dict.fromkeys(texts.keys() & set(wanted), ""))


def _as_numbers(file: Path, frame: pd.DataFrame, name: str) -> np.ndarray:
    import pandas as pd

    column = frame[name]
    numbers = pd.to_numeric(column, errors="coerce")
    wrong = np.flatnonzero((numbers.isna() & column.notna()).to_numpy())
    if len(wrong):
        row = int(wrong[0])
        raise UserError(f"{file}: line {row + 2}, column '{name}': {str(column.iloc[row])[:40]!r} is no number")
    return numbers.to_numpy(np.float64)


def _read_npz(file: Path, layout: Layout) -> Table:
    names = ("x", "y", *filter(None, (layout.subject, layout.part)))
    arrays = _arrays(file, names)
    x, y = arrays["x"], arrays["y"]
    if x.ndim != 2 or x.shape[1] != len(layout.channels) or x.dtype.kind not in "fiu":
        raise UserError(
            f"{file}: x has shape {x.shape}, type {x.dtype}; it must be numbers of shape "
            f"(samples, {len(layout.channels)}), one column for each of 'columns'"
        )
    time = arrays.get("time")
    subjects = arrays[layout.subject].astype(str) if layout.subject else None
    parts = arrays[layout.part].astype(str) if layout.part else None
    for name, array in (("y", y), ("time", time), (layout.subject, subjects), (layout.part, parts)):
        if array is not None and array.shape != (len(x),):
            raise UserError(f"{file}: {name} has shape {array.shape} instead of ({len(x)},), one for each row of x")
    if time is not None and time.dtype.kind not in "fiu":
        raise UserError(f"{file}: time must be seconds, not {time.dtype}")
    time = None if time is None else time.astype(np.float64)
    return Table(x.astype(np.float32), y.astype(str), time, subjects, parts)


def _arrays(file: Path, needed: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The arrays `needed` of a .npz, and `time` where there is one."""
    try:
        with np.load(file, allow_pickle=False) as opened:
            for name in needed:
                if name not in opened:
                    raise UserError(f"{file}: has no array '{name}'; it has: {', '.join(opened)}")
            return {name: opened[name] for name in {*needed, "time"} if name in opened}
    except (ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{file}: is no .npz of plain arrays, or a damaged one ({error})") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error


READERS: dict[str, Callable[[Path, Layout], Table]] = {".csv": _read_csv, ".npz": _read_npz}
