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

from dataset_utils.sources.archive import MAX_RATIO, RATIO_FROM, check_zip
from registry.errors import UserError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

DAMAGED = (zipfile.BadZipFile, zlib.error, gzip.BadGzipFile, EOFError, NotImplementedError)


@contextmanager
def opened(file: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading bytes. Raises UserError: unreadable, damaged, or a zip of several files or none."""
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
    names = [n.filename for n in zipped.infolist() if not n.is_dir() and not n.filename.startswith("__MACOSX/")]
    if len(names) != 1:
        raise UserError(f"{file}: holds {len(names)} files; unpack it, and name its folder in 'folder'")
    return names[0]


class _Bounded(io.RawIOBase):
    """Stream that raises UserError if it unpacks to far more than its file holds."""

    def __init__(self, stream: gzip.GzipFile, file: Path) -> None:
        self.stream, self.file, self.read_so_far = stream, file, 0
        self.most = max(RATIO_FROM, MAX_RATIO * file.stat().st_size)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.stream.seek(offset, whence)

    def tell(self) -> int:
        return self.stream.tell()

    def readinto(self, buffer: WriteableBuffer) -> int:
        space = memoryview(buffer)
        piece = self.stream.read(len(space))
        space[: len(piece)] = piece
        self.read_so_far += len(piece)
        if self.read_so_far > self.most:
            raise UserError(f"{self.file}: refused, it unpacks to more than {self.most} bytes (a bomb?)")
        return len(piece)
