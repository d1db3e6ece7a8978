"""Locating a data set's original files on this machine, and downloading them if the user allows it."""

from __future__ import annotations

import errno
import http.client
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar

from dataset_utils import files
from dataset_utils.recording import Source
from dataset_utils.sources.archive import holds, open_archive
from registry.errors import UserError

TIMEOUT = 60
"""Seconds without data after which a connection counts as lost."""
PIECE = 1 << 20


@dataclass(frozen=True)
class Place:
    """Location and origin of a data set's files.

    Attributes:
        key: relative path of a file that only this data set has (`*` allowed).
        usual: its usual names under `raw`; a download is stored under the first one that ends in .zip.
        link: page that says how to get it.
        url: address of the zip, or '' if it cannot be downloaded.
    """

    key: str
    usual: tuple[str, ...]
    link: str
    url: str = ""


class ArchiveSource(Source):
    """A source whose originals are a folder or a zip.

    Class attributes:
        place: location and origin of the files.
        members: patterns of the files that `load` reads, relative to the data set's folder.
    """

    place: ClassVar[Place]
    members: ClassVar[tuple[str, ...]]

    def find(self, raw: Path | None, data_root: Path, download: bool) -> Path:
        """Find the folder or zip; see `Source.find`. A given folder may hold the zip or the files."""
        return locate(self.name, self.place, raw, data_root, download)

    def files(self, path: Path) -> list[Path]:
        """Return the zip, or the files that `members` names; see `Source.files`."""
        if path.is_file():
            return [path]
        with open_archive(path, self.place.key) as archive:
            return sorted(Path(archive.root) / name for pattern in self.members for name in archive.match(pattern))


def locate(name: str, place: Place, raw: Path | None, data_root: Path, download: bool) -> Path:
    """Return the folder or zip of the data set `name`; see `Source.find`."""
    folder = data_root / "raw" if raw is None else raw
    if raw is not None and files.state_of(raw) is None:
        raise UserError(f"{raw}: there is no such file or folder; {_advice(name, place)}")
    if raw is not None and not files.is_folder(raw):
        files.check_regular(raw)
        return raw
    candidates = [folder / usual for usual in place.usual]
    if raw is not None:
        candidates.insert(0, raw)
    for candidate in candidates:
        if files.is_file(candidate) or (files.is_folder(candidate) and holds(candidate, place.key)):
            return candidate
    if raw is None and download and place.url:
        return _download_archive(name, place, folder)
    raise UserError(f"{name} is not in {folder}: {_advice(name, place)}")


def _advice(name: str, place: Place) -> str:
    usual = next(usual for usual in place.usual if usual.endswith(".zip"))
    ways = "or name its zip or folder with --raw"
    if place.url:
        ways += ", or allow the download with --download"
    return f"get it from {place.link} and put it there as '{usual}' (or unpacked), {ways}"


def _download_archive(name: str, place: Place, folder: Path) -> Path:
    target = folder / next(usual for usual in place.usual if usual.endswith(".zip"))
    download(place.url, target)
    try:
        with open_archive(target, place.key):
            return target
    except UserError as error:
        target.unlink()
        raise UserError(f"{place.url} sent something that is not {name} ({error}); see {place.link}") from error


def download(url: str, target: Path, size: int | None = None, sha256: str | None = None) -> None:
    """Download `url` to `target`, continuing an earlier attempt in `target`.part.

    Progress is shown on stderr if that is a terminal. A lost connection is opened again as long as each attempt brings
    new bytes. `target` appears only when it is complete.

    Args:
        url: address of the file.
        target: file to write.
        size: expected number of bytes; None if it is not known.
        sha256: expected hex digest; None if it is not known.

    Raises:
        UserError: there is no connection, the server refuses, or the contents differ from what is expected.
    """
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
    except OSError as error:
        raise files.unwritable(part, error) from error
    most = part.stat().st_size
    while True:
        try:
            _fetch(url, part, size)
            break
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise files.unwritable(part, error) from error
            held = part.stat().st_size
            if held <= most:
                if not held:
                    part.unlink()
                kept = f"; {held} bytes are kept, the same command goes on from there" if held else ""
                raise UserError(
                    f"cannot download {url} ({getattr(error, 'reason', None) or error}){kept}; "
                    f"or fetch it by hand, for instance with a browser, and put it at {target}"
                ) from error
            most = held
    _verify(url, part, size, sha256)
    part.replace(target)


def _fetch(url: str, part: Path, size: int | None) -> None:
    """Make one attempt. Raises OSError (urllib's errors are subclasses) or HTTPException."""
    held = part.stat().st_size
    if size is not None and held == size:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={held}-"} if held else {})
    try:
        reply = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE or not held:
            raise
        part.write_bytes(b"")  # the stored bytes are not the beginning of the server's file
        return _fetch(url, part, size)
    with reply, part.open("ab") as file:
        if reply.status != http.client.PARTIAL_CONTENT:
            file.truncate(0)  # the server does not support ranges
            held = 0
        elif not reply.headers.get("Content-Range", "").startswith(f"bytes {held}-"):
            raise ConnectionError("the server sent another range than asked for")
        length = reply.headers.get("Content-Length")
        total = held + int(length) if length else size
        got = held + _copy(reply, file, part.stem, held, total)
    if total is not None and got < total:
        raise ConnectionError(f"connection cut after {got} of {total} bytes")


def _copy(reply: BinaryIO, file: BinaryIO, name: str, held: int, total: int | None) -> int:
    """Write what the server sends; return the number of bytes."""
    from tqdm import tqdm

    got = 0
    with tqdm(desc=name, initial=held, total=total, unit="B", unit_scale=True, disable=None) as bar:
        while piece := reply.read(PIECE):
            file.write(piece)
            got += len(piece)
            bar.update(len(piece))
    return got


def _verify(url: str, part: Path, size: int | None, sha256: str | None) -> None:
    held = part.stat().st_size
    problem = ""
    if size is not None and held != size:
        problem = f"{held} bytes instead of {size}"
    elif sha256 is not None and files.sha256(part) != sha256.lower():
        problem = f"contents with another SHA-256 than {sha256}"
    if problem:
        part.unlink()
        raise UserError(f"{url} sent {problem}; nothing was kept, try again or fetch it by hand")
