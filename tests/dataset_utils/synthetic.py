"""A small data set made on the spot, for the tests of the pipeline."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dataset_utils.recording import Preprocessing, Recording, Source, Windows


class Synthetic(Source):
    """Three subjects, three classes, four channels of noise around class-dependent levels."""

    name = "Synthetic"
    paper = "nobody"
    classes = ("lying", "sitting", "walking")
    channels = ("acc_x", "acc_y", "gyro", "heart")
    acceleration = ("acc_x", "acc_y")
    preprocessing = Preprocessing(rate=50.0, window=50, overlap=0.5)
    subjects = ("s10", "s2", "s1")

    def find(self, raw: Path | None, data_root: Path, download: bool) -> Path:
        path = raw or data_root / "raw" / self.name
        path.mkdir(parents=True, exist_ok=True)
        file = path / "notes.txt"
        if not file.exists():
            file.write_text("as a stand-in for recordings")
        return path

    def files(self, path: Path) -> list[Path]:
        return sorted(path.iterdir())

    def load(self, path: Path) -> Iterable[Recording] | Windows:
        for i, subject in enumerate(self.subjects):
            rng = np.random.default_rng(i)
            labels = np.repeat(np.arange(3), 1500)
            signals = rng.normal(size=(4500, 4)) + labels[:, None] + [0.0, 1.0, 2.0, 60.0]
            yield Recording(subject, signals, labels)


class Cut(Synthetic):
    """The windows of `windows`, as of a data set that is cut already."""

    name = "Cut"
    channels = ("a", "b")
    acceleration = ()
    preprocessing = Preprocessing(rate=50.0, window=20, overlap=0.5)

    def load(self, path: Path) -> Windows:
        return windows()


def windows(per_class: int = 40, classes: int = 3, subjects: int = 4, length: int = 20, step: int = 10) -> Windows:
    """Windows of bouts: each subject does every class twice, every bout a stretch of its own."""
    y, subject, stretch, start = [], [], [], []
    for s in range(subjects):
        for bout in range(2 * classes):
            half = per_class // 2
            y += [bout % classes] * half
            subject += [s] * half
            stretch += [s * 2 * classes + bout] * half
            start += [step * i for i in range(half)]
    n = len(y)
    x = np.arange(n * 2 * length, dtype=np.float32).reshape(n, 2, 1, length)
    return Windows(
        x, np.array(y), np.array(subject), np.array(stretch), np.array(start), tuple(f"s{s}" for s in range(subjects))
    )
