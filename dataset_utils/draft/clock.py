"""The column of times, its unit, and the sampling rate that follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dataset_utils.draft.layout import DATE
from dataset_utils.draft.look import Column, Look
from dataset_utils.draft.words import TIMES, among, unit_in
from dataset_utils.sources.own.checked import TO_FILL
from dataset_utils.sources.own.description import Time
from dataset_utils.sources.own.table import is_date, seconds
from dataset_utils.time_axis import UNITS, measured
from registry.errors import UserError

DATES = 20_000
"""Most dates of a file that are converted."""
SINCE_1970 = (("ns", 1e17), ("us", 1e14), ("ms", 1e11), ("s", 1e8))
"""Unit of times since 1970, and a number that they exceed: that of 1973."""
LIKELY = (0.5, 1_000.0)
"""Rates between which the unit of times is sought, Hz."""
EVEN = 0.9
"""Least share of steps near the median step in a column that is taken for the time without its name saying so."""
SAME = 0.005
"""Largest relative difference of a measured rate and the whole number that is written for it."""
DIFFER = 0.04
"""Relative difference above which recordings count as of different rates; readers allow 5 %."""
PATTERNS = tuple(
    f"{day}{between}{clock}"
    for day in ("%d.%m.%Y", "%d/%m/%Y", "%m/%d/%Y", "%d-%m-%Y", "%m-%d-%Y", "%Y/%m/%d", "%Y.%m.%d")
    for between in (" ", "T")
    for clock in ("%H:%M:%S.%f", "%H:%M:%S", "%H:%M")
)


@dataclass(frozen=True)
class Clock:
    """Times of the recordings.

    Attributes:
        column: the column; None where none can be used.
        unit: value of the key `unit`.
        why: from what column and unit follow.
        sure: whether the column's name says what it is, and the unit follows.
        rates: measured rate of each file, Hz.
        counters: columns that number the rows, or times that cannot be used: no channels.
        told: remarks.
    """

    column: str | None
    unit: str | None
    why: str
    sure: bool
    rates: tuple[float, ...]
    counters: tuple[str, ...]
    told: tuple[str, ...] = ()


def clock_of(looks: Sequence[Look], names: Sequence[str]) -> Clock:
    """Return the clock of recordings of one kind."""
    counters = tuple(name for name in names if _counts(looks, name))
    named = [name for name in names if among(name, TIMES) and _is_time(looks, name, 0.0)]
    others = [name for name in names if name not in (*named, *counters) and _is_time(looks, name, EVEN)]
    told = list[str]()
    for name in (*named, *others):
        coarse = _shared(looks, name)
        if coarse > 0.3:
            told.append(f"column '{name}' is left out: {coarse:.0%} of its rows share a time with the row before")
            counters = (*counters, name)
            continue
        found = _read(looks, name)
        if found is None:
            told.append(f"column '{name}' holds dates or times of a kind that is not known")
            continue
        unit, rates, why = found
        what = f"its name and rising values say so; {why}" if name in named else f"its values rise evenly; {why}"
        alternatives = [other for other in (*named, *others) if other != name]
        what += f"; also seen: {', '.join(alternatives[:5])}" if alternatives else ""
        rest = (*counters, *alternatives)
        return Clock(name, unit, what, name in named and unit != TO_FILL, rates, rest, tuple(told))
    return Clock(None, None, "", False, (), counters, tuple(told))


def rate_of(rates: Sequence[float]) -> tuple[float, bool]:
    """Return the rate to write for measured ones, Hz, and whether all of them agree with it."""
    middle = float(np.median(rates))
    whole = round(middle)
    rate = float(whole) if whole and abs(middle / whole - 1) <= SAME else float(f"{middle:.4g}")
    return rate, all(abs(own / rate - 1) <= DIFFER for own in rates)


def _numbers(look: Look, name: str) -> np.ndarray | None:
    column = look.columns.get(name)
    if column is None or column.numbers is None:
        return None
    finite: np.ndarray = column.numbers[np.isfinite(column.numbers)]
    return finite


def _counts(looks: Sequence[Look], name: str) -> bool:
    """Return whether a column numbers the rows: 0, 1, 2, ... or 1, 2, 3, ..."""
    if among(name, TIMES) or unit_in(name):
        return False
    for look in looks:
        values = _numbers(look, name)
        if values is None or len(values) < 3 or len(values) < look.rows or not (np.diff(values) == 1).mean() > 0.99:
            return False
    return True


def _is_dates(column: Column) -> bool:
    values = [value for value in column.text.values[:200] if value]
    return bool(values) and column.numbers is None and all(is_date(v) or DATE.fullmatch(v) for v in values)


def _is_time(looks: Sequence[Look], name: str, even: float) -> bool:
    """Return whether a column rises in all files, with `even` as the least share of like steps."""
    for look in looks:
        column = look.columns.get(name)
        if column is None:
            return False
        if _is_dates(column):
            continue
        values = _numbers(look, name)
        if values is None or len(values) < 3:
            return False
        steps = np.diff(values)
        rising = steps[steps > 0]
        if (steps >= 0).mean() < 0.9 or not len(rising):
            return False
        near = np.abs(rising / np.median(rising) - 1) < 0.5
        if even and (near.mean() < even or (steps > 0).mean() < even):
            return False
    return True


def _shared(looks: Sequence[Look], name: str) -> float:
    """Return the largest share of rows of a file that have the time of the row before."""
    return max(float((np.diff(look.columns[name].text.codes) == 0).mean()) if look.rows > 1 else 0.0 for look in looks)


def _read(looks: Sequence[Look], name: str) -> tuple[str, tuple[float, ...], str] | None:
    """Return unit, rates and from what they follow; None for dates that no pattern fits."""
    if any(_is_dates(look.columns[name]) for look in looks):
        return _read_dates(looks, name)
    values = [(found if (found := _numbers(look, name)) is not None else np.empty(0)) for look in looks]
    per_unit = [rate for own in values if (rate := measured(own)) is not None]
    if not per_unit:
        return None
    step = 1 / float(np.median(per_unit))
    unit, why = _unit(name, float(np.median(np.concatenate(values))), step)
    if unit == TO_FILL:
        return unit, (), why
    return unit, tuple(rate / UNITS[unit] for rate in per_unit), why


def _unit(name: str, middle: float, step: float) -> tuple[str, str]:
    if (stated := unit_in(name)) is not None:
        return stated, f"its name says the unit, the median step is {step:.4g}"
    for unit, least in SINCE_1970:
        if middle > least and LIKELY[0] / 10 <= 1 / (step * UNITS[unit]) <= LIKELY[1] * 10:
            return unit, f"values near {middle:.3g} are {unit} since 1970, in steps of {step:.4g}"
    fitting = {unit: 1 / (step * UNITS[unit]) for unit in UNITS}
    fitting = {unit: rate for unit, rate in fitting.items() if LIKELY[0] <= rate <= LIKELY[1] * (1 + SAME)}
    if len(fitting) == 1:
        unit = next(iter(fitting))
        return unit, f"steps of {step:.4g} are {fitting[unit]:.4g} Hz in {unit}, and no usual rate in other units"
    seen = " or ".join(f"{unit} ({rate:.4g} Hz)" for unit, rate in fitting.items()) or ", ".join(UNITS)
    return TO_FILL, f"steps of {step:.4g} may be {seen}"


def _read_dates(looks: Sequence[Look], name: str) -> tuple[str, tuple[float, ...], str] | None:
    rows = [_dates(look.columns[name]) for look in looks]
    if all(is_date(value) for own in rows for value in own[:200]):
        units: tuple[str, ...] = ("iso",)
    else:
        units = PATTERNS
    fitting: dict[str, list[np.ndarray]] = {}
    for unit in units:
        try:
            fitting[unit] = [seconds(own, Time(name, unit), name) for own in rows]
        except UserError:
            continue
    rising = {
        unit: clocks for unit, clocks in fitting.items() if all((np.diff(own) >= 0).mean() > 0.9 for own in clocks)
    }
    fitting = rising or fitting
    if not fitting:
        return None
    unit, clocks = next(iter(fitting.items()))
    rates = tuple(rate for own in clocks if (rate := measured(own)) is not None)
    if not rates:
        return None
    example = rows[0][0]
    others = [other for other, own in fitting.items() if not np.array_equal(own[0], clocks[0])]
    if others:
        return TO_FILL, rates, f"'{example}' may be {' or '.join(map(repr, (unit, *others)))}"
    return unit, rates, f"dates like '{example}'"


def _dates(column: Column) -> list[str]:
    return [column.text.values[code] for code in column.text.codes[:DATES]]
