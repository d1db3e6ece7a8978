"""Sleep-EDF Expanded, the Sleep Cassette study: stages of sleep in whole nights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dataset_utils.recording import UNLABELLED, Preprocessing, Recording
from dataset_utils.sources.archive import open_archive
from dataset_utils.sources.fetch import ArchiveSource, Place
from dataset_utils.sources.own.description import Dialect
from dataset_utils.sources.own.signal_files import Annotations, edf_annotations, read_edf
from dataset_utils.sources.own.table import Wanted
from registry.errors import UserError

STAGES = {
    "Sleep stage W": 0,
    "Sleep stage 1": 1,
    "Sleep stage 2": 2,
    "Sleep stage 3": 3,
    "Sleep stage 4": 3,  # the AASM's N3 is stages 3 and 4
    "Sleep stage R": 4,
}
SIGNALS = ("EEG Fpz-Cz", "EEG Pz-Oz", "EOG horizontal")
AWAKE = 1800.0
"""Seconds awake that are kept before the first and after the last sleep; the recordings last a whole day."""


class SleepEDF(ArchiveSource):
    """Sleep stages: 78 subjects, 5 stages; two EEG and one EOG at 100 Hz, epochs of 30 s; needs pyedflib."""

    name = "Sleep-EDF"
    paper = "Kemp et al. 2000, IEEE TBME 47(9) 1185-1194, doi:10.1109/10.867928; data doi:10.13026/C2X676"
    classes = ("W", "N1", "N2", "N3", "REM")
    channels = ("eeg_fpz_cz", "eeg_pz_oz", "eog")  # µV
    preprocessing = Preprocessing(rate=100.0, window=3000, overlap=0.0, median=0, lowpass=0.0, gravity=0.0)
    place = Place(
        key="SC4*-PSG.edf",
        usual=("sleep-cassette.zip", "sleep-cassette", "sleep-edf-database-expanded-1.0.0"),
        link="https://doi.org/10.13026/C2X676",
    )
    members = ("SC4*-Hypnogram.edf", "SC4*-PSG.edf")

    def load(self, path: Path) -> Iterator[Recording]:
        """Yield one recording for each night; file names are SC4ssN: subject ss, night N."""
        if path.is_file():
            raise UserError(f"{path}: files are read from a folder only; unpack the zip and name the folder")
        with open_archive(path, self.place.key) as archive:
            names, root = archive.match(self.members[1]), Path(archive.root)
        for name in names:
            stages = sorted(root.glob(f"{name[:6]}*-Hypnogram.edf"))
            if len(stages) != 1:
                raise UserError(f"{root / name}: {len(stages)} files {name[:6]}*-Hypnogram.edf beside it, not one")
            marks: Annotations = edf_annotations(stages[0])
            table = read_edf(root / name, Wanted(SIGNALS, None, ()), Dialect())
            rate = table.rate or self.preprocessing.rate
            labels = _labels(marks.onset, marks.duration, marks.labels, len(table.signals), rate)
            asleep = np.flatnonzero(labels > 0)
            if not len(asleep):
                raise UserError(f"{stages[0]}: holds no stage of sleep")
            keep = int(AWAKE * rate)
            first = max(0, (asleep[0] - keep) // 3000 * 3000)  # whole epochs
            awake = labels == 0
            awake[first : asleep[-1] + 1 + keep] = False
            labels[awake] = UNLABELLED
            left_out = {"awake for more than 30 min before or after sleep": int(np.count_nonzero(awake))}
            yield Recording(name[3:5], table.signals, labels, name=name, rate=table.rate, left_out=left_out)


def _labels(onset: np.ndarray, duration: np.ndarray, stages: list[str], samples: int, rate: float) -> np.ndarray:
    """Return the stage of each sample; movement and unscored time are unlabelled."""
    labels = np.full(samples, UNLABELLED, dtype=np.int64)
    for start, seconds, stage in zip(onset, duration, stages, strict=True):
        if stage in STAGES:
            labels[round(start * rate) : round((start + seconds) * rate)] = STAGES[stage]
    return labels
