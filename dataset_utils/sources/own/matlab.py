"""Checks of MATLAB files of version 5 before they are read: by the library, a damaged one can end the process.

Format: MathWorks, MAT-File Format. A file is a header of 128 bytes and a sequence of elements; an element is a tag, of
type and length, and data. A variable is an element of type 14, which holds further elements: flags, dimensions, name,
and values or more variables; or one of type 15, which holds a compressed one.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Container
from pathlib import Path
from typing import IO, NamedTuple

from dataset_utils import limits
from dataset_utils.files import check_regular

HEADER = 128
VARIABLE, COMPRESSED = 14, 15  # types of elements
FLAGS, DIMENSIONS, TEXT = (6,), (5, 6), (1, 2, 16)
VALUES = (1, 2, 3, 4, 5, 6, 7, 9, 12, 13, 16, 17, 18)  # numbers or text
# classes of variables, in their flags
CELLS, STRUCT, OBJECT, CHARACTERS, SPARSE, FUNCTION, OPAQUE = 1, 2, 3, 4, 5, 16, 17
NUMBERS = range(6, 16)  # full arrays
COMPLEX = 0x800
MOST_DIMENSIONS, DEEPEST = 32, 50
PIECE = 1 << 20


def check_mat(stream: IO[bytes], file: Path) -> None:
    """Check a whole file: what compressed parts unpack to, and the type and length of every element.

    Raises:
        UserError: it unpacks to far more than it holds.
        ValueError: an element has a type or length that does not belong there, or passes the end of its variable.
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
            inner = io.BytesIO(content)
            element = _element(inner, len(content), order, (VARIABLE,))
            _check_variable(inner, element.place + element.size, order)
        elif kind == VARIABLE:
            _check_variable(stream, end, order)
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


def _check_variable(stream: IO[bytes], end: int, order: str, depth: int = 0) -> None:
    """Check a variable up to a position, element by element, in the order in which the library reads them.

    The library takes each length as it is, each type as an index, and as many elements as the ones before promise.
    """
    if depth > DEEPEST:
        raise ValueError(f"variables more than {DEEPEST} deep in one another")
    if stream.tell() == end:  # an empty one
        return
    flags, _ = _integers(stream, end, order, FLAGS)
    kind = flags & 0xFF
    if kind == OPAQUE:
        for _ in range(3):  # names of it, its system and its class
            _pass(stream, end, order, TEXT)
        _check_inner(stream, end, order, 1, depth)
        return
    dimensions = _integers(stream, end, order, DIMENSIONS)
    if min(dimensions) < 0:
        raise ValueError("a negative dimension")
    values = math.prod(dimensions)
    _pass(stream, end, order, TEXT)  # the name
    if kind == CELLS:
        _check_inner(stream, end, order, values, depth)
    elif kind in (STRUCT, OBJECT):
        _check_inner(stream, end, order, values * _fields(stream, end, order, kind), depth)
    elif kind == FUNCTION:
        _check_inner(stream, end, order, 1, depth)
    elif kind in (CHARACTERS, SPARSE, *NUMBERS):
        sizes = [_pass(stream, end, order, VALUES) for _ in range((3 if kind == SPARSE else 1) + bool(flags & COMPLEX))]
        if kind != SPARSE and values > max(*sizes, PIECE):
            raise ValueError("fewer values than its dimensions say")
    else:
        raise ValueError(f"a variable of class {kind}")


def _fields(stream: IO[bytes], end: int, order: str, kind: int) -> int:
    """Return the number of fields of a struct or object, and go on to the first one's values."""
    if kind == OBJECT:
        _pass(stream, end, order, TEXT)  # the name of its class
    length = _integers(stream, end, order, DIMENSIONS, least=1)[0]
    names = _pass(stream, end, order, TEXT)
    if length <= 0 or names % length:
        raise ValueError("names of fields that have another length than is said")
    return names // length


def _check_inner(stream: IO[bytes], end: int, order: str, count: int, depth: int) -> None:
    """Check so many variables, one after the other, within another one."""
    if count > (end - stream.tell()) // 8:  # each one's tag takes as many bytes
        raise ValueError("fewer variables than its dimensions say")
    for _ in range(count):
        element = _element(stream, end, order, (VARIABLE,))
        _check_variable(stream, element.place + element.size, order, depth + 1)
        if stream.tell() != element.place + element.size:
            raise ValueError("a variable of another length than is said")


def _integers(stream: IO[bytes], end: int, order: str, types: Container[int], least: int = 2) -> list[int]:
    """Return the numbers of an element of 32-bit integers, at least so many, and go on to the next element."""
    element = _element(stream, end, order, types)
    count = element.size // 4
    if element.size % 4 or not least <= count <= (2 if types == FLAGS else MOST_DIMENSIONS):
        raise ValueError(f"{element.size} bytes where flags, dimensions or a length belong")
    numbers = list(struct.unpack(f"{order}{count}i", stream.read(element.size)))
    stream.seek(element.next)
    return numbers


def _pass(stream: IO[bytes], end: int, order: str, types: Container[int]) -> int:
    """Go on to the element after one of these types, and return its length in bytes."""
    element = _element(stream, end, order, types)
    stream.seek(element.next)
    return element.size


class _Element(NamedTuple):
    """An element: length in bytes and place of its data, and where the next one begins, at most at the given end."""

    size: int
    place: int
    next: int


def _element(stream: IO[bytes], end: int, order: str, types: Container[int]) -> _Element:
    """Read the tag of the next element, which must be of one of these types; its data follow, or are within the tag."""
    start, tag = stream.tell(), stream.read(8)
    if len(tag) < 8 or start + 8 > end:
        raise ValueError("an element that is cut off")
    kind, size = struct.unpack(f"{order}II", tag)
    place, after = start + 8, min(start + 8 + size + -size % 8, end)
    if kind >> 16:
        kind, size, place, after = kind & 0xFFFF, kind >> 16, start + 4, start + 8
    if kind not in types:
        raise ValueError(f"an element of type {kind}")
    if place + size > (end if place == start + 8 else after):
        raise ValueError("an element that passes the end of its variable or tag")
    stream.seek(place)
    return _Element(size, place, after)
