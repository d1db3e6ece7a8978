"""Contents of one file, and conversion of dates to seconds."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dataset_utils.counts import many
from dataset_utils.sources.own.description import Time
from dataset_utils.sources.own.labels import Text
from dataset_utils.time_axis import UNITS
from registry.errors import UserError
from registry.text import shown

ISO = re.compile(r"\s*[0-9]{4}-[0-9]{2}-[0-9]{2}([T ].*)?")
ZONED = re.compile(r".*(Z|[-+][0-9]{2}:?[0-9]{2})\s*", re.IGNORECASE)


@dataclass(frozen=True)
class Wanted:
    """Columns to read.

    Attributes:
        channels: columns of signals.
        time: column of times, numbers or dates, or None.
        texts: columns of labels, subjects and sessions.
        label: the one of `texts` that is the label, or None.
    """

    channels: tuple[str, ...]
    time: Time | None
    texts: tuple[str, ...]
    label: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all columns, each once."""
        return tuple(dict.fromkeys([*self.channels, *([self.time.column] if self.time else []), *self.texts]))


@dataclass(frozen=True)
class Table:
    """A file's contents.

    Attributes:
        signals: (rows, channels), float32, NaN where a value is missing.
        texts: column -> its texts.
        time: (rows,), in `unit`, or None.
        unit: 's', 'ms', 'us', 'ns', or None where it is not known.
        rate: sampling rate that the file states, Hz, or None.
        found_out: properties of the file that were detected rather than given.
    """

    signals: np.ndarray
    texts: Mapping[str, Text] = field(default_factory=dict)
    time: np.ndarray | None = None
    unit: str | None = None
    rate: float | None = None
    found_out: tuple[str, ...] = ()


def is_dates(time: Time | None) -> bool:
    """Return whether times are described as dates."""
    return time is not None and time.unit is not None and time.unit not in UNITS


def seconds(values: Iterable[str], time: Time, where: str) -> np.ndarray:
    """Convert dates to seconds since 1970, float64.

    Of several patterns that one counts by which all dates of the file can be read.

    Raises:
        UserError: one is no date, or ambiguous as it lies in the hour that summer time skips or repeats; or no pattern
            fits all, or several do and disagree.
    """
    if not isinstance(time.unit, tuple):
        return _seconds(values, time, time.unit, where)
    values, found, reasons = list(values), dict[str, np.ndarray](), list[str]()
    for unit in time.unit:
        try:
            found[unit] = _seconds(values, time, unit, where)
        except UserError as error:
            reasons.append(str(error))
    if not found:
        raise UserError(f"{where}: none of {', '.join(time.unit)} fits all its times; {reasons[0]}")
    first, *others = found
    if other := next((unit for unit in others if not np.array_equal(found[unit], found[first])), None):
        raise UserError(
            f"{where}: its times can be read by '{first}' and by '{other}', which differ; keep one in 'unit'"
        )
    return found[first]


def _seconds(values: Iterable[str], time: Time, unit: str | None, where: str) -> np.ndarray:
    """Convert dates of one kind, a pattern or 'iso', which None is, too. Raises UserError; see `seconds`."""
    import pandas as pd

    texts = pd.Series([str(value).strip() for value in values], dtype=object)
    pattern = None if unit in (None, "iso") else unit
    if pattern is None:
        wrong = next((n for n, text in enumerate(texts) if not ISO.fullmatch(text)), None)
        if wrong is not None:
            raise UserError(
                f"{where}: row {wrong + 1}, time {texts[wrong][:40]!r} is no number and no date like "
                "2024-03-01T09:00:00.02; say what it is with time: {column: ..., unit: '%d/%m/%Y %H:%M:%S.%f'}, where "
                "the day is first, or '%m/%d/%Y ...' where the month is"
            )
        texts = texts.str.replace(",", ".")  # of the seconds
    zoned = pattern is None and bool(ZONED.fullmatch(texts.iloc[0])) if len(texts) else False
    if pattern is not None:
        zoned = "%z" in pattern
    try:
        dates = pd.to_datetime(texts, format=pattern or "ISO8601", utc=True if zoned else None)
        if time.timezone and not zoned:
            dates = dates.dt.tz_localize(time.timezone, ambiguous="infer", nonexistent="raise")
        if dates.dt.tz is not None:
            dates = dates.dt.tz_convert("UTC").dt.tz_localize(None)
    except (ValueError, TypeError, AttributeError, OverflowError) as error:
        reason = shown(str(error).partition("You might want")[0], 160)  # of which pandas has much that is not for users
        raise UserError(f"{where}: times are no dates of one kind ({reason})") from error
    passed: np.ndarray = dates.to_numpy().astype("datetime64[ns]") - np.datetime64(0, "ns")
    return passed / np.timedelta64(1, "s")


def is_date(text: str) -> bool:
    """Return whether a cell is certainly a date."""
    return bool(ISO.fullmatch(text))


def check_finite(time: np.ndarray | None, where: Path | str) -> None:
    """Raise UserError where a row has no time."""
    if time is not None and not np.isfinite(time).all():
        missing = np.flatnonzero(~np.isfinite(time))
        raise UserError(f"{where}: {many(len(missing), 'row')} without a time, the first is row {missing[0] + 1}")
