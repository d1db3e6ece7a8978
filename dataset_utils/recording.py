"""What a data source gives: recordings, or windows where the original is already cut into them.

A third-party data set is a subclass of `Source` named by an entry point of the group `fedkdx.datasets`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

UNLABELLED = -1
STRADDLES = -1


@dataclass(frozen=True)
class Preprocessing:
    """How a recording becomes windows.

    Attributes:
        rate: sampling rate of the windows, Hz; that of the recordings too, unless they are resampled.
        window: samples in a window.
        overlap: share of a window that the next one repeats, in [0, 1).
        median: width of the median filter in samples (odd); 0 leaves it out.
        lowpass: cutoff of the 3rd-order low-pass Butterworth filter, Hz; 0 leaves it out.
        gravity: cutoff of the low-pass filter that separates gravity from acceleration, Hz; 0 leaves it out.
        max_gap: missing stretches of at most this many seconds are interpolated, longer ones cut the recording.
        resample: whether recordings of another rate are brought to `rate`; otherwise they are an error.
        recorded: rate of recordings without a time that are to be resampled, Hz; 0 where each says its own.
        repeated: what to do with rows of one recording that share a time and differ: 'average', 'error', or '' for
            an average where they are few and an error where they are many.
        purity: share of a window's samples that must have its label; windows below are dropped.
        before: where labels mark events, seconds from a window's first sample to its event; None slides windows.
    """

    rate: float
    window: int
    overlap: float
    median: int = 3
    lowpass: float = 20.0
    gravity: float = 0.3
    max_gap: float = 0.5
    resample: bool = False
    recorded: float = 0.0
    repeated: str = ""
    purity: float = 0.0
    before: float | None = None


@dataclass(frozen=True)
class Recording:
    """What one subject's device wrote in one go.

    Attributes:
        subject: the subject's name; a subject may have several recordings.
        signals: (samples, channels), float; NaN where a value is missing.
        labels: (samples,), int; class index, or UNLABELLED for what is to be discarded.
        time: (samples,), in `unit`, or None when the samples follow each other without gaps.
        name: what messages and counts call it, such as its file; '' for the subject's name.
        rate: sampling rate that the file states, Hz; None where it states none.
        unit: of `time`: 's', 'ms', 'us', 'ns', or None where the sampling rate shall tell.
        left_out: why samples are UNLABELLED -> how many; the rest counts as 'no label'.
        unlisted: label that is neither a class nor to be left out -> samples that have it.
        found_out: what was found out about the file and not told, such as its separator.
        streams: tallies (`counts.Tally`) of the files that were merged into it.
        test: whether it is to be tested on, never trained on, where the split is 'given': all of it, or (samples,).
        begins: when its first sample was taken, seconds on its subject's clock, where there are no times.
    """

    subject: str
    signals: np.ndarray
    labels: np.ndarray
    time: np.ndarray | None = None
    name: str = ""
    rate: float | None = None
    unit: str | None = "s"
    left_out: Mapping[str, int] = field(default_factory=dict)
    unlisted: Mapping[str, int] = field(default_factory=dict)
    found_out: tuple[str, ...] = ()
    streams: tuple[Any, ...] = ()
    test: bool | np.ndarray = False
    begins: float | None = None

    @property
    def where(self) -> str:
        """How messages call it."""
        return self.name or f"subject {self.subject}"


@dataclass(frozen=True)
class Windows:
    """Labelled windows of several subjects, each subject's in the order of time.

    Attributes:
        x: (n, channels, 1, time), float32.
        y: (n,), int64, class index.
        subject: (n,), int64, index into `subjects`.
        stretch: (n,), int64, which line of time a window lies on; windows of two lines have nothing in common.
        start: (n,), int64, the window's first sample on its line; two windows that share it hold the same.
        subjects: the subjects' names.
        recording: (n,), int64, which recording a window is of, or None where that is not known.
        test: (n,), int8: 1 for what is to be tested on where the split is 'given', 0 for what is not, and
            `STRADDLES` for windows that hold samples of both; or None where nothing says so.
        reach: samples across which filters carry something of one sample to another.
    """

    x: np.ndarray
    y: np.ndarray
    subject: np.ndarray
    stretch: np.ndarray
    start: np.ndarray
    subjects: tuple[str, ...]
    recording: np.ndarray | None = None
    test: np.ndarray | None = None
    reach: int = 0


class Source(ABC):
    """A data set in its original files.

    Class attributes:
        name: what `-data` calls it.
        paper: citation with DOI or link.
        classes: class names, in label order.
        channels: channel names of `Recording.signals` (of the windows, where `load` gives Windows).
        acceleration: names of the channels that gravity separation splits into body and gravity.
        preprocessing: the defaults for this data set.
    """

    name: str
    paper: ClassVar[str] = ""
    classes: tuple[str, ...]
    channels: tuple[str, ...]
    acceleration: tuple[str, ...] = ()
    preprocessing: Preprocessing

    @abstractmethod
    def find(self, raw: Path | None, data_root: Path, download: bool) -> Path:
        """The original files: a folder, a zip or a file.

        Args:
            raw: where the user says they are, or None for the usual place under `data_root`/raw.
            data_root: the folder of all data (`data` by default).
            download: the user allowed a download.

        Raises:
            UserError: not there; the text says what to fetch and where to put it.
        """

    @abstractmethod
    def files(self, path: Path) -> list[Path]:
        """The files that `load` reads below `path`, sorted, to be hashed into the manifest (a zip counts as one)."""

    @abstractmethod
    def load(self, path: Path) -> Iterable[Recording] | Windows:
        """Read what `find` found. Raises UserError for damaged or foreign files."""

    def description(self) -> Mapping[str, Any]:
        """What makes the windows besides files and preprocessing: shards made from another description are others."""
        return {"classes": self.classes, "channels": self.channels, "acceleration": self.acceleration}

    def parts(self, path: Path) -> Iterator[Callable[[], Iterable[Recording] | Windows]]:
        """What `load` reads in pieces that can fail one by one, so that a description names every flaw."""
        yield lambda: self.load(path)

    def ignored(self, path: Path) -> dict[str, str]:
        """Files below `path` that are not read -> why."""
        return {}

    @property
    def listed(self) -> tuple[str, ...]:
        """The labels in the files that are read as classes."""
        return tuple(self.classes)
