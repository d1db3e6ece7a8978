"""Opening of files that may be compressed (.gz, .zip of one file)."""

from __future__ import annotations

import gzip
import io
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from dataset_utils import limits
from dataset_utils.files import check_regular
from dataset_utils.sources.archive import check_zip
from registry.errors import UserError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

DAMAGED = (zipfile.BadZipFile, zlib.error, gzip.BadGzipFile, EOFError, NotImplementedError)


def most_unpacked(file: Path) -> int:
    """Return the bytes of a file; where it is compressed, the most that it may unpack to. Raises UserError."""
    size = check_regular(file)
    packed = file.suffix.lower() in (".gz", ".zip")
    return max(limits.RATIO_FROM, limits.RATIO * size) if packed else size


@contextmanager
def opened(file: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading bytes. Raises UserError: unreadable, damaged, or a zip of several files or none."""
    check_regular(file)
    try:
        if file.suffix.lower() == ".gz":
            with file.open("rb") as raw, gzip.open(raw) as unpacked:
                yield io.BufferedReader(_Bounded(unpacked, file))
        elif file.suffix.lower() == ".zip":
            with zipfile.ZipFile(file) as zipped:
                check_zip(zipped, file)
                with zipped.open(only_member(zipped, file)) as member:
                    yield member
        else:
            with file.open("rb") as raw:
                yield raw
    except DAMAGED as error:
        raise UserError(f"{file}: is damaged ({error})") from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from error


def only_member(zipped: zipfile.ZipFile, file: Path) -> str:
    """Return the name of the one file in a zip. Raises UserError."""
    # not by `ZipInfo.is_dir`, which fails for an empty name
    names = [n.filename for n in zipped.infolist() if not n.filename.endswith("/")]
    names = [name for name in names if not name.startswith("__MACOSX/")]
    if len(names) != 1:
        raise UserError(f"{file}: holds {len(names)} files; unpack it, and name its folder in 'folder'")
    return names[0]


class _Bounded(io.RawIOBase):
    """Stream that raises UserError if it unpacks to far more than its file holds."""

    def __init__(self, stream: gzip.GzipFile, file: Path) -> None:
        self.stream, self.file = stream, file
        self.most = most_unpacked(file)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            while self.read(io.DEFAULT_BUFFER_SIZE):
                pass
        place = offset + (self.stream.tell() if whence != io.SEEK_SET else 0)
        self._check(place)
        return self.stream.seek(place)

    def tell(self) -> int:
        return self.stream.tell()

    def readinto(self, buffer: WriteableBuffer) -> int:
        space = memoryview(buffer)
        piece = self.stream.read(len(space))
        space[: len(piece)] = piece
        self._check(self.stream.tell())
        return len(piece)

    def _check(self, place: int) -> None:
        if place > self.most:
            raise UserError(f"{self.file}: refused, it unpacks to more than {self.most} bytes (a zip bomb?)")
