"""Recordings to predict on, cut into windows as the run's own recordings were."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset_utils.reading import read
from dataset_utils.recording import Preprocessing, Recording, Source, Windows
from dataset_utils.sources.own import OwnData
from dataset_utils.sources.own import reading as files
from dataset_utils.sources.own.description import REQUIRED, Description, Dialect, Stream, Time, read_description
from dataset_utils.sources.own.given import GivenRule
from dataset_utils.sources.own.naming import Rule
from dataset_utils.sources.own.table import Wanted
from dataset_utils.time_axis import TOLERANCE
from registry.errors import UserError

TIME = "time"
"""Column of the seconds in a file for a data set that is not described by a YAML file; it may be left out."""


class Cut(NamedTuple):
    """Windows of one or several recordings, in physical units.

    Attributes:
        x: (n, channels, 1, time), float32, filtered, not scaled.
        time: (n, 2), float64: when each window begins and ends, seconds on the recording's own clock, which begins
            at 0 where there are no times; to the nearest sample.
        recordings: name of the recording that each window is of.
        notes: what was mended, found out or left out in reading, a line each.
    """

    x: np.ndarray
    time: np.ndarray
    recordings: tuple[str, ...]
    notes: tuple[str, ...]


class Cutter:
    """Cuts recordings without labels by the functions that made a run's shards, with the same settings.

    Args:
        folder: the run's, with `manifest.json` and `description.yaml`.
        manifest: what `manifest.json` holds.

    Raises:
        UserError: the run's windows were not cut from continuous recordings, or the description is another one.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any]) -> None:
        where, instead = folder / "manifest.json", "use predict_windows on windows like the run's"
        recorded, settings = manifest.get("recorded"), manifest.get("preprocessing")
        if not recorded or not settings:
            raise UserError(f"{where}: does not say how its windows were cut; {instead}")
        if not manifest["counts"]["recordings"]:
            raise UserError(f"{where}: the data set {manifest['name']} came cut into windows; {instead}")
        self.settings = Preprocessing(**settings)
        if self.settings.before is not None:
            raise UserError(f"{where}: its windows lie around labelled events, which a recording lacks; {instead}")
        self.path, self.classes, self.windows_channels = where, tuple(manifest["classes"]), manifest["channels"]
        self.channels, self.acceleration = tuple(recorded["channels"]), tuple(recorded["acceleration"])
        self.described: Description | None = None
        if set(REQUIRED) <= set(manifest["description"]):
            self.described = read_description(folder / "description.yaml")
            if self.described.values != manifest["description"]:
                raise UserError(
                    f"{folder / 'description.yaml'}: is not the description that the run's data were made by"
                )

    def array(self, signals: np.ndarray, rate: float) -> Cut:
        """Cut a recording (channels, time) sampled without gaps at `rate` Hz; NaN where a value is missing.

        Raises:
            UserError: another number of channels, another rate where the run's data were not resampled, infinite
                values, or less than a window.
        """
        signals = np.asarray(signals)
        if signals.ndim != 2 or len(signals) != len(self.channels) or signals.dtype.kind not in "fiu":
            raise UserError(
                f"a recording must be numbers of shape ({len(self.channels)}, time), a row for each of "
                f"{', '.join(self.channels)}; not {signals.dtype} of shape {signals.shape}"
            )
        if isinstance(rate, bool) or not isinstance(rate, Real) or not 0 < rate < float("inf"):
            raise UserError(f"the rate of a recording must be a number of Hz above 0, not {rate!r}")
        if not self.settings.resample and abs(rate / self.settings.rate - 1) > TOLERANCE:
            raise UserError(
                f"the recording is of {rate:g} Hz, the run's data of {self.settings.rate:g} Hz, and they were not "
                "resampled; resample the recording first"
            )
        with np.errstate(over="ignore"):
            values = signals.T.astype(np.float32)
        labels, name = np.zeros(len(values), dtype=np.int64), "recording"
        return self._cut(Path(name), lambda: [Recording(name, values, labels, None, name, float(rate))])

    def file(self, path: Path) -> Cut:
        """Cut a recording in a file, read as the run's data set was.

        Own data are read as their description says, without the label; columns of subject and session tell recordings
        apart where the file has them. Where the description merges the files of several sensors (`streams`), `path` is
        a folder laid out like the described one. For other data sets it is a table whose columns are named as the
        recorded channels, with a column `time` in seconds where there is one.

        Raises:
            UserError: no such file, a damaged one, one without the channels, or less than a window.
        """
        merged = self.described is not None and len(self.described.streams) > 1
        if not (path.is_dir() if merged else path.is_file()):
            kind = "folder with a file of each of the description's streams" if merged else "file"
            raise UserError(f"{path}: there is no such {kind}")
        return self._cut(path, partial(self._recordings, path))

    def _recordings(self, path: Path) -> Iterator[Recording]:
        described = _unlabelled(self.described or self._plain(path), path, self.classes)
        loaded = OwnData(described).load(path)
        if isinstance(loaded, Windows):
            raise UserError(f"{path}: its description says that files hold windows; use predict_windows")
        for recording in loaded:
            labels = np.zeros(len(recording.labels), dtype=np.int64)
            yield dataclasses.replace(recording, labels=labels, left_out={}, unlisted={}, test=False)

    def _plain(self, file: Path) -> Description:
        """Return the description of a table with a column for each recorded channel."""
        stream = Stream((), self.channels, 0.0, None, None, Dialect())
        if _holds(file, stream, TIME):
            stream = dataclasses.replace(stream, time=Time(TIME, "s"))
        rule = Rule("file", "", "")
        return Description(
            path=self.path,
            name="",
            folder=self.path.parent,
            streams=(stream,),
            subject=rule,
            session=None,
            label=rule,
            classes=None,
            ignore=frozenset(),
            acceleration=self.acceleration,
            preprocessing=self.settings,
            cut_already=None,
            test=GivenRule(self.path, self.path.parent, None),
            values={},
        )

    def _cut(self, path: Path, recordings: Callable[[], Iterable[Recording]]) -> Cut:
        notes: list[str] = []
        reading = read(_Unlabelled(self, recordings), path, self.settings, notes.append, True, collect=True)
        counts, windows = reading.counts, reading.windows
        if counts.recordings and windows is None and not any(tally.failed for tally in counts.recordings):
            length = f"{self.settings.window} samples ({self.settings.window / self.settings.rate:g} s)"
            raise UserError(f"{path}: holds no window of {length} without a gap")
        if reading.errors or windows is None or windows.recording is None:
            raise UserError("; ".join(reading.errors) or f"{path}: holds no recording")
        if list(reading.channels) != self.windows_channels:
            raise UserError(f"{self.path}: its windows have other channels than recordings give in this version")
        begin = windows.start / self.settings.rate
        time = np.stack([begin, begin + self.settings.window / self.settings.rate], axis=1)
        names = tuple(counts.recordings[number - 1].name for number in windows.recording)
        return Cut(windows.x, time, names, (*notes, *counts.lines()))


