"""Readers of files of named arrays: .npz, .npy, .mat, .h5."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dataset_utils import limits
from dataset_utils.arrays import read_npy, read_npz
from dataset_utils.counts import some
from dataset_utils.files import check_regular, parsing
from dataset_utils.sources.own.description import Dialect
from dataset_utils.sources.own.labels import Text
from dataset_utils.sources.own.matlab import check_mat
from dataset_utils.sources.own.packed import most_unpacked, opened
from dataset_utils.sources.own.table import Table, Wanted, check_finite, is_dates, seconds
from registry.errors import UserError
from registry.parameters import suggest

PART = re.compile(r"(.+)\[([0-9]+)\]")
"""Name of a column: column 0 of an array `acc` of shape (samples, 3) is acc[0]."""
SIGNALS, LABELS, TIME = "x", "y", "time"
"""Default names of arrays."""
MAT = ".mat file"

Arrays = Mapping[str, Any]


def read_arrays(file: Path, wanted: Wanted, dialect: Dialect, only_texts: bool = False) -> Table:
    """Read a recording. Raises UserError if the file is damaged or lacks a wanted array.

    A channel is an array (samples,), a column of an array, or a column of `x` (samples, channels).
    """
    arrays = open_arrays(file, wanted.names, dialect)
    texts = {}
    for name in wanted.texts:
        stored = LABELS if name not in arrays and name == wanted.label else name
        texts[name] = as_text(file, stored, _column(file, arrays, stored))
    if only_texts:
        return Table(np.empty((0, 0), np.float32), texts)
    signals = _signals(file, arrays, wanted.channels)
    for name, text in texts.items():
        _check_length(file, LABELS if name not in arrays else name, text.codes, len(signals))
    time, unit = _time(file, arrays, wanted)
    if time is not None:
        _check_length(file, wanted.time.column if wanted.time else TIME, time, len(signals))
    if not len(signals):
        raise UserError(f"{file}: holds no samples")
    check_finite(time, file)
    return Table(signals, texts, time, unit)


def open_arrays(file: Path, names: tuple[str, ...], dialect: Dialect) -> Arrays:
    """Read the arrays of a file by name. Raises UserError."""
    from dataset_utils.sources.own.naming import ending

    openers: dict[str, Callable[..., Arrays]] = {".npz": _npz, ".npy": _npy, ".mat": _mat}
    return openers.get(ending(file), _hdf5)(file, names, dialect)


def as_text(file: Path, name: str, array: np.ndarray) -> Text:
    """Convert an array of labels or names to text."""
    if array.dtype == object:  # cells of MATLAB
        array = np.array(["" if np.size(cell) == 0 else str(np.ravel(cell)[0]) for cell in array.ravel()])
    if array.ndim != 1 or array.dtype.kind not in "fiubUSM":
        raise UserError(
            f"{file}: {name} has shape {array.shape}, type {array.dtype}; it must be one text or number a row"
        )
    return Text.of_array(array)


def _signals(file: Path, arrays: Arrays, channels: tuple[str, ...]) -> np.ndarray:
    """Return the signals (samples, channels), float32."""
    if SIGNALS in arrays and not any(_holds(arrays, name) for name in channels):
        x = np.asarray(arrays[SIGNALS])
        if x.ndim != 2 or x.shape[1] != len(channels) or x.dtype.kind not in "fiu":
            raise UserError(
                f"{file}: x has shape {x.shape}, type {x.dtype}; it must be numbers of shape "
                f"(samples, {len(channels)}), one column for each of 'columns'"
            )
        return x.astype(np.float32)
    columns = []
    for name in channels:
        column = _column(file, arrays, name)
        if column.ndim != 1 or column.dtype.kind not in "fiu":
            raise UserError(
                f"{file}: {name} has shape {column.shape}, type {column.dtype}; a channel must be numbers of shape "
                f"(samples,), such as {name}[0] of an array of several"
            )
        columns.append(column.astype(np.float32))
        _check_length(file, name, column, len(columns[0]))
    return np.stack(columns, axis=1)


def _time(file: Path, arrays: Arrays, wanted: Wanted) -> tuple[np.ndarray | None, str | None]:
    """Return times and their unit; where no time is described, the array `time` is used, in seconds."""
    unit: str | None
    if wanted.time is None:
        if TIME not in arrays:
            return None, None
        name, unit = TIME, "s"
    else:
        name, unit = wanted.time.column, wanted.time.of_numbers
        name = TIME if name not in arrays and TIME in arrays else name
    time = _column(file, arrays, name)
    if time.dtype.kind == "M":
        return (time.astype("datetime64[ns]") - np.datetime64(0, "ns")) / np.timedelta64(1, "s"), "s"
    if wanted.time is not None and (time.dtype.kind in "US" or is_dates(wanted.time)):
        return seconds(time.astype(str), wanted.time, str(file)), "s"
    if time.dtype.kind not in "fiu":
        raise UserError(f"{file}: {name} must be seconds, not {time.dtype}")
    return time.astype(np.float64), unit


def _holds(arrays: Arrays, name: str) -> bool:
    hit = PART.fullmatch(name)
    return name in arrays or (hit is not None and hit[1] in arrays)


def _column(file: Path, arrays: Arrays, name: str) -> np.ndarray:
    hit = PART.fullmatch(name)
    if name in arrays:
        array = np.asarray(arrays[name])
    elif hit is not None and hit[1] in arrays:
        array = np.asarray(arrays[hit[1]])
        if array.ndim != 2 or int(hit[2]) >= array.shape[1]:
            raise UserError(f"{file}: {hit[1]} has shape {array.shape}, there is no {name}")
        return array[:, int(hit[2])]
    else:
        raise UserError(f"{file}: has no array '{name}'{suggest(name, list(arrays))}; it has: {some(arrays)}")
    return array.ravel() if array.ndim == 2 and 1 in array.shape else array  # MATLAB's columns and rows


def _check_length(file: Path, name: str, array: np.ndarray, rows: int) -> None:
    if array.shape != (rows,):
        raise UserError(f"{file}: {name} has shape {array.shape} instead of ({rows},), one for each row of the signals")


def _npz(file: Path, names: tuple[str, ...], dialect: Dialect) -> Arrays:
    # an array that is not wanted need not be readable, but messages list its name
    check_regular(file)
    return read_npz(file, file, _asked(names))


def _asked(names: tuple[str, ...]) -> set[str]:
    """Return the names of the arrays that hold the wanted columns."""
    return {*names, *(hit[1] for name in names if (hit := PART.fullmatch(name))), SIGNALS, LABELS, TIME}


def _npy(file: Path, names: tuple[str, ...], dialect: Dialect) -> Arrays:
    """Read a table whose columns `dialect: {header: [...]}` names; else the array `x`."""
    with opened(file) as stream:
        array = read_npy(stream, most_unpacked(file), str(file))
    if array.dtype.names:
        return {name: array[name] for name in array.dtype.names}
    if dialect.header is None:
        return {SIGNALS: array}
    if array.ndim != 2 or array.shape[1] != len(dialect.header):
        raise UserError(
            f"{file}: has shape {array.shape}, but dialect: {{header: ...}} names {len(dialect.header)} columns"
        )
    return dict(zip(dialect.header, array.T, strict=True))


def _mat(file: Path, names: tuple[str, ...], dialect: Dialect) -> Arrays:
    from scipy.io import loadmat
    from scipy.io.matlab import matfile_version

    with opened(file) as stream, parsing(file, MAT):
        version, _ = matfile_version(stream)
        if version != 2:
            if version == 1:  # what MATLAB calls version 5
                check_mat(stream, file)
            stream.seek(0)
            loaded = loadmat(stream, simplify_cells=True)
            return _flat({name: value for name, value in loaded.items() if not name.startswith("__")})
    return _hdf5(file, names, dialect)  # version 7.3


def _flat(values: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Return nested structs as one level: 'data.acc'."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{above}{name}.")
        else:
            flat[above + name] = value
    return flat


def _hdf5(file: Path, names: tuple[str, ...], dialect: Dialect) -> Arrays:
    """Read the wanted datasets by their path, such as 'chest/acc'; other files that it refers to are not read."""
    import h5py

    size, asked = check_regular(file), _asked(names)
    loaded: dict[str, Any] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            loaded[name] = None
            if name in asked:
                if item.external or item.is_virtual:
                    raise UserError(f"{file}: '{name}' in it lies in another file; save it in one")
                if h5py.check_ref_dtype(item.dtype):  # cells of MATLAB: as text, all would be the same
                    raise UserError(
                        f"{file}: '{name}' in it refers to other places of the file, as MATLAB's cells do in -v7.3; "
                        "save it as numbers, or with -v7"
                    )
                limits.check_unpacked(f"{file} ({name})", item.size * max(1, item.dtype.itemsize), size)
                loaded[name] = item[()]

    with parsing(file, "HDF5 file"), h5py.File(file, "r") as stored:
        stored.visititems(visit)
    matlab = {name: _from_matlab(array) for name, array in loaded.items()}
    return matlab if file.suffix.lower() == ".mat" else {k: _decoded(v) for k, v in loaded.items()}


def _decoded(array: Any) -> Any:
    """Decode strings of HDF5, which are read as bytes."""
    if isinstance(array, np.ndarray) and array.dtype == object:
        return np.array([v.decode("utf-8", "replace") if isinstance(v, bytes) else str(v) for v in array.ravel()])
    return array


def _from_matlab(array: Any) -> Any:
    """Transpose an array, as MATLAB stores them transposed."""
    return array.T if isinstance(array, np.ndarray) else array
