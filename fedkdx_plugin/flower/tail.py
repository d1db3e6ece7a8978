"""Follows a log that another process writes."""

from __future__ import annotations

from pathlib import Path


class Tail:
    """The lines that are added to a file from now on.

    Args:
        path: the file, which need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = path.stat().st_size if path.exists() else 0

    def lines(self) -> list[str]:
        """Whole lines that came since the last call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            file.seek(self._seen)
            whole, newline, _ = file.read().rpartition(b"\n")
        self._seen += len(whole) + len(newline)
        return whole.decode(errors="replace").splitlines()
