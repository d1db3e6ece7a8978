"""WESAD: stress and affect, the chest device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dataset_utils.recording import UNLABELLED, Preprocessing, Recording
from dataset_utils.safe_pickle import read_pickle
from dataset_utils.sources.archive import open_archive
from dataset_utils.sources.fetch import ArchiveSource, Place
from registry.errors import UserError

RATE = 700.0
CONDITIONS = {1: "baseline", 2: "stress", 3: "amusement"}
OTHERS = {0: "not defined or transient", 4: "meditation"}
SIGNALS = {"ACC": 3, "ECG": 1, "EMG": 1, "EDA": 1, "Temp": 1, "Resp": 1}
"""Signals of the chest device and their channels."""


class WESAD(ArchiveSource):
    """Stress and affect: 15 subjects, 3 conditions; a device on the chest, 700 Hz brought to 70 Hz."""

    name = "WESAD"
    paper = "Schmidt et al. 2018, ICMI, doi:10.1145/3242969.3242985; data doi:10.24432/C57K5T"
    classes = tuple(CONDITIONS.values())
    channels = ("acc_x", "acc_y", "acc_z", "ecg", "emg", "eda", "temp", "resp")  # g, mV, mV, µS, °C, %
    preprocessing = Preprocessing(
        rate=70.0, window=700, overlap=0.5, median=0, lowpass=0.0, gravity=0.0, resample=True, recorded=RATE
    )
    place = Place(key="S2/S2.pkl", usual=("WESAD.zip", "WESAD"), link="https://doi.org/10.24432/C57K5T")
    members = ("S*/S*.pkl",)

    def load(self, path: Path) -> Iterator[Recording]:
        """Yield one recording for each subject; its pickle is read by `safe_pickle`, which executes nothing."""
        with open_archive(path, self.place.key) as archive:
            for name in archive.match(self.members[0]):
                where = archive.where(name)
                with archive.open(name) as file:
                    data = read_pickle(file, where)
                signals, condition = _chest(data, where)
                labels = np.full(len(condition), UNLABELLED, dtype=np.int64)
                for index, number in enumerate(CONDITIONS):
                    labels[condition == number] = index
                left_out = {what: int(np.count_nonzero(condition == number)) for number, what in OTHERS.items()}
                yield Recording(Path(name).stem, signals, labels, name=name, rate=RATE, left_out=left_out)


def _chest(data: Any, where: str) -> tuple[np.ndarray, np.ndarray]:
    """Return signals (samples, 8), float32, and conditions (samples,)."""
    try:
        chest, condition = data["signal"]["chest"], np.asarray(data["label"]).ravel()
        columns = [np.asarray(chest[name]).reshape(len(condition), width) for name, width in SIGNALS.items()]
        signals = np.concatenate(columns, axis=1).astype(np.float32)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{where}: is no file of WESAD, or a damaged one ({error})") from error
    if not np.isin(condition, np.arange(8)).all():
        raise UserError(f"{where}: a condition that is none of 0 to 7")
    return signals, condition
