"""Access to the files of a data set in a folder or in a zip, which is never unpacked."""

from __future__ import annotations

import re
import shutil
import stat
import tempfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath, PurePosixPath
from typing import IO

from dataset_utils import limits
from dataset_utils.files import check_listable, check_regular, is_folder, parsing, unwritable
from registry.errors import UserError

DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError)
AGAIN = "fetch the file again"


class Archive(ABC):
    """Read-only view of a data set's folder, on disk or inside a zip.

    Attributes:
        path: the folder or zip it was opened from, for messages.
        root: the data set's folder (in a zip: its path in the zip).
    """

    def __init__(self, path: Path, root: PurePath) -> None:
        self.path, self.root = path, root

    @abstractmethod
    def match(self, pattern: str) -> list[str]:
        """Return the files below `root` whose relative path fits `pattern` (`*` within one part), sorted."""

    @abstractmethod
    def size(self, name: str) -> int:
        """Return the size of a file in bytes."""

    @abstractmethod
    def where(self, name: str) -> str:
        """Return a file's name for messages."""

    @abstractmethod
    def _stream(self, name: str) -> IO[bytes]:
        """Open a file; errors are left to `open`."""

    @contextmanager
    def open(self, name: str) -> Iterator[IO[bytes]]:
        """Open a file below `root` for reading bytes. Raises UserError where it is missing or damaged."""
        try:
            with self._stream(name) as file:
                yield file
        except DAMAGED as error:
            raise UserError(f"{self.path}: '{name}' in it is damaged ({error}); {AGAIN}") from error
        except OSError as error:
            raise UserError(f"{self.where(name)}: cannot be read ({error.strerror or error})") from error


class _Folder(Archive):
    def __init__(self, path: Path, root: Path) -> None:
        super().__init__(path, root)
        self._folder = root

    def match(self, pattern: str) -> list[str]:
        return sorted(found.relative_to(self._folder).as_posix() for found in self._folder.glob(pattern))

    def size(self, name: str) -> int:
        return (self._folder / name).stat().st_size

    def where(self, name: str) -> str:
        return str(self._folder / name)

    def _stream(self, name: str) -> IO[bytes]:
        check_regular(self._folder / name)
        return (self._folder / name).open("rb")


class _Zipped(Archive):
    def __init__(self, path: Path, root: PurePosixPath, zipped: zipfile.ZipFile) -> None:
        super().__init__(path, root)
        self._zip = zipped

    def match(self, pattern: str) -> list[str]:
        depth = len(self.root.parts)
        inside = [PurePosixPath(*p.parts[depth:]) for p in _members(self._zip) if p.is_relative_to(self.root)]
        parts = len(PurePosixPath(pattern).parts)
        return sorted(str(name) for name in inside if len(name.parts) == parts and name.match(pattern))

    def size(self, name: str) -> int:
        return self._info(name).file_size

    def where(self, name: str) -> str:
        return f"{self.path} ({name})"

    def _stream(self, name: str) -> IO[bytes]:
        return self._zip.open(self._info(name))

    def _info(self, name: str) -> zipfile.ZipInfo:
        try:
            return self._zip.getinfo(str(self.root / name))
        except KeyError as error:
            raise UserError(f"{self.path}: there is no '{name}' in it") from error


@contextmanager
def open_archive(path: Path, key: str) -> Iterator[Archive]:
    """Open a data set in a folder, a zip, or a zip inside a zip (as the UCI archive sends them).

    Args:
        path: the folder or zip.
        key: relative path of a file that only this data set has (`*` allowed), by which its folder is found.

    Raises:
        UserError: it does not exist, is damaged or dangerous (see `check_zip`), or is another data set.
    """
    if is_folder(path):
        folder = _folder_root(path, key)
        if folder is None:
            raise UserError(f"{path}: no '{key}' in this folder")
        yield _Folder(path, folder)
        return
    check_regular(path)
    with _open_zip(path, path) as outer:
        root = _zip_root(outer, key)
        if root is not None:
            yield _Zipped(path, root, outer)
            return
        for inner in (str(name) for name in _members(outer) if name.suffix.lower() == ".zip"):
            with _nested(path, outer, inner) as zipped:
                root = _zip_root(zipped, key)
                if root is not None:
                    yield _Zipped(path, root, zipped)
                    return
    raise UserError(f"{path}: no '{key}' in this zip")


def holds(folder: Path, key: str) -> bool:
    """Return whether the data set's files are in `folder`, at most two levels down."""
    return _folder_root(folder, key) is not None


def check_zip(zipped: zipfile.ZipFile, path: Path) -> None:
    """Raise UserError for a dangerous zip.

    Refused are absolute paths, `..`, drive letters, backslashes, symbolic links, encrypted members and zip bombs (the
    sizes in the directory are binding, as `zipfile` reads no further).
    """
    total = packed = 0
    if len(zipped.infolist()) > limits.MEMBERS:
        raise UserError(f"{path}: refused, it holds more than {limits.MEMBERS} files")
    for info in zipped.infolist():
        name = info.orig_filename
        if name.startswith("/") or "\\" in name or re.match(r"[A-Za-z]:", name) or ".." in name.split("/"):
            raise UserError(f"{path}: refused, it holds the unsafe path {name!r}")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise UserError(f"{path}: refused, '{name}' in it is a symbolic link")
        if info.flag_bits & 1:
            raise UserError(f"{path}: '{name}' in it is encrypted; unpack it yourself and give the folder")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise UserError(f"{path}: '{name}' in it is packed in an unusual way; unpack it and give the folder")
        total += info.file_size
        packed += info.compress_size
    limits.check_unpacked(path, total, packed)


@contextmanager
def _open_zip(source: Path | IO[bytes], path: Path) -> Iterator[zipfile.ZipFile]:
    with parsing(path, "zip", AGAIN):
        zipped = zipfile.ZipFile(source)
    with zipped:
        check_zip(zipped, path)
        yield zipped


@contextmanager
def _nested(path: Path, outer: zipfile.ZipFile, name: str) -> Iterator[zipfile.ZipFile]:
    """Open a zip inside a zip from a temporary copy, as seeking in compressed data is slow."""
    with tempfile.TemporaryFile() as copy:
        try:
            with outer.open(name) as inner:
                shutil.copyfileobj(inner, copy, 1 << 20)
        except DAMAGED as error:
            raise UserError(f"{path}: '{name}' in it is damaged ({error}); {AGAIN}") from error
        except OSError as error:
            raise unwritable(Path(tempfile.gettempdir()), error) from error
        with _open_zip(copy, path) as zipped:
            yield zipped


def _members(zipped: zipfile.ZipFile) -> list[PurePosixPath]:
    """Return the files in a zip, without those that macOS adds."""
    # not by `ZipInfo.is_dir`, which fails for an empty name
    names = (info.filename for info in zipped.infolist() if not info.filename.endswith("/"))
    return sorted(PurePosixPath(name) for name in names if not name.startswith("__MACOSX/"))


def _zip_root(zipped: zipfile.ZipFile, key: str) -> PurePosixPath | None:
    depth = len(PurePosixPath(key).parts)
    roots = [PurePosixPath(*name.parts[:-depth]) for name in _members(zipped) if name.match(key)]
    return min(roots, key=lambda root: (len(root.parts), root), default=None)


def _folder_root(folder: Path, key: str) -> Path | None:
    check_listable(folder)
    depth = len(PurePosixPath(key).parts)
    for above in ("", "*/", "*/*/"):
        hits = sorted(folder.glob(above + key))
        if hits:
            return hits[0].parents[depth - 1]
    return None
