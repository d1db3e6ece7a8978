"""WISDM activity recognition (version 1.1): a phone in the trouser pocket."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from dataset_utils.recording import Preprocessing, Recording
from dataset_utils.sources.archive import open_archive
from dataset_utils.sources.fetch import ArchiveSource, Place
from registry.errors import UserError

FILE = "WISDM_ar_v1.1_raw.txt"
ACTIVITIES = ("Walking", "Jogging", "Upstairs", "Downstairs", "Sitting", "Standing")
PAUSE = 2e9
"""Nanoseconds; rows farther apart belong to different recordings."""


class WISDM(ArchiveSource):
    """Everyday activities: 36 subjects, 6 activities; a phone in the front pocket, 20 Hz."""

    name = "WISDM"
    paper = "Kwapisz et al. 2011, SIGKDD Explorations 12(2) 74-82, doi:10.1145/1964897.1964918"
    classes = ACTIVITIES
    channels = ("acc_x", "acc_y", "acc_z")  # m/s², gravity within
    acceleration = channels
    preprocessing = Preprocessing(rate=20.0, window=100, overlap=0.5, median=3, lowpass=0.0, gravity=0.3)
    place = Place(
        key=FILE, usual=("WISDM_ar_v1.1.zip", "WISDM_ar_v1.1"), link="https://www.cis.fordham.edu/wisdm/dataset.php"
    )
    members = (FILE,)

    def load(self, path: Path) -> Iterator[Recording]:
        """Yield a recording for each run of a subject's rows of one activity, cut at pauses.

        The times in the file are irregular (they repeat, and some are 0), so they are used for pauses only; rows follow
        each other at the 20 Hz that the authors state. A record ends in a semicolon; some lines hold two records, and
        some records lack a value. Records without six cells are left out with a warning.
        """
        with open_archive(path, self.place.key) as archive, archive.open(FILE) as file:
            users, activities, times, signals, broken = _records(file)
            where = archive.where(FILE)
        if broken:
            warnings.warn(f"{where}: {broken} records are not of six cells, and are left out", stacklevel=2)
        if not users:
            raise UserError(f"{where}: holds no record like '33,Jogging,49105962326000,-0.69,12.68,0.50;'")
        user, activity, time = np.array(users), np.array(activities), np.array(times)
        step = np.diff(time)
        another = (user[1:] != user[:-1]) | (activity[1:] != activity[:-1])
        cuts = np.flatnonzero(another | (step < 0) | (step > PAUSE)) + 1
        table = np.array(signals, dtype=np.float32)
        for rows in np.split(np.arange(len(user)), cuts):
            label = ACTIVITIES.index(activity[rows[0]])
            name = f"{FILE} (subject {user[rows[0]]}, row {rows[0] + 1})"
            yield Recording(user[rows[0]], table[rows], np.full(len(rows), label, dtype=np.int64), name=name)


def _records(file: Iterable[bytes]) -> tuple[list[str], list[str], list[float], list[tuple[float, ...]], int]:
    """Return users, activities, times and signals of all complete records, and the number of other records."""
    users: list[str] = []
    activities: list[str] = []
    times: list[float] = []
    signals: list[tuple[float, ...]] = []
    broken = 0
    for line in file:
        for record in line.decode("utf-8", "replace").split(";"):
            cells = [cell.strip() for cell in record.split(",")]
            if cells == [""]:
                continue
            try:
                if len(cells) == 7 and not cells[6]:  # a comma before the semicolon
                    cells.pop()
                user, activity, time, *values = cells
                x, y, z = map(float, values)
                if activity not in ACTIVITIES or not user:
                    raise ValueError
                times.append(float(time))
            except ValueError:
                broken += 1
                continue
            users.append(user)
            activities.append(activity)
            signals.append((x, y, z))
    return users, activities, times, signals, broken
