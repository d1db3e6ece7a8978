"""SLEEP: twelve lying postures, one accelerometer; the recordings of the FedKDX paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dataset_utils.recording import Preprocessing, Recording
from dataset_utils.sources.archive import Archive, open_archive
from dataset_utils.sources.fetch import ArchiveSource, Place
from registry.errors import UserError

POSTURES = 12


class SLEEP(ArchiveSource):
    """Sleep postures: 12 postures held for a minute each; one accelerometer at 50 Hz; not downloadable."""

    name = "SLEEP"
    paper = "FedKDX, section 4.1; code and data: https://github.com/phamdinhdat-ai/Fed_2024"
    # The authors publish numbers, but no names of the postures.
    classes = tuple(f"posture {number}" for number in range(POSTURES))
    channels = ("acc_x", "acc_y", "acc_z")  # g
    acceleration = ("acc_x", "acc_y", "acc_z")
    # The paper filters the two activity data sets only: lying still is all gravity.
    preprocessing = Preprocessing(rate=50.0, window=100, overlap=0.4, median=0, lowpass=0.0, gravity=0.0)
    place = Place(
        key="subject_*.npy",
        usual=("SLEEP.zip", "SLEEP"),
        link="its authors (https://github.com/phamdinhdat-ai/Fed_2024), as it cannot be downloaded,",
    )
    members = ("subject_*.npy",)

    def load(self, path: Path) -> Iterator[Recording]:
        """Yield one recording for each posture (once a file of its own), cut where the clock runs backwards."""
        with open_archive(path, self.place.key) as archive:
            for name in archive.match(self.members[0]):
                table = _read_file(archive, name)
                time, posture = table[:, 0] * 1e-6, table[:, 4].astype(np.int64)
                cuts = np.flatnonzero((np.diff(posture) != 0) | (np.diff(time) <= 0)) + 1
                subject = Path(name).stem.removeprefix("subject_")
                for piece in np.split(np.arange(len(table)), cuts):
                    yield Recording(subject, table[piece, 1:4], posture[piece], time[piece] - time[piece[0]])


def _read_file(archive: Archive, name: str) -> np.ndarray:
    """Read (samples, 5): time in µs, acceleration x, y, z in g, posture."""
    where = archive.where(name)
    with archive.open(name) as file:
        try:
            table = np.lib.format.read_array(file, allow_pickle=False)
        except ValueError as error:
            raise UserError(f"{where}: is no .npy file of numbers, or a damaged one ({error})") from error
    if table.ndim != 2 or table.shape[1] != 5 or table.dtype.kind != "f" or not len(table):
        raise UserError(f"{where}: has shape {table.shape}, type {table.dtype} instead of (samples, 5) floats")
    if not np.isfinite(table[:, 0]).all() or not np.isin(table[:, 4], np.arange(POSTURES)).all():
        raise UserError(f"{where}: a time is missing, or a posture is not one of 0 to {POSTURES - 1}")
    return table
