"""A folder whose files carry checksums: what was damaged or exchanged since it was written is refused, not read.

The checksums are lines of the file `SHA256SUMS`, which `sha256sum -c` reads, too. While files are being replaced, it
holds those of both contents, the ones before as comments, so that a power cut at any moment leaves files that match.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from dataset_utils.files import is_file, replacing, unreadable
from registry.errors import UserError

SUMS = "SHA256SUMS"
LINE = re.compile(r"(#?)([0-9a-f]{64}|none)  (\S+)\n")
NONE = "none"  # stands for the checksum of a file that was not there before


class Sealed:
    """Reads and writes files of one folder, with their checksums.

    Args:
        folder: the folder; `write` makes it where it is missing.
        advice: what to do about a damaged file.
        private: names of files that are readable by their owner alone.
    """

    def __init__(self, folder: Path, advice: str, private: Collection[str] = ()) -> None:
        self.folder, self.advice, self.private = folder, advice, private

    def write(self, files: Mapping[str, bytes]) -> None:
        """Write files, all of them or none after a power cut as well. Raises UserError: one cannot be written."""
        old = self._sums() if self.sealed() else {}
        before = {name: sums for name, sums in old.items() if is_file(self.folder / name)}
        after = {name: [hashlib.sha256(content).hexdigest()] for name, content in files.items()}
        self._note(before | {name: sums + before.get(name, [NONE]) for name, sums in after.items()})
        for name, content in files.items():
            with replacing(self.folder / name, private=name in self.private) as part:
                part.write_bytes(content)
        self._note(before | after)

    def read(self, name: str) -> bytes:
        """Return the bytes of a file, which are those that were written.

        Raises:
            UserError: it is missing, cannot be read, was damaged, or never had a checksum.
        """
        path = self.folder / name
        wanted = self._sums().get(name)
        if wanted is None:
            raise UserError(f"{self.folder / SUMS}: damaged, it has no line for {name}; {self.advice}")
        content = read_bytes(path, self.advice)
        if hashlib.sha256(content).hexdigest() not in wanted:
            raise UserError(
                f"{path}: damaged or exchanged, its SHA-256 is not that in {SUMS} (which may be the damaged one); "
                f"{self.advice}"
            )
        return content

    def sealed(self) -> bool:
        """Return whether the folder has checksums at all. Raises UserError where this cannot be told."""
        return is_file(self.folder / SUMS)

    def holds(self, name: str) -> bool:
        """Return whether a file was written to its end. Raises UserError where it was, and is missing now."""
        there = is_file(self.folder / name)
        if not there and self.sealed() and NONE not in self._sums().get(name, [NONE]):
            raise UserError(f"{self.folder / name}: missing, it was removed; put it back, or {self.advice}")
        return there

    def check(self) -> None:
        """Raise UserError where a file with a checksum is damaged, or was removed."""
        for name in self._sums() if self.sealed() else ():
            if self.holds(name):
                self.read(name)

    def settled(self) -> bool:
        """Return whether the last `write` came to its end. Raises UserError where this cannot be told."""
        return not self.sealed() or all(len(sums) == 1 for sums in self._sums().values())

    def remove(self, *names: str) -> None:
        """Remove files on purpose, and their checksums. Raises UserError: one cannot be removed."""
        if self.sealed() and any(name in (sums := self._sums()) for name in names):
            self._note({name: own for name, own in sums.items() if name not in names})
        for name in names:
            try:
                (self.folder / name).unlink(missing_ok=True)
            except OSError as error:
                raise UserError(f"{self.folder / name}: cannot be removed ({error.strerror or error})") from error

    def _sums(self) -> dict[str, list[str]]:
        """Return the checksums that each file may have. Raises UserError: there are none, or they are damaged."""
        path, found = self.folder / SUMS, dict[str, list[str]]()
        for line in read_bytes(path, self.advice).decode(errors="replace").splitlines(keepends=True):
            if not (match := LINE.fullmatch(line)):
                raise UserError(f"{path}: damaged; put a copy back, or {self.advice}")
            found.setdefault(match[3], []).append(match[2])
        return found

    def _note(self, sums: Mapping[str, list[str]]) -> None:
        lines = [
            f"{'#' if place else ''}{one}  {name}\n"
            for name, own in sorted(sums.items())
            for place, one in enumerate(own)
        ]
        with replacing(self.folder / SUMS) as part:
            part.write_text("".join(lines), encoding="utf-8")


def read_bytes(path: Path, advice: str) -> bytes:
    """Return the bytes of a file. Raises UserError: it is missing, in which case `advice` is given, or unreadable."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"{path}: missing; put it back, or {advice}") from error
    except OSError as error:
        raise unreadable(path, error) from error
