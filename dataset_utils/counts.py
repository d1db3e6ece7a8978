"""Count what became of everything that was read: nothing is lost without standing here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from hashlib import sha256
from typing import Any

import numpy as np

from dataset_utils.recording import UNLABELLED, Recording, Windows

TELLING = 6
"""Names that a line lists before it only counts."""


@dataclass
class Tally:
    """Counts of one recording.

    Attributes:
        name, subject: which recording, and whose.
        rows: samples read.
        rate: measured where it has times, Hz; else as stated, or None.
        timed: whether it has times, so that its rate was checked.
        odd_rate: whether the measured rate is remarkably far from the stated one, though not too far.
        unit: of its times, where it was found out.
        unordered: rows that stood after later ones and were sorted.
        restarts: places where the clock runs backwards and the recording is cut.
        duplicates: rows equal to another of the same time, dropped.
        averaged: rows averaged with others of the same time.
        uneven: whether its times were so irregular that its signals were interpolated onto an even grid.
        inserted: samples interpolated where rows were missing.
        gaps: longer gaps that cut it.
        missing: rows in which a channel has no value.
        left_out: why samples are discarded -> how many.
        possible: windows that an unbroken, wholly labelled recording of as many samples would give.
        windows: windows that it gives.
        unlabelled: windows dropped as they touch an unlabelled sample.
        impure: windows dropped as too few of their samples have their label.
        mixed: windows kept that hold samples of another label.
        failed: whether it was left out for an error, which was said.
        same_as: a recording with the same samples, or ''.
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

    @staticmethod
    def of(recording: Recording, events: bool = False) -> Tally:
        """A new tally, with what the recording itself says; `events`: labels mark these, so most samples have none."""
        labels = np.asarray(recording.labels)
        left_out = {why: int(count) for why, count in recording.left_out.items() if count}
        rest = int(np.count_nonzero(labels == UNLABELLED)) - sum(left_out.values()) - sum(recording.unlisted.values())
        if rest > 0 and not events:
            left_out["no label"] = rest
        signals = recording.signals
        # a sum is NaN where an addend is, and takes no array as large as the signals
        missing = int(np.count_nonzero(np.isnan(signals.sum(axis=1)))) if signals.ndim == 2 else 0
        rows = 0 if recording.streams else len(labels)  # those of its streams are counted
        return Tally(recording.where, recording.subject, rows, recording.rate, missing=missing, left_out=left_out)

    @property
    def at_gaps(self) -> int:
        """Windows lost to gaps, to missing values and to cuts."""
        return max(0, self.possible - self.windows - self.unlabelled - self.impure)

    def to_dict(self) -> dict[str, Any]:
        """Give what is not zero, for the manifest."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("purity", "failed")}
        values["at_gaps"] = self.at_gaps
        rate = values.pop("rate")
        kept = {key: value for key, value in values.items() if value or key in ("name", "subject", "rows", "windows")}
        return kept | ({} if rate is None else {"rate": float(f"{rate:.6g}")})


@dataclass
class Counts:
    """Counts of a data set.

    Attributes:
        files: how many were read.
        ignored: files that were not -> why.
        recordings: one tally each.
        unlisted: label that is neither a class nor to be left out -> rows.
        found_out: what was found out about the files -> how many of them.
        windows: subject -> windows of each class.
        seen: SHA-256 of a recording's samples -> its name.
    """

    files: int = 0
    ignored: dict[str, str] = field(default_factory=dict)
    recordings: list[Tally] = field(default_factory=list)
    unlisted: Counter[str] = field(default_factory=Counter)
    found_out: Counter[str] = field(default_factory=Counter)
    windows: dict[str, list[int]] = field(default_factory=dict)
    seen: dict[bytes, str] = field(default_factory=dict)

    def begin(self, recording: Recording, events: bool) -> tuple[Tally, bytes]:
        """Count a recording; what becomes of it is added to the tally returned. With it comes its `digest_of`."""
        tally = Tally.of(recording, events)
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
        """Sum of a count over the recordings."""
        return sum(getattr(tally, name) for tally in self.recordings)

    def left_out(self) -> Counter[str]:
        """Why rows were discarded -> how many."""
        total: Counter[str] = Counter()
        for tally in self.recordings:
            total.update(tally.left_out)
        return total

    def purity(self) -> float | None:
        """Mean share of a window's samples that have the window's label; None without windows cut here."""
        kept = self.total("windows")
        return self.total("purity") / kept if kept else None

    def to_dict(self) -> dict[str, Any]:
        """All of it, for the manifest."""
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
        """Say what was mended, found out or lost, a line each; nothing where all was plain."""
        lines = [f"found out: {what} (in {many(count, 'file')})" for what, count in self.found_out.items()]
        told = {
            "unordered": "rows were out of order and were sorted by time",
            "duplicates": "rows repeat another row of the same time and were dropped",
            "averaged": "rows share their time with others and were averaged",
            "restarts": "restarts of the clock cut recordings",
            "inserted": "samples were missing and were interpolated on the time axis",
            "gaps": "gaps were too long to interpolate and cut recordings",
            "missing": "rows lack a value in some channel",
        }
        for name, text in told.items():
            hit = [tally.name for tally in self.recordings if getattr(tally, name)]
            if hit:
                lines.append(f"{self.total(name)} {text} (in {some(hit)})")
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
        lines += [f"discarded: {count} rows, {why}" for why, count in self.left_out().items()]
        for name, why in (
            ("at_gaps", "at gaps, missing values and ends"),
            ("unlabelled", "as they touch an unlabelled sample"),
            ("impure", "as too few of their samples have their label (purity)"),
        ):
            if self.total(name):
                lines.append(f"{self.total(name)} of {self.total('possible')} windows dropped {why}")
        by_reason: dict[str, list[str]] = {}
        for file, why in self.ignored.items():
            by_reason.setdefault(why, []).append(file)
        lines += [f"ignored: {some(names)}: {why}" for why, names in by_reason.items()]
        return lines


def digest_of(recording: Recording) -> bytes:
    """SHA-256 of a recording's samples, their number and type."""
    signals = np.ascontiguousarray(recording.signals)
    content = sha256(repr((signals.shape, signals.dtype.str)).encode())
    content.update(signals.data if signals.size else b"")
    return content.digest()


def many(count: int, what: str) -> str:
    """'1 file', '2 files'."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def some(names: Iterable[str]) -> str:
    """The first few of several names, and how many there are."""
    names = list(dict.fromkeys(names))
    text = ", ".join(names[:TELLING])
    return text if len(names) <= TELLING else f"{text} and {len(names) - TELLING} more"


def differing_in_case(labels: Iterable[str], listed: Iterable[str]) -> Mapping[str, str]:
    """Labels that a listed one equals but for upper and lower case -> that listed one."""
    folded = {name.casefold(): name for name in listed}
    return {label: folded[label.casefold()] for label in labels if label.casefold() in folded}
