"""Counts of everything that was read and of what became of it, so that nothing is dropped silently."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from hashlib import sha256
from typing import Any

import numpy as np

from dataset_utils.recording import UNLABELLED, Recording, Windows

TELLING = 6
"""Most names that a line lists; further ones are only counted."""


@dataclass
class Tally:
    """Counts of one recording.

    Attributes:
        name: name of the recording.
        subject: name of its subject.
        stream: whether it is one of the streams that a recording, which has a tally of its own, is merged from.
        max_gap: for how long a stream's values may be missing and are interpolated, seconds.
        rows: samples read.
        rate: sampling rate, Hz: measured where the recording has times, else as stated, or None.
        timed: whether the recording has times, so that its rate was checked.
        odd_rate: whether the measured rate differs from the stated one by 1 to 5 % (see `time_axis`).
        unit: unit of the times, where it was detected.
        unordered: rows that stood after later ones and were sorted.
        restarts: positions at which the clock runs backwards and the recording is cut.
        duplicates: rows equal to another of the same time, dropped.
        averaged: rows averaged with others of the same time.
        uneven: whether the times were so irregular that the signals were interpolated onto an even grid.
        inserted: samples interpolated where rows were missing.
        gaps: gaps too long to interpolate, at which the recording is cut.
        missing: rows in which a channel has no value.
        left_out: reason for discarding samples -> number of samples.
        possible: windows that a recording of as many samples without gaps and with all labels would give.
        windows: windows that the recording gives.
        unlabelled: windows dropped as they touch an unlabelled sample.
        impure: windows dropped as too few of their samples have their label.
        mixed: windows kept that hold samples of another label.
        failed: whether the recording was left out because of an error, which was reported.
        same_as: name of another recording with the same samples, or ''.
        purity: sum over the kept windows of the share of samples that have the window's label.
    """

    name: str
    subject: str
    rows: int = 0
    rate: float | None = None
    timed: bool = False
    odd_rate: bool = False
    unit: str = ""
    unordered: int = 0
    restarts: int = 0
    duplicates: int = 0
    averaged: int = 0
    uneven: bool = False
    inserted: int = 0
    gaps: int = 0
    missing: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    possible: int = 0
    windows: int = 0
    unlabelled: int = 0
    impure: int = 0
    mixed: int = 0
    failed: bool = False
    same_as: str = ""
    purity: float = 0.0
    stream: bool = False
    max_gap: float = 0.0

    @staticmethod
    def of(recording: Recording, events: bool = False) -> Tally:
        """Return a new tally with the counts that the recording itself gives.

        Args:
            recording: the recording to count.
            events: whether labels mark events, so that samples without a label are not counted as discarded.
        """
        labels = np.asarray(recording.labels)
        left_out = {why: int(count) for why, count in (recording.left_out or {}).items() if count}
        rest = int(np.count_nonzero(labels == UNLABELLED)) - sum(left_out.values()) - sum(recording.unlisted.values())
        if rest > 0 and not events and recording.left_out is not None:
            left_out["no label"] = rest
        tally = Tally(recording.where, recording.subject, rate=recording.rate, left_out=left_out)
        if recording.streams:  # whose rows are counted instead
            tally.timed = all(stream.timed for stream in recording.streams)
            return tally
        tally.rows = len(labels)
        if recording.signals.ndim == 2:
            # a sum is NaN where an addend is, and takes no array as large as the signals
            tally.missing = int(np.count_nonzero(np.isnan(recording.signals.sum(axis=1))))
        return tally

    @property
    def at_gaps(self) -> int:
        """Number of windows lost to gaps, to missing values and to cuts."""
        return max(0, self.possible - self.windows - self.unlabelled - self.impure)

    def to_dict(self) -> dict[str, Any]:
        """Return the counts that are not zero, for the manifest."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("purity", "failed", "max_gap")}
        values["at_gaps"] = self.at_gaps
        rate = values.pop("rate")
        kept = {key: value for key, value in values.items() if value or key in ("name", "subject", "rows", "windows")}
        return kept | ({} if rate is None else {"rate": float(f"{rate:.6g}")})


