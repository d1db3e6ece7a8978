"""Checks of MATLAB files of version 5 before they are read: by the library, a damaged one can end the process.

Format: MathWorks, MAT-File Format. A file is a header of 128 bytes and a sequence of elements; an element is a tag, of
type and length, and data. A variable is an element of type 14, which holds further elements: flags, dimensions, name,
and values or more variables; or one of type 15, which holds a compressed one.
"""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import IO

from dataset_utils import limits
from dataset_utils.files import check_regular

HEADER = 128
VARIABLE, COMPRESSED = 14, 15
VALUES = {1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 16, 17, 18}
"""Types of elements that hold values, numbers or text."""
SPARSE = 5
NUMBERS = range(6, 16)
"""Classes of variables, in their flags: full arrays of numbers."""
COMPLEX = 0x800
PIECE = 1 << 20


def check_mat(stream: IO[bytes], file: Path) -> None:
    """Check a whole file: what compressed parts unpack to, and the type and length of every element.

    Raises:
        UserError: it unpacks to far more than it holds.
        ValueError: an element has an unknown type, passes the end of its variable, or holds no values where numbers
            belong.
    """
    packed, unpacked = check_regular(file), 0
    stream.seek(126)
    order = "<" if stream.read(2) == b"IM" else ">"
    while len(tag := stream.read(8)) == 8:
        kind, size = struct.unpack(f"{order}II", tag)
        end = stream.tell() + size
        if kind == COMPRESSED:
            content = _unpacked(stream, size, file, packed, unpacked)
            unpacked += len(content)
            _check_elements(io.BytesIO(content), len(content), order)
        elif kind == VARIABLE:
            stream.seek(-8, io.SEEK_CUR)
            _check_elements(stream, end, order)
        stream.seek(end)


def _unpacked(stream: IO[bytes], left: int, file: Path, packed: int, before: int) -> bytes:
    """Return the content of a compressed part of `left` bytes; `before`: bytes that other parts unpacked to."""
    unpacking, content = zlib.decompressobj(), bytearray()
    while left > 0 and (piece := stream.read(min(left, PIECE))):
        left -= len(piece)
        while piece:
            content += unpacking.decompress(piece, PIECE)
            limits.check_unpacked(file, before + len(content), packed)
            piece = unpacking.unconsumed_tail
    return bytes(content)


def _check_elements(stream: IO[bytes], end: int, order: str) -> None:
    """Check the elements of a variable up to a position, in the order in which the library reads them.

    It takes each length as it is and each type as an index, so a type where numbers belong must be one of values.
    """
    values = 0  # elements with values that must follow
    flags = False  # whether the next one holds a variable's flags
    while stream.tell() < end:
        kind, size, padded = _tag(stream.read(8), order)
        if kind == VARIABLE and not values:
            values, flags = 1, True
            continue
        if kind not in VALUES:
            raise ValueError(f"an element of type {kind}")
        data = stream.tell() - (4 if not padded else 0)
        if flags:
            values, flags = _expected(stream, data, order), False
        else:
            values = max(0, values - 1)
        stream.seek(data + (padded if padded else 4))
        if data + size > end:
            raise ValueError("an element that passes the end of its variable")
    if values:
        raise ValueError("a variable without its values")


def _tag(tag: bytes, order: str) -> tuple[int, int, int]:
    """Return type, length, and length with padding of an element; 0 for one of up to four bytes within its tag."""
    if len(tag) < 8:
        raise ValueError("an element that is cut off")
    kind, size = struct.unpack(f"{order}II", tag)
    if kind >> 16:
        return kind & 0xFFFF, kind >> 16, 0
    return kind, size, size + -size % 8


def _expected(stream: IO[bytes], place: int, order: str) -> int:
    """Return how many elements of values follow a variable's flags: dimensions, name, and those of its numbers."""
    stream.seek(place)
    (flags,) = struct.unpack(f"{order}I", stream.read(4))
    kind, parts = flags & 0xFF, 2 if flags & COMPLEX else 1
    if kind in NUMBERS:
        return 2 + parts
    return 4 + parts if kind == SPARSE else 0
