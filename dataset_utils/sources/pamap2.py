"""PAMAP2: physical activities, three inertial units on hand, chest and ankle."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dataset_utils.recording import UNLABELLED, Preprocessing, Recording
from dataset_utils.sources.archive import Archive, open_archive
from dataset_utils.sources.fetch import ArchiveSource, Place
from registry.errors import UserError

COLUMNS = 54
UNITS = {"hand": 3, "chest": 20, "ankle": 37}
"""First of a unit's 17 columns, which are temperature, acceleration ±16 g, the same ±6 g, gyroscope, magnetometer."""
SENSORS = {"acc": 1, "gyro": 7, "mag": 10}
"""First of a sensor's three columns within the unit; acceleration is taken at ±16 g, as ±6 g saturates."""
ACTIVITIES = {
    1: "lying",
    2: "sitting",
    3: "standing",
    4: "walking",
    5: "running",
    6: "cycling",
    7: "Nordic walking",
    12: "ascending stairs",
    13: "descending stairs",
    16: "vacuum cleaning",
    17: "ironing",
    24: "rope jumping",
}
"""Activities of the protocol by id; 0 is transient, and other ids are of a few subjects only."""

ORIGINALS = {
    "Optional/subject101.dat": (
        121246257,
        "a8b71371406001ae563acad1d7d946ceacd0afeb51b97bfb9a9cbad95c78e52c",
    ),
    "Optional/subject105.dat": (72521536, "a7c4ccd8d7e8fe21abad8c111229649ec10ca9b353cc29fcc4986c2243301adc"),
    "Optional/subject106.dat": (60905306, "50882fc519f01e8fe200a5a4373daff443e88624d7e8a2d31d759569823fb491"),
    "Optional/subject108.dat": (85403002, "e871b2e5692867f8655b69b769e866927739aa288b9da5cc9a15dc930f154336"),
    "Optional/subject109.dat": (90594049, "a6a8f7521d63fe80bd7f203c5ee1256a2bc8b3772f028ae767256ec1d6a93930"),
    "Protocol/subject101.dat": (
        141698539,
        "80b3fffd089c236ae88098df3b906b8d3c67a858023fe4f75045d78612147266",
    ),
    "Protocol/subject102.dat": (
        207349310,
        "468f3c6ba3e6e961f383783665265afbcddbbd33a3a84bba0386b7d0d4e3c632",
    ),
    "Protocol/subject103.dat": (
        117863364,
        "5be64631d085e3efc700728395516da3512ff9de17dab30d253508441a98d3f0",
    ),
    "Protocol/subject104.dat": (
        153227482,
        "7eb272213cbfe11d9e466a2163b6c9c2ed8d2542fc6f08283fd1bf222cac8994",
    ),
    "Protocol/subject105.dat": (
        173773599,
        "7837cfede57fe45ec20d553c6c2b0c498ab324daae23bfd202c0ffea9f71a7f6",
    ),
    "Protocol/subject106.dat": (
        168263273,
        "0da1dda3fa56d75d6413fc9198949d3ebc2102d77574cb5fe0739674687609f2",
    ),
    "Protocol/subject107.dat": (
        145823268,
        "a02195e9599eb249f79103912d27eb4f62d8a0f59e4763b0dd8250fee5f3f020",
    ),
    "Protocol/subject108.dat": (
        190019653,
        "81ce6b21b9c1e01dc02099c4f9387699547b08b28b387d09a56e0cb0a8af22fc",
    ),
    "Protocol/subject109.dat": (3891140, "5109d5cd8334769566b4ae602adf3e5f4bb7b9ee8ca678f0c481d333114b07c7"),
}
"""Size in bytes and SHA-256 of the original files."""


class PAMAP2(ArchiveSource):
    """Physical activities: 9 subjects, 12 activities; inertial units on hand, chest and ankle at 100 Hz."""

    name = "PAMAP2"
    paper = "Reiss and Stricker 2012, ISWC, doi:10.1109/ISWC.2012.13; data doi:10.24432/C5NW2H"
    classes = tuple(ACTIVITIES.values())
    # acceleration in m/s², angular velocity in rad/s, magnetic field in µT
    channels = tuple(f"{unit}_{sensor}_{axis}" for unit in UNITS for sensor in SENSORS for axis in "xyz")
    acceleration = tuple(channel for channel in channels if "_acc_" in channel)
    preprocessing = Preprocessing(rate=100.0, window=256, overlap=0.5)
    place = Place(
        key="Protocol/subject*.dat",
        usual=("PAMAP2_Dataset.zip", "PAMAP2_Dataset", "PAMAP2", "pamap2+physical+activity+monitoring.zip"),
        link="https://doi.org/10.24432/C5NW2H",
        url="https://archive.ics.uci.edu/static/public/231/pamap2+physical+activity+monitoring.zip",
    )
    members = ("Optional/subject*.dat", "Protocol/subject*.dat")

    def load(self, path: Path) -> Iterator[Recording]:
        """Yield one recording for each file, when its turn comes; a subject's optional file follows its protocol."""
        with open_archive(path, self.place.key) as archive:
            names = [name for pattern in self.members for name in archive.match(pattern)]
            for name in sorted(names, key=lambda name: (_subject(name), name.startswith("Optional"))):
                _check_original(archive, name)
                yield _read_file(archive, name)


def _subject(name: str) -> str:
    """Return the subject: '101' of 'Protocol/subject101.dat'."""
    return Path(name).stem.removeprefix("subject")


def _read_file(archive: Archive, name: str) -> Recording:
    from dataset_utils.sources.text import read_numbers

    table = read_numbers(archive, name, COLUMNS, wide=(0,))
    time, activity = table[0].to_numpy(), table[1].to_numpy()
    if np.isnan(time).any() or np.isnan(activity).any():
        row = int(np.flatnonzero(np.isnan(time) | np.isnan(activity))[0])
        raise UserError(f"{archive.where(name)}: line {row + 1} has no timestamp or no activity")
    labels = np.full(len(table), UNLABELLED, np.int64)
    for index, number in enumerate(ACTIVITIES):
        labels[activity == number] = index
    used = [unit + sensor + axis for unit in UNITS.values() for sensor in SENSORS.values() for axis in range(3)]
    return Recording(_subject(name), table[used].to_numpy(np.float32), labels, time)


def _check_original(archive: Archive, name: str) -> None:
    """Warn if a file has the name of an original file but other contents."""
    if name not in ORIGINALS:
        return
    size, digest = ORIGINALS[name]
    problem = ""
    if archive.size(name) != size:
        problem = f"{archive.size(name)} bytes instead of {size}"
    else:
        with archive.open(name) as file:
            read = hashlib.sha256()
            while piece := file.read(1 << 20):
                read.update(piece)
        if read.hexdigest() != digest:
            problem = "another SHA-256"
    if problem:
        warnings.warn(f"{archive.where(name)}: not the original file of PAMAP2 ({problem})", stacklevel=3)
