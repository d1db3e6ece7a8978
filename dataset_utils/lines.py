"""Find out which recordings lie on one line of time, and how far filters carry something along it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dataset_utils import resampling, time_axis
from dataset_utils.preprocessing import lowpass
from dataset_utils.recording import Preprocessing, Recording

RESTARTED = 10.0  # seconds; a clock that begins nearer to 0 was set to 0 for this recording
RINGS = 1e-3  # an impulse response is over when it stays below this share of its peak


class Line(NamedTuple):
    """The place of a recording.

    Attributes:
        number: of the line of time.
        offset: samples to add to a place on the recording's own clock.
    """

    number: int
    offset: int


class Lines:
    """Tells which recordings touch or overlap in time, or are copies, which no split may put on both sides.

    Recordings of one subject share a line where their clock goes on: it does not begin within `RESTARTED` seconds of 0.
    A recording without times, or whose clock was set to 0, has a line of its own. A copy, sample for sample, lies where
    the original lies, whoever it is said to be of.

    Args:
        settings: of the data set.
    """

    def __init__(self, settings: Preprocessing) -> None:
        self.settings = settings
        self._count = 0
        self._clock: dict[str, Line] = {}
        self._seen: dict[bytes, tuple[Line, int]] = {}

    def place(self, recording: Recording, digest: bytes) -> Line:
        """Where the next recording lies, of which `digest` tells the samples (`counts.digest_of`)."""
        begins = time_axis.begins(recording, self.settings)
        begin = 0 if begins is None else round(begins * self.settings.rate)
        if digest in self._seen:
            original, at = self._seen[digest]
            line = Line(original.number, original.offset + at - begin)
        else:
            line = self._line(recording, begins)
            self._seen[digest] = line, begin
        if begins is not None:
            self._clock[recording.subject] = line  # also of a copy: what goes on by its clock lies on its line
        return line

    def _line(self, recording: Recording, begins: float | None) -> Line:
        if begins is not None and abs(begins) >= RESTARTED and recording.subject in self._clock:
            return self._clock[recording.subject]
        self._count += 1
        return Line(self._count, 0)


def reach(settings: Preprocessing, slowest: float) -> int:
    """Samples, to either side, from which preprocessing carries something to a sample.

    The reaches of the median filter, of both low-pass filters, of the interpolation across missing values and of
    resampling add up.

    Args:
        slowest: the lowest rate of what was brought to `settings.rate`, Hz.
    """
    cutoffs = [cutoff for cutoff in (settings.lowpass, settings.gravity) if cutoff]
    missing = int(settings.max_gap * settings.rate + 1e-6)
    resampled = settings.resample or slowest < (1 - time_axis.TOLERANCE) * settings.rate
    spread = resampling.reach(settings.rate / slowest) if resampled else 0
    return settings.median // 2 + sum(ringing(cutoff, settings.rate) for cutoff in cutoffs) + missing + spread


def ringing(cutoff: float, rate: float) -> int:
    """Samples, to either side, after which `preprocessing.lowpass`, which runs both ways, has forgotten an impulse."""
    slowest = min(cutoff, rate / 2 - cutoff)  # a cutoff near half of the rate rings long, too
    half = int(np.ceil(10 * rate / slowest))
    impulse = np.zeros(2 * half + 1)
    impulse[half] = 1.0
    response = np.abs(lowpass(impulse, cutoff, rate))
    return int(np.abs(np.flatnonzero(response >= RINGS * response.max()) - half).max())
