"""An array that grows at its end."""

from __future__ import annotations

import numpy as np


class Growing:
    """Rows appended to one array, so that memory never holds both the pieces and the whole."""

    def __init__(self, rows: int, width: tuple[int, ...], kind: type) -> None:
        """Allocate an array of (rows, *width); the system assigns memory only where something is written."""
        self.buffer: np.ndarray = np.empty((rows, *width), dtype=kind)
        self.rows = 0

    def add(self, block: np.ndarray) -> None:
        """Append rows."""
        end = self.rows + len(block)
        if end > len(self.buffer):
            # in place where the system can move pages; there are no views of the buffer yet
            self.buffer.resize((max(end, len(self.buffer) * 5 // 4), *self.buffer.shape[1:]), refcheck=False)
        self.buffer[self.rows : end] = block
        self.rows = end

    def whole(self) -> np.ndarray:
        """Return all rows."""
        return self.buffer[: self.rows]
