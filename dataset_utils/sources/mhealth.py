"""MHEALTH: body motion and two leads of ECG, sensors on chest, ankle and arm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dataset_utils.recording import UNLABELLED, Preprocessing, Recording
from dataset_utils.sources.archive import open_archive
from dataset_utils.sources.fetch import ArchiveSource, Place
from registry.errors import UserError

COLUMNS = 24
SENSORS = (
    *("chest_acc_x", "chest_acc_y", "chest_acc_z", "chest_ecg_1", "chest_ecg_2"),
    *(f"{place}_{sensor}_{axis}" for place in ("ankle", "arm") for sensor in ("acc", "gyro", "mag") for axis in "xyz"),
)


class MHEALTH(ArchiveSource):
    """Physical activities: 10 subjects, 12 activities; sensors on chest, ankle and arm, 50 Hz."""

    name = "MHEALTH"
    paper = "Banos et al. 2014, IWAAL, doi:10.1007/978-3-319-13105-4_14; data doi:10.24432/C5TW22"
    classes = (
        *("standing still", "sitting and relaxing", "lying down", "walking", "climbing stairs", "waist bends forward"),
        *("frontal elevation of arms", "knees bending", "cycling", "jogging", "running", "jump front and back"),
    )
    channels = SENSORS  # m/s², mV, deg/s, local magnetic field
    acceleration = tuple(name for name in SENSORS if "_acc_" in name)
    preprocessing = Preprocessing(rate=50.0, window=128, overlap=0.5, median=3, lowpass=20.0, gravity=0.3)
    place = Place(
        key="mHealth_subject1.log",
        usual=("MHEALTHDATASET.zip", "MHEALTHDATASET", "mhealth+dataset.zip"),
        link="https://doi.org/10.24432/C5TW22",
    )
    members = ("mHealth_subject*.log",)

    def load(self, path: Path) -> Iterator[Recording]:
        """Yield one recording for each subject; the last column is the activity, 1 to 12, or 0 for none of them."""
        from dataset_utils.sources.text import read_numbers

        with open_archive(path, self.place.key) as archive:
            for name in archive.match(self.members[0]):
                table = read_numbers(archive, name, COLUMNS).to_numpy()
                activity = table[:, -1]
                if not np.isin(activity, np.arange(len(self.classes) + 1)).all():
                    raise UserError(f"{archive.where(name)}: an activity that is none of 0 to {len(self.classes)}")
                labels = np.where(activity == 0, UNLABELLED, activity.astype(np.int64) - 1)
                subject = Path(name).stem.removeprefix("mHealth_subject")
                yield Recording(subject, table[:, :-1], labels, name=name)
