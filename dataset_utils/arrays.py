"""Reading of .npy and .npz files, whose headers are checked against what their files hold; no pickle."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Container
from pathlib import Path
from typing import IO, Any

import numpy as np

from dataset_utils import limits
from dataset_utils.files import parsing
from dataset_utils.sources.archive import check_zip
from registry.errors import UserError

NPY = ".npy file of numbers or text"


def read_npy(stream: IO[bytes], size: int, where: str) -> np.ndarray:
    """Return the array of a .npy file.

    Args:
        stream: the file, seekable.
        size: bytes of the file; where it is compressed, the most that it may unpack to.
        where: its name, for messages.

    Raises:
        UserError: it is no .npy file, is damaged, announces more than it holds, or holds pickled objects.
    """
    with parsing(where, NPY):
        _, dtype = read_header(stream, size, where)
        if dtype.hasobject:
            raise UserError(f"{where}: holds pickled objects, which are not read; save arrays of numbers or text")
        stream.seek(0)
        array: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
        return array


def read_header(stream: IO[bytes], size: int, where: str) -> tuple[tuple[int, ...], np.dtype]:
    """Return the shape and type that a .npy file announces; the stream then stands at its values.

    Raises:
        UserError: it announces more than `size` bytes hold.
        Exception: it is no .npy file; NumPy raises almost anything.
    """
    major, _ = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(stream)
    if any(length < 0 for length in shape) or not dtype.itemsize:
        raise UserError(f"{where}: its header announces shape {shape} and type {dtype}, which is no array")
    announced, held = math.prod(shape) * dtype.itemsize, size - stream.tell()
    if announced > held and not dtype.hasobject:
        raise UserError(f"{where}: is damaged, its header announces {announced} bytes of values, but it holds {held}")
    return shape, dtype


def read_npz(
    source: Path | IO[bytes],
    where: Path,
    wanted: Container[str] | None = None,
    read: Callable[[IO[bytes], int, str], Any] = read_npy,
) -> dict[str, Any]:
    """Return the arrays of a .npz file by name.

    Args:
        source: the file.
        where: its name, for messages.
        wanted: names of the arrays to read; others are None. None: all.
        read: reads one array, as `read_npy` does.

    Raises:
        UserError: it is no .npz file, is damaged or encrypted, or unpacks to far more than it holds.
    """
    with parsing(where, ".npz file"), zipfile.ZipFile(source) as zipped:
        check_zip(zipped, where)
        arrays: dict[str, Any] = {}
        for info in zipped.infolist():
            name = info.filename.removesuffix(".npy")
            arrays[name] = None
            if wanted is None or name in wanted:
                limits.check_unpacked(where, info.file_size, info.compress_size)
                with zipped.open(info) as stream:
                    arrays[name] = read(stream, info.file_size, f"{where} ({name})")
        return arrays
