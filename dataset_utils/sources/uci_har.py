"""UCI-HAR: six everyday activities, smartphone on the waist, already filtered and cut into windows."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from dataset_utils.recording import Preprocessing, Windows
from dataset_utils.sources.archive import Archive, open_archive
from dataset_utils.sources.fetch import ArchiveSource, Place
from registry.errors import UserError

LENGTH = 128
CHANNELS = tuple(f"{kind}_{axis}" for kind in ("body_acc", "body_gyro", "total_acc") for axis in "xyz")


class UCIHAR(ArchiveSource):
    """Everyday activities: 30 subjects, 6 activities; phone on the waist, 50 Hz; filtered by its authors."""

    name = "UCI-HAR"
    paper = "Anguita et al. 2013, ESANN; data doi:10.24432/C54S4K"
    classes = ("walking", "walking upstairs", "walking downstairs", "sitting", "standing", "laying")
    channels = CHANNELS  # acceleration in g, angular velocity in rad/s
    preprocessing = Preprocessing(rate=50.0, window=LENGTH, overlap=0.5, median=0, lowpass=0.0, gravity=0.0)
    place = Place(
        key="train/y_train.txt",
        usual=("UCI HAR Dataset.zip", "UCI HAR Dataset", "human+activity+recognition+using+smartphones.zip"),
        link="https://doi.org/10.24432/C54S4K",
        url="https://archive.ics.uci.edu/static/public/240/human+activity+recognition+using+smartphones.zip",
    )
    members = tuple(
        f"{part}/{name}_{part}.txt"
        for part in ("test", "train")
        for name in ("subject", "y", *(f"Inertial Signals/{channel}" for channel in CHANNELS))
    )

    def load(self, path: Path) -> Windows:
        """Read all windows, training and test part together, a subject's stretches one after the other.

        A stretch is a chain of windows, each of which begins with the second half of the previous one, so that windows
        that share samples are always in one stretch, whatever the order of the rows. `--split given` tests on the test
        part.
        """
        with open_archive(path, self.place.key) as archive:
            parts = [_read_part(archive, part) for part in ("train", "test")]
        x, y, subject = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        test = np.repeat([False, True], [len(part[1]) for part in parts])
        numbers, subject = np.unique(subject, return_inverse=True)
        stretch, start = chains(x, subject)
        order = np.lexsort((start, stretch, subject))
        return Windows(
            x=x[order][:, :, None, :],
            y=y[order],
            subject=subject[order],
            stretch=stretch[order],
            start=start[order],
            subjects=tuple(str(number) for number in numbers),
            test=test[order],
        )


def chains(x: np.ndarray, subject: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find out by their samples which windows follow each other.

    Every half window is a node and every window an edge from its first half to its second. A stretch is a connected
    component; a window's start is the distance of its first half from the component's beginning.

    Args:
        x: (n, channels, time), windows that overlap by half.
        subject: (n,), subject of each window.

    Returns:
        stretch: (n,), int64, numbered in the order of their first rows.
        start: (n,), int64, first sample within the stretch.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    step = x.shape[-1] // 2
    halves = np.concatenate([x[..., :step], x[..., step:]]).reshape(2 * len(x), -1)
    owners = np.concatenate([subject, subject]).tolist()
    number: dict[tuple[int, bytes], int] = {}
    keys = zip(owners, (half.tobytes() for half in halves), strict=True)
    first, second = np.split(np.array([number.setdefault(key, len(number)) for key in keys]), 2)

    graph = coo_array((np.ones(len(x)), (first, second)), shape=(len(number), len(number)))
    component = connected_components(graph, directed=False)[1][first]
    _, rows, stretch = np.unique(component, return_index=True, return_inverse=True)
    stretch = np.argsort(np.argsort(rows))[stretch]

    depth = np.full(len(number), -1)
    frontier, level = np.setdiff1d(first, second), 0  # halves that no window ends with
    while (unplaced := depth[first] < 0).any():
        if not len(frontier):  # a ring (constant signals) has no beginning: the first row is taken
            frontier, level = first[unplaced][:1], 0
        depth[frontier] = level
        reached = second[np.isin(first, frontier)]
        frontier, level = np.unique(reached[depth[reached] < 0]), level + 1
    return stretch.astype(np.int64), step * depth[first].astype(np.int64)


def _read_part(archive: Archive, part: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read x (n, 9, 128) float32, y (n,) and subject (n,) of 'train' or 'test'."""
    from dataset_utils.sources.text import read_numbers

    subject = read_numbers(archive, f"{part}/subject_{part}.txt", 1).to_numpy(np.int64)[:, 0]
    y = read_numbers(archive, f"{part}/y_{part}.txt", 1).to_numpy(np.int64)[:, 0] - 1
    if y.min() < 0 or y.max() >= len(UCIHAR.classes):
        raise UserError(f"{archive.where(f'{part}/y_{part}.txt')}: an activity outside 1 to {len(UCIHAR.classes)}")
    x = np.empty((len(y), len(CHANNELS), LENGTH), np.float32)
    for index, channel in enumerate(CHANNELS):
        name = f"{part}/Inertial Signals/{channel}_{part}.txt"
        rows = read_numbers(archive, name, LENGTH).to_numpy()
        if len(rows) != len(y) or len(subject) != len(y):
            raise UserError(f"{archive.where(name)}: {len(rows)} rows, {len(y)} labels and {len(subject)} subjects")
        x[:, index] = rows
    return x, y, subject