@dataclass
class Counts:
    """Counts of a data set.

    Attributes:
        files: number of files read.
        ignored: file that was not read -> reason.
        recordings: one tally for each recording.
        unlisted: label that is neither a class nor to be ignored -> number of rows.
        found_out: property that was detected (see `Recording.found_out`) -> number of files.
        windows: subject -> number of windows of each class.
        seen: SHA-256 of a recording's samples -> name of the recording.
    """

    files: int = 0
    ignored: dict[str, str] = field(default_factory=dict)
    recordings: list[Tally] = field(default_factory=list)
    unlisted: Counter[str] = field(default_factory=Counter)
    found_out: Counter[str] = field(default_factory=Counter)
    windows: dict[str, list[int]] = field(default_factory=dict)
    seen: dict[bytes, str] = field(default_factory=dict)

    def begin(self, recording: Recording, events: bool) -> tuple[Tally, bytes]:
        """Count a recording.

        Returns:
            the recording's tally, to which later steps add, and its `digest_of`.
        """
        tally = Tally.of(recording, events)
        for stream in recording.streams:
            stream.stream = True
        self.recordings += [*recording.streams, tally]
        digest = digest_of(recording)
        tally.same_as = self.seen.setdefault(digest, tally.name) if len(recording.labels) else ""
        tally.same_as = "" if tally.same_as == tally.name else tally.same_as
        self.unlisted.update(recording.unlisted)
        self.found_out.update(recording.found_out)
        return tally, digest

    def finish(self, windows: Windows, classes: int) -> None:
        """Count the windows of each subject and class."""
        for index, subject in enumerate(windows.subjects):
            self.windows[subject] = np.bincount(windows.y[windows.subject == index], minlength=classes).tolist()

    def total(self, name: str) -> int:
        """Return the sum of a count over the recordings."""
        return sum(getattr(tally, name) for tally in self.recordings)

    def left_out(self) -> Counter[str]:
        """Return reason for discarding rows -> number of rows."""
        total: Counter[str] = Counter()
        for tally in self.recordings:
            total.update(tally.left_out)
        return total

    def purity(self) -> float | None:
        """Return the mean share of a window's samples that have the window's label; None if no windows were cut."""
        kept = self.total("windows")
        return self.total("purity") / kept if kept else None

    def to_dict(self) -> dict[str, Any]:
        """Return all counts, for the manifest."""
        purity = self.purity()
        return {
            "files": self.files,
            "ignored": self.ignored,
            "rows": self.total("rows"),
            "discarded": dict(self.left_out()),
            "found_out": dict(self.found_out),
            "windows": self.windows,
            "windows_at_gaps": self.total("at_gaps"),
            "windows_unlabelled": self.total("unlabelled"),
            "windows_impure": self.total("impure"),
            "windows_of_mixed_labels": self.total("mixed"),
            "purity": None if purity is None else round(purity, 6),
            "recordings": [tally.to_dict() for tally in self.recordings],
        }

    def lines(self) -> list[str]:
        """Return a line for each kind of repair, detection or loss; no lines where there was none."""
        lines = [f"found out: {what} (in {many(count, 'file')})" for what, count in self.found_out.items()]
        told = {  # of one, and of several
            "unordered": (
                "row was out of order and was sorted by time",
                "rows were out of order and were sorted by time",
            ),
            "duplicates": (
                "row repeats another row of the same time and was dropped",
                "rows repeat another row of the same time and were dropped",
            ),
            "averaged": (
                "row shares its time with others and was averaged",
                "rows share their time with others and were averaged",
            ),
            "restarts": ("restart of the clock cuts a recording", "restarts of the clock cut recordings"),
            "inserted": (
                "sample was missing and was interpolated on the time axis",
                "samples were missing and were interpolated on the time axis",
            ),
            "gaps": (
                "gap was too long to interpolate and cuts a recording",
                "gaps were too long to interpolate and cut recordings",
            ),
            "missing": ("row lacks a value in some channel", "rows lack a value in some channel"),
        }
        for name, (one, several) in told.items():
            hit = [tally.name for tally in self.recordings if getattr(tally, name)]
            if hit:
                total = self.total(name)
                lines.append(f"{total} {one if total == 1 else several} (in {some(hit)})")
        uneven = [tally.name for tally in self.recordings if tally.uneven]
        if uneven:
            lines.append(f"uneven times: signals were interpolated onto an even grid (in {some(uneven)})")
        same = [f"{tally.name} as {tally.same_as}" for tally in self.recordings if tally.same_as]
        if same:
            lines.append(f"the same samples twice: {some(same)}; leave one out with 'files'")
        odd = [tally for tally in self.recordings if tally.odd_rate]
        if odd:
            rates = some(f"{tally.rate:.4g} Hz ({tally.name})" for tally in odd)
            lines.append(f"measured rates differ from the stated one by 1 to 5 %: {rates}")
        units = Counter(tally.unit for tally in self.recordings if tally.unit)
        lines += [f"found out: times are in {unit} (in {many(count, 'recording')})" for unit, count in units.items()]
        lines += [f"discarded: {many(count, 'row')}, {why}" for why, count in self.left_out().items()]
        for name, why in (
            ("at_gaps", "at gaps, missing values and ends"),
            ("unlabelled", "as they touch an unlabelled sample"),
            ("impure", "as too few of their samples have their label (purity)"),
        ):
            if self.total(name):
                lines.append(f"{self.total(name)} of {many(self.total('possible'), 'window')} dropped {why}")
        by_reason: dict[str, list[str]] = {}
        for file, why in self.ignored.items():
            by_reason.setdefault(why, []).append(file)
        lines += [f"ignored: {some(names)}: {why}" for why, names in by_reason.items()]
        return lines


def digest_of(recording: Recording) -> bytes:
    """Return the SHA-256 of a recording's samples, their number and type."""
    signals = np.ascontiguousarray(recording.signals)
    content = sha256(repr((signals.shape, signals.dtype.str)).encode())
    content.update(signals.data if signals.size else b"")
    return content.digest()


def many(count: int, what: str) -> str:
    """Return a number with its noun: '1 file', '2 files'."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def some(names: Iterable[str], between: str = ", ") -> str:
    """Return the first `TELLING` of several names, and the number of further ones."""
    names = list(dict.fromkeys(names))
    text = between.join(names[:TELLING])
    return text if len(names) <= TELLING else f"{text} and {len(names) - TELLING} more"


def differing_in_case(labels: Iterable[str], listed: Iterable[str]) -> Mapping[str, str]:
    """Return label -> listed label that differs from it in upper and lower case only."""
    folded = {name.casefold(): name for name in listed}
    return {label: folded[label.casefold()] for label in labels if label.casefold() in folded}
