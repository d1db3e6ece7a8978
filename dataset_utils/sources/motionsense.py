"""MotionSense: a phone in the front pocket, its motion as iOS's Core Motion gives it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dataset_utils.recording import Preprocessing, Recording
from dataset_utils.sources.archive import open_archive
from dataset_utils.sources.fetch import ArchiveSource, Place
from registry.errors import UserError

TRIALS = {
    "dws": "walking downstairs",
    "ups": "walking upstairs",
    "wlk": "walking",
    "jog": "jogging",
    "std": "standing",
    "sit": "sitting",
}
COLUMNS = tuple(f"{kind}.{axis}" for kind in ("gravity", "rotationRate", "userAcceleration") for axis in "xyz")


class MotionSense(ArchiveSource):
    """Everyday activities: 24 subjects, 6 activities; a phone in the front pocket, 50 Hz."""

    name = "MotionSense"
    paper = "Malekzadeh et al. 2019, IoTDI, doi:10.1145/3302505.3310068"
    classes = tuple(TRIALS.values())
    channels = tuple(name.replace(".", "_") for name in COLUMNS)  # g, rad/s, g: gravity is separated already
    preprocessing = Preprocessing(rate=50.0, window=128, overlap=0.5, median=3, lowpass=20.0, gravity=0.0)
    place = Place(
        key="dws_1/sub_1.csv",
        usual=("A_DeviceMotion_data.zip", "A_DeviceMotion_data", "motion-sense-master"),
        link="https://github.com/mmalekzadeh/motion-sense",
    )
    members = tuple(f"{trial}_*/sub_*.csv" for trial in TRIALS)

    def load(self, path: Path) -> Iterator[Recording]:
        """Yield one recording for each file; its folder names the activity, its name the subject."""
        import pandas as pd

        with open_archive(path, self.place.key) as archive:
            for label, pattern in enumerate(self.members):
                for name in archive.match(pattern):
                    with archive.open(name) as file:
                        try:
                            table = pd.read_csv(file, usecols=list(COLUMNS), dtype=np.float32)
                        except ValueError as error:  # pandas' ParserError is one
                            reason = " ".join(str(error).split())[:160]
                            raise UserError(f"{archive.where(name)}: no table of MotionSense ({reason})") from error
                    labels = np.full(len(table), label, dtype=np.int64)
                    subject = Path(name).stem.removeprefix("sub_")
                    yield Recording(subject, table[list(COLUMNS)].to_numpy(), labels, name=name)
