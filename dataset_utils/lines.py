"""Lines of time that recordings share, and the distance over which filters spread a sample along them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dataset_utils import resampling, time_axis
from dataset_utils.preprocessing import lowpass
from dataset_utils.recording import Preprocessing, Recording

RESTARTED = 10.0  # seconds; a clock that begins nearer to 0 was reset for this recording
RINGS = 1e-3  # an impulse response has ended when it stays below this share of its peak


class Line(NamedTuple):
    """Position of a recording.

    Attributes:
        number: number of the line of time.
        offset: samples to add to a position on the recording's own clock.
    """

    number: int
    offset: int


class Lines:
    """Assignment of recordings to lines of time.

    A split must keep recordings together that touch or overlap in time or are copies of each other. Recordings of one
    subject share a line if their clock continues, that is, does not begin within `RESTARTED` seconds of 0. A recording
    without times, or with a reset clock, has a line of its own. A copy, sample for sample, gets the position of the
    original, whatever its subject is said to be.

    Args:
        settings: preprocessing of the data set.
    """

    def __init__(self, settings: Preprocessing) -> None:
        self.settings = settings
        self._count = 0
        self._clock: dict[str, Line] = {}
        self._seen: dict[bytes, tuple[Line, int]] = {}

    def place(self, recording: Recording, digest: bytes) -> Line:
        """Return the position of the next recording, whose samples have the given digest (`counts.digest_of`)."""
        begins = time_axis.begins(recording, self.settings)
        begin = 0 if begins is None else round(begins * self.settings.rate)
        if digest in self._seen:
            original, at = self._seen[digest]
            line = Line(original.number, original.offset + at - begin)
        else:
            line = self._line(recording, begins)
            self._seen[digest] = line, begin
        if begins is not None:
            self._clock[recording.subject] = line  # also for a copy: what continues its clock is on its line
        return line

    def _line(self, recording: Recording, begins: float | None) -> Line:
        if begins is not None and abs(begins) >= RESTARTED and recording.subject in self._clock:
            return self._clock[recording.subject]
        self._count += 1
        return Line(self._count, 0)


def reach(settings: Preprocessing, slowest: float) -> int:
    """Return how many samples to either side of a sample influence it in preprocessing.

    This is the sum over the median filter, both low-pass filters, the interpolation across missing values and
    resampling.

    Args:
        settings: preprocessing of the data set.
        slowest: the lowest rate among the recordings that were resampled to `settings.rate`, Hz.
    """
    cutoffs = [cutoff for cutoff in (settings.lowpass, settings.gravity) if cutoff]
    missing = int(settings.max_gap * settings.rate + 1e-6)
    resampled = settings.resample or slowest < (1 - time_axis.TOLERANCE) * settings.rate
    spread = resampling.reach(settings.rate / slowest) if resampled else 0
    return settings.median // 2 + sum(ringing(cutoff, settings.rate) for cutoff in cutoffs) + missing + spread


def ringing(cutoff: float, rate: float) -> int:
    """Return the number of samples to either side after which the response of `preprocessing.lowpass` has ended."""
    slowest = min(cutoff, rate / 2 - cutoff)  # a cutoff near half of the rate rings long, too
    half = int(np.ceil(10 * rate / slowest))
    impulse = np.zeros(2 * half + 1)
    impulse[half] = 1.0
    response = np.abs(lowpass(impulse, cutoff, rate))
    return int(np.abs(np.flatnonzero(response >= RINGS * response.max()) - half).max())
