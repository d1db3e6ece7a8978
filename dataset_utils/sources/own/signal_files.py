"""Readers of files of physiological signals, EDF (pyedflib) and WFDB (wfdb), and of their annotations."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset_utils import limits
from dataset_utils.counts import some
from dataset_utils.files import check_regular, parsing
from dataset_utils.sources.own.annotation_file import parse
from dataset_utils.sources.own.description import Dialect
from dataset_utils.sources.own.table import Table, Wanted
from registry.errors import UserError
from registry.parameters import suggest

FLOAT = 8  # bytes of a sample as wfdb reads it
EDF = "EDF or BDF file"
WFDB = "WFDB record"


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


def rates_of(file: Path) -> dict[str, float]:
    """Return signal -> sampling rate, Hz, of an EDF, BDF or WFDB file, from its header. Raises UserError."""
    if file.suffix.lower() != ".hea":
        with _edf(file) as reader:
            rates = reader.getSampleFrequencies()
            return {str(n).strip(): float(r) for n, r in zip(reader.getSignalLabels(), rates, strict=True)}
    wfdb = _wfdb(file)
    with parsing(file, WFDB):
        header = _header(wfdb, file)
        _check_record(file, header)
        return {str(name): float(header.fs) for name in header.sig_name or ()}


def edf_annotations(file: Path) -> Annotations:
    """Read the annotations of an EDF+ file. Raises UserError."""
    with _edf(file) as reader:
        onset, duration, labels = reader.readAnnotations()
    spans = np.maximum(np.asarray(duration, dtype=np.float64), 0)  # -1 where none is given
    found = Annotations(np.asarray(onset, dtype=np.float64), spans, [str(label).strip() for label in labels])
    return _checked(file, found)


def read_wfdb(file: Path, wanted: Wanted, dialect: Dialect, only_texts: bool = False) -> Table:
    """Read the wanted signals of a WFDB record (.hea). Raises UserError."""
    _no_columns(file, wanted)
    wfdb = _wfdb(file)
    name = str(file.with_suffix(""))
    with parsing(file, WFDB):
        _check_record(file, _header(wfdb, file))
        record = wfdb.rdrecord(name)
        names = [str(name) for name in record.sig_name]
        signals, rate = np.asarray(record.p_signal, dtype=np.float32), float(record.fs)
    return Table(signals[:, [_place(file, names, name) for name in wanted.channels]], rate=rate)


def wfdb_annotations(file: Path) -> Annotations:
    """Read the annotations of a WFDB record, such as 100.atr. Raises UserError."""
    wfdb = _wfdb(file)
    check_regular(file)
    with parsing(file, "file of WFDB annotations"):
        marks = parse(file.read_bytes(), {label.label_store: label.symbol for label in wfdb.io.annotation.ann_labels})
        rate = marks.rate or float(_header(wfdb, file.with_suffix(".hea")).fs)
        onset = np.asarray(marks.samples, dtype=np.float64) / rate
    return _checked(file, Annotations(onset, np.zeros(len(onset)), marks.symbols))


def _checked(file: Path, found: Annotations) -> Annotations:
    """Return annotations. Raises UserError where one has no finite time, or its label is missing."""
    if not len(found.onset) == len(found.duration) == len(found.labels):
        raise UserError(f"{file}: its annotations have not as many times as labels")
    if not (np.isfinite(found.onset).all() and np.isfinite(found.duration).all()):
        raise UserError(f"{file}: an annotation has no finite time")
    return found


def _header(wfdb: Any, file: Path) -> Any:
    """Read the header of a WFDB record. Raises UserError, or what wfdb raises."""
    if check_regular(file) > limits.HEADER:
        raise UserError(f"{file}: has more than {limits.HEADER} bytes, which no header of a record has")
    return wfdb.rdheader(str(file.with_suffix("")))


def _check_record(file: Path, header: Any) -> None:
    """Raise UserError where a header names files that are not beside it, or samples that they cannot hold."""
    if not hasattr(header, "file_name"):
        raise UserError(f"{file}: is a record of several segments, which is not read; join them with wfdb.wrsamp")
    size = 0
    for name in dict.fromkeys(header.file_name or ()):
        if name != Path(name).name:
            raise UserError(f"{file}: names the file '{name}', which is not beside it")
        size += check_regular(file.parent / name)
    samples = sum(header.samps_per_frame or [1]) * (header.sig_len or 0)
    limits.check_unpacked(file, samples * FLOAT, size)


def _no_columns(file: Path, wanted: Wanted) -> None:
    if wanted.texts:
        raise UserError(
            f"{file}: holds signals only, no column '{wanted.texts[0]}'; take labels from its name, a table or events"
        )


def _place(file: Path, names: list[str], name: str) -> int:
    if name not in names:
        raise UserError(f"{file}: has no signal '{name}'{suggest(name, names)}; it has: {some(names)}")
    return names.index(name)


def _announced(file: Path) -> int:
    """Return the bytes that the header of an EDF or BDF file announces (www.edfplus.info, section "header record").

    pyedflib checks them too, but prints what differs. Raises ValueError where the header holds no such numbers.
    """
    with file.open("rb") as opened:
        head = opened.read(256)
        signals = _whole(head[252:256])
        opened.seek(256 + signals * 216)  # after eight other fields of each signal
        lengths = opened.read(signals * 8)
    samples = sum(_whole(lengths[at : at + 8]) for at in range(0, signals * 8, 8))
    width = 3 if head[:1] == b"\xff" else 2
    return _whole(head[184:192]) + _whole(head[236:244]) * samples * width


def _whole(field: bytes) -> int:
    if not field.strip().isdigit():
        raise ValueError(f"{field.decode('latin-1')!r} in its header where a number belongs")
    return int(field)


@contextmanager
def _edf(file: Path) -> Iterator[Any]:
    """Open an EDF file. Raises UserError where it, or what the block reads of it, is damaged."""
    try:
        import pyedflib
    except ImportError as error:
        raise UserError(f"{file}: EDF files need pyedflib: pip install pyedflib") from error
    size = check_regular(file)
    with parsing(file, EDF):
        announced = _announced(file)
    if announced != size:
        raise UserError(f"{file}: is damaged, its header announces {announced} bytes, but it holds {size}")
    with parsing(file, EDF), pyedflib.EdfReader(str(file)) as reader:
        yield reader


def _wfdb(file: Path) -> Any:
    try:
        import wfdb
    except ImportError as error:
        raise UserError(f"{file}: WFDB records need wfdb: pip install wfdb") from error
    return wfdb
