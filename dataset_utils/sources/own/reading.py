"""Readers for each kind of file."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

from dataset_utils.sources.archive import check_zip
from dataset_utils.sources.own.containers import read_arrays
from dataset_utils.sources.own.description import Dialect
from dataset_utils.sources.own.naming import ending
from dataset_utils.sources.own.packed import DAMAGED, only_member
from dataset_utils.sources.own.signal_files import read_edf, read_wfdb
from dataset_utils.sources.own.table import Table, Wanted
from dataset_utils.sources.own.text_files import read_parquet, read_text
from registry.errors import UserError

Reader = Callable[..., Table]
READERS: dict[str, Reader] = {
    ".csv": read_text,
    ".tsv": read_text,
    ".npz": read_arrays,
    ".npy": read_arrays,
    ".mat": read_arrays,
    ".h5": read_arrays,
    ".hdf5": read_arrays,
    ".parquet": read_parquet,
    ".edf": read_edf,
    ".bdf": read_edf,
    ".hea": read_wfdb,
    ".txt": read_text,
    ".dat": read_text,
    ".log": read_text,
}
SECOND = (".txt", ".dat", ".log")
"""Endings that both recordings and notes have."""
UNPACKED_ONLY = (".npz", ".h5", ".hdf5", ".edf", ".bdf", ".hea")
"""Kinds that are read from an uncompressed file on disk only."""


def read(file: Path, wanted: Wanted, dialect: Dialect, only_texts: bool = False) -> Table:
    """Read a recording.

    Args:
        file: the file.
        wanted: columns to read.
        dialect: format of text files.
        only_texts: whether signals and times are not needed.

    Raises:
        UserError: the file is damaged, or lacks a wanted column.
    """
    kind = kind_of(file)
    if kind in UNPACKED_ONLY and file.suffix.lower() in (".gz", ".zip"):
        raise UserError(f"{file}: files of this kind are read unpacked only; unpack it")
    return READERS[kind](file, wanted, dialect, only_texts)


def kind_of(file: Path) -> str:
    """Return the ending that determines the reader. Raises UserError if there is none."""
    kind = ending(file)
    if file.suffix.lower() == ".zip" and kind not in READERS:
        try:
            with zipfile.ZipFile(file) as zipped:
                check_zip(zipped, file)
                kind = ending(Path(only_member(zipped, file)))
        except DAMAGED as error:
            raise UserError(f"{file}: is damaged ({error})") from error
    if kind not in READERS:
        raise UserError(f"{file}: its ending is none of {', '.join(READERS)}")
    return kind
