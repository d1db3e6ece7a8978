"""Readers of files of physiological signals, EDF (pyedflib) and WFDB (wfdb), and of their annotations."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset_utils.counts import some
from dataset_utils.sources.own.description import Dialect
from dataset_utils.sources.own.table import Table, Wanted
from registry.errors import UserError
from registry.parameters import suggest


class Annotations(NamedTuple):
    """Labelled events or intervals of a recording.

    Attributes:
        onset, duration: (n,), seconds from the recording's begin; duration is 0 for an event.
        labels: (n,), the labels.
    """

    onset: np.ndarray
    duration: np.ndarray
    labels: list[str]


def read_edf(file: Path, wanted: Wanted, dialect: Dialect, only_texts: bool = False) -> Table:
    """Read the wanted signals of an EDF, EDF+ or BDF file, which must share a rate. Raises UserError."""
    _no_columns(file, wanted)
    with _edf(file) as reader:
        names = [str(name).strip() for name in reader.getSignalLabels()]
        places = [_place(file, names, name) for name in wanted.channels]
        rates = {float(reader.getSampleFrequency(place)) for place in places}
        if len(rates) > 1:
            raise UserError(
                f"{file}: its signals have rates of {some(f'{rate:g} Hz' for rate in sorted(rates))}; name each in "
                "'streams', with its rate"
            )
        signals = np.stack([reader.readSignal(place).astype(np.float32) for place in places], axis=1)
    return Table(signals, rate=rates.pop())


def edf_annotations(file: Path) -> Annotations:
    """Read the annotations of an EDF+ file. Raises UserError."""
    with _edf(file) as reader:
        onset, duration, labels = reader.readAnnotations()
    spans = np.maximum(np.asarray(duration, dtype=np.float64), 0)  # -1 where none is given
    return Annotations(np.asarray(onset, dtype=np.float64), spans, [str(label).strip() for label in labels])


def read_wfdb(file: Path, wanted: Wanted, dialect: Dialect, only_texts: bool = False) -> Table:
    """Read the wanted signals of a WFDB record (.hea). Raises UserError."""
    _no_columns(file, wanted)
    wfdb = _wfdb(file)
    record = _read(file, lambda: wfdb.rdrecord(str(file.with_suffix(""))))
    names = [str(name) for name in record.sig_name]
    places = [_place(file, names, name) for name in wanted.channels]
    return Table(record.p_signal[:, places].astype(np.float32), rate=float(record.fs))


def wfdb_annotations(file: Path) -> Annotations:
    """Read the annotations of a WFDB record, such as 100.atr. Raises UserError."""
    wfdb = _wfdb(file)
    name = str(file.with_suffix(""))
    marks = _read(file, lambda: wfdb.rdann(name, file.suffix[1:]))
    rate = marks.fs or _read(file, lambda: wfdb.rdheader(name)).fs
    return Annotations(
        np.asarray(marks.sample, dtype=np.float64) / rate, np.zeros(len(marks.sample)), [str(s) for s in marks.symbol]
    )


def _no_columns(file: Path, wanted: Wanted) -> None:
    if wanted.texts:
        raise UserError(
            f"{file}: holds signals only, no column '{wanted.texts[0]}'; take labels from its name, a table or events"
        )


def _place(file: Path, names: list[str], name: str) -> int:
    if name not in names:
        raise UserError(f"{file}: has no signal '{name}'{suggest(name, names)}; it has: {some(names)}")
    return names.index(name)


def _edf(file: Path) -> Any:
    try:
        import pyedflib
    except ImportError as error:
        raise UserError(f"{file}: EDF files need pyedflib: pip install pyedflib") from error
    return _read(file, lambda: pyedflib.EdfReader(str(file)))


def _wfdb(file: Path) -> Any:
    try:
        import wfdb
    except ImportError as error:
        raise UserError(f"{file}: WFDB records need wfdb: pip install wfdb") from error
    return wfdb


def _read(file: Path, read: Any) -> Any:
    try:
        return read()
    except (OSError, ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())[:160]})") from error
