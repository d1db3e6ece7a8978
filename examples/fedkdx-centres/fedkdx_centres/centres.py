"""A data set of one PyTorch Dataset for each centre, or of a training and a test Dataset for each."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dataset_utils.recording import Source, Windows
from registry.errors import UserError


class Centres(Source):
    """A source whose subjects are centres, each of them with Datasets of items (x, label).

    x is (channels, time) or (channels, 1, time), a tensor or an array; label a whole number, also as a tensor of one
    value. Every item counts as a window that shares no sample with another: where yours overlap, give test sets. Items
    are taken as they are: `preprocessing` states rate and length, with `median`, `lowpass` and `gravity` 0.
    """

    @abstractmethod
    def centres(self, path: Path) -> Mapping[str, Dataset[Any] | tuple[Dataset[Any], Dataset[Any]]]:
        """Return centre -> its Dataset, to be split, or its training and test Dataset (for `--split given`)."""

    def find(self, raw: Path | None, data_root: Path, download: bool) -> Path:
        """Return the folder of the original files; nothing is downloaded. Raises UserError: it is missing."""
        path = raw or data_root / "raw" / self.name
        if not path.is_dir():
            raise UserError(f"{self.name} is not in {path}; put its files there, or name their folder by --raw")
        return path

    def files(self, path: Path) -> list[Path]:
        """Return all files below the folder."""
        return sorted(file for file in path.rglob("*") if file.is_file())

    def load(self, path: Path) -> Windows:
        """Read all items of all centres. Raises UserError: an item does not fit the description of the data set."""
        x, y, subject, test = [], [], [], []
        centres = self.centres(path)
        given = {name: isinstance(sets, tuple) for name, sets in centres.items()}
        if len(set(given.values())) > 1:
            without = ", ".join(name for name, both in given.items() if not both)
            raise UserError(f"{self.name}: {without}: no test set, which other centres have; give it, or those of none")
        for number, (name, sets) in enumerate(centres.items()):
            for tested, items in enumerate(sets if isinstance(sets, tuple) else (sets,)):
                for index in range(len(items)):  # type: ignore[arg-type]
                    where = f"{self.name}: {name}, {'test' if tested else 'training'} item {index}"
                    one, label = items[index]
                    x.append(self._window(where, one))
                    y.append(self._label(where, label))
                    subject.append(number)
                    test.append(tested)
        if not x:
            raise UserError(f"{path}: no centre of {self.name} has an item; look for its files there")
        count = len(x)
        return Windows(
            x=np.stack(x),
            y=np.array(y, dtype=np.int64),
            subject=np.array(subject, dtype=np.int64),
            stretch=np.arange(count),
            start=np.zeros(count, dtype=np.int64),
            subjects=tuple(centres),
            test=np.array(test, dtype=np.int8) if any(given.values()) else None,
        )

    def _window(self, where: str, x: Any) -> np.ndarray:
        window = np.asarray(x, dtype=np.float32)
        shape = (len(self.channels), 1, self.preprocessing.window)
        if window.shape not in (shape, (shape[0], shape[2])):
            raise UserError(f"{where}: x is {window.shape}, and should be {(shape[0], shape[2])} or {shape}")
        if not np.isfinite(window).all():
            raise UserError(f"{where}: x holds NaN or infinity; leave the item out, or fill the gap in your Dataset")
        return window.reshape(shape)

    def _label(self, where: str, label: Any) -> int:
        value = np.asarray(label).reshape(-1)
        if len(value) != 1 or value[0] not in range(len(self.classes)):
            raise UserError(f"{where}: label {value.tolist()}, and should be one of 0 to {len(self.classes) - 1}")
        return int(value[0])