def _unlabelled(described: Description, path: Path, classes: tuple[str, ...]) -> Description:
    """Return the description of one recording, without what only training needs."""
    file = Rule("file", "", "")
    subject, session, streams = described.subject, described.session, described.streams
    if len(streams) == 1:
        subject = subject if _holds(path, streams[0], subject.column) else file
        session = session if session and _holds(path, streams[0], session.column) else None
    return dataclasses.replace(
        described,
        folder=path,
        streams=tuple(dataclasses.replace(stream, label=None) for stream in streams),
        subject=subject,
        session=session,
        label=file,  # of no use: every sample gets the first class afterwards, so that no window is left out
        classes={name: name for name in classes},
        ignore=frozenset(),
        test=GivenRule(described.path, path, None),
    )


def _holds(file: Path, stream: Stream, column: str | None) -> bool:
    """Tell if a file has a column beside the stream's own; whatever else is wrong with it shows when it is read."""
    if column is None:
        return False
    try:
        files.read(file, Wanted(stream.channels, stream.time, (column,)), stream.dialect, only_texts=True)
    except UserError:
        return False
    return True


class _Unlabelled(Source):
    """Recordings whose every sample counts as labelled."""

    name = "recording"

    def __init__(self, cutter: Cutter, recordings: Callable[[], Iterable[Recording]]) -> None:
        self.classes, self.channels, self.acceleration = cutter.classes, cutter.channels, cutter.acceleration
        self.preprocessing, self.recordings = cutter.settings, recordings

    def find(self, raw: Path | None, data_root: Path, download: bool) -> Path:
        raise NotImplementedError  # it is there already

    def files(self, path: Path) -> list[Path]:
        return [path]

    def load(self, path: Path) -> Iterable[Recording]:
        return self.recordings()
