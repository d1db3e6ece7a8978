"""Three wards of one hospital: an example, to be replaced by your own Datasets."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from dataset_utils.recording import Preprocessing
from fedkdx_centres.centres import Centres


class NpzDataset(Dataset[Any]):
    """The arrays `x` (n, channels, time) and `y` (n,) of a .npz file, read without pickle."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as file:
            self.x, self.y = file["x"], file["y"]

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        return self.x[index], int(self.y[index])


class Wards(Centres):
    """Heart and breath of three wards, windows of two seconds, as an example."""

    name = "Wards"
    paper = "an example"
    classes = ("rest", "effort", "alarm")
    channels = ("heart", "breath")
    preprocessing = Preprocessing(rate=32.0, window=64, overlap=0.0, median=0, lowpass=0, gravity=0)
    wards = ("east", "north", "west")

    def centres(self, path: Path) -> Mapping[str, tuple[NpzDataset, NpzDataset]]:
        return {
            ward: (NpzDataset(path / f"{ward}-train.npz"), NpzDataset(path / f"{ward}-test.npz")) for ward in self.wards
        }
