"""Interface of data sources: they give recordings, or windows where the original is already cut into windows.

A third-party data set is a subclass of `Source` that an entry point of the group `fedkdx.datasets` names.
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
    """Parameters of filtering and cutting a recording into windows.

    Attributes:
        rate: sampling rate of the windows, Hz; also of the recordings, unless they are resampled.
        window: samples in a window.
        overlap: share of a window that the next one repeats, in [0, 1).
        median: width of the median filter in samples (odd); 0 leaves it out.
        lowpass: cutoff of the 3rd-order low-pass Butterworth filter, Hz; 0 leaves it out.
        gravity: cutoff of the low-pass filter that separates gravity from acceleration, Hz; 0 leaves it out.
        max_gap: gaps of at most this many seconds are interpolated; longer ones cut the recording.
        resample: whether recordings of another rate are resampled to `rate`; otherwise they are an error.
        recorded: rate of recordings without times that are to be resampled, Hz; 0 where each states its own.
        repeated: what to do with rows of one recording that share a time and differ: 'average', 'error', or '' for
            an average where they are few (`time_axis.FEW`) and an error where they are many.
        purity: share of a window's samples that must have its label; windows with less are dropped.
        before: where labels mark events, seconds from a window's first sample to its event; None for sliding windows.
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
    """One continuous recording of one subject.

    Attributes:
        subject: the subject's name; a subject may have several recordings.
        signals: (samples, channels), float; NaN where a value is missing.
        labels: (samples,), int; class index, or UNLABELLED for samples to be discarded.
        time: (samples,), in `unit`, or None if the samples follow each other without gaps.
        name: name in messages and counts, such as the file's; '' for the subject's name.
        rate: sampling rate that the file states, Hz; None where it states none.
        unit: unit of `time`: 's', 'ms', 'us', 'ns', or None to detect it by the sampling rate.
        left_out: reason why samples are UNLABELLED -> number of samples; the rest counts as 'no label'. None where one
            of `streams` has the labels, and counts what of its rows is left out.
        unlisted: label that is neither a class nor to be ignored -> number of samples.
        found_out: properties of the file that were detected rather than given, such as its separator.
        streams: tallies (`counts.Tally`) of the files that were merged into the recording.
        test: whether samples are tested on and never trained on where the split is 'given': one value, or (samples,).
        begins: time of the first sample on the subject's clock, seconds, where `time` is None.
    """

    subject: str
    signals: np.ndarray
    labels: np.ndarray
    time: np.ndarray | None = None
    name: str = ""
    rate: float | None = None
    unit: str | None = "s"
    left_out: Mapping[str, int] | None = field(default_factory=dict)
    unlisted: Mapping[str, int] = field(default_factory=dict)
    found_out: tuple[str, ...] = ()
    streams: tuple[Any, ...] = ()
    test: bool | np.ndarray = False
    begins: float | None = None

    @property
    def where(self) -> str:
        """Name of the recording in messages."""
        return self.name or f"subject {self.subject}"


@dataclass(frozen=True)
class Windows:
    """Labelled windows of several subjects, each subject's ordered by time.

    Attributes:
        x: (n, channels, 1, time), float32.
        y: (n,), int64, class index.
        subject: (n,), int64, index into `subjects`.
        stretch: (n,), int64, number of the window's line of time; windows of different lines share no samples.
        start: (n,), int64, position of the window's first sample on its line; windows with the same position are equal.
        subjects: the subjects' names.
        recording: (n,), int64, number of the window's recording, or None where it is not known.
        test: (n,), int8: 1 for windows to be tested on where the split is 'given', 0 for others, `STRADDLES` for those
            that hold samples of both; or None where the data set does not say.
        reach: number of samples over which filters spread a sample (see `lines.reach`).
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
        name: name for `-data`.
        paper: citation with DOI or link.
        classes: class names, in label order.
        channels: channel names of `Recording.signals` (of the windows, where `load` gives Windows).
        acceleration: names of the channels that are split into body and gravity.
        preprocessing: default preprocessing of this data set.
    """

    name: str
    paper: ClassVar[str] = ""
    classes: tuple[str, ...]
    channels: tuple[str, ...]
    acceleration: tuple[str, ...] = ()
    preprocessing: Preprocessing

    @abstractmethod
    def find(self, raw: Path | None, data_root: Path, download: bool) -> Path:
        """Find the original files: a folder, a zip or a file.

        Args:
            raw: path that the user gave, or None for the usual location under `data_root`/raw.
            data_root: the folder of all data (`data` by default).
            download: whether the user allowed a download.

        Raises:
            UserError: they are not there; the text says what to fetch and where to put it.
        """

    @abstractmethod
    def files(self, path: Path) -> list[Path]:
        """Return the files that `load` reads below `path`, sorted, to be hashed into the manifest (a zip is one)."""

    @abstractmethod
    def load(self, path: Path) -> Iterable[Recording] | Windows:
        """Read the files that `find` returned. Raises UserError for damaged files or files of another data set."""

    def description(self) -> Mapping[str, Any]:
        """Return what the windows depend on besides files and preprocessing; it is part of the shards' identity."""
        return {"classes": self.classes, "channels": self.channels, "acceleration": self.acceleration}

    def parts(self, path: Path) -> Iterator[Callable[[], Iterable[Recording] | Windows]]:
        """Yield functions that read `load`'s result part by part, so that errors of all parts can be collected."""
        yield lambda: self.load(path)

    def ignored(self, path: Path) -> dict[str, str]:
        """Return file below `path` that is not read -> reason."""
        return {}

    @property
    def listed(self) -> tuple[str, ...]:
        """Labels in the files that are read as classes."""
        return tuple(self.classes)
