"""Reading of a data set's original files into windows, with counts of everything that was read."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dataset_utils import limits, preprocessing
from dataset_utils import windows as cutting
from dataset_utils.counts import Counts, Tally, differing_in_case, some
from dataset_utils.lines import Lines, reach
from dataset_utils.recording import UNLABELLED, Preprocessing, Recording, Source, Windows
from dataset_utils.spec import OVERRIDES
from dataset_utils.subjects import Subjects
from registry.errors import UserError
from registry.parameters import suggest
from registry.text import in_one_line


@dataclass(frozen=True)
class Reading:
    """Result of reading a data set.

    Attributes:
        windows: the windows; None where errors left none.
        channels: channel names of the windows.
        counts: counts of everything that was read.
        errors: what is wrong with the data set; empty unless errors were collected.
    """

    windows: Windows | None
    channels: tuple[str, ...]
    counts: Counts
    errors: tuple[str, ...] = ()


def read(
    source: Source,
    path: Path,
    settings: Preprocessing,
    report: Callable[[str], None],
    allow_missing: bool = False,
    collect: bool = False,
    subjects: Subjects | None = None,
) -> Reading:
    """Read a data set and cut it into windows.

    Args:
        source: the data set.
        path: its original files, as `Source.find` gives them.
        settings: preprocessing.
        report: called with one line for each warning of the source.
        allow_missing: whether a subject or a class without a window is accepted.
        collect: whether to collect all errors and continue; otherwise the first one is raised.
        subjects: whose data are used; None for all.

    Raises:
        UserError: files are damaged or do not fit their description, a subject or a class has no window, or a label
            is not listed.
    """
    errors: list[str] = []
    subjects = subjects or Subjects()

    @contextmanager
    def collecting(tally: Tally | None = None) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            if not collect:
                raise
            errors.append(str(error))
            if tally is not None:
                tally.failed = True

    classes = len(source.classes)  # may read the labels of every file: done while nothing else is in memory
    limits.check_count(source.name, classes, limits.CLASSES, "classes", "list fewer")
    limits.check_count(source.name, len(source.channels), limits.CHANNELS, "channels", "name fewer")
    counts = Counts(ignored=source.ignored(path), files=len(source.files(path)))
    channels = preprocessing.channel_names(source.channels, source.acceleration, settings.gravity)
    ready: list[Windows] = []
    lines = Lines(settings)

    def stretches() -> Iterator[preprocessing.Stretch]:
        for part in source.parts(path):
            with collecting():
                loaded = part()
                if isinstance(loaded, Windows):
                    _check_windows(source, loaded)
                    ready.append(loaded)
                    continue
                for recording in loaded:
                    if not subjects.used(recording.subject):
                        continue
                    with collecting():
                        preprocessing.check_recording(recording, source.channels, classes)
                        tally, digest = counts.begin(recording, settings.before is not None)
                        number, place = len(counts.recordings), lines.place(recording, digest)
                        recording = dataclasses.replace(recording, labels=_with_test(recording, classes))
                        with collecting(tally):
                            for stretch in preprocessing.stretches(
                                recording, source.channels, source.acceleration, settings, tally
                            ):
                                start = stretch.start + place.offset
                                yield stretch._replace(
                                    line=place.number, start=start, recording=number, classes=classes
                                )

    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always", UserWarning)
        windows = cutting.cut(stretches(), settings)
    if windows is not None:
        windows = dataclasses.replace(windows, reach=_reach(counts, settings))
    ours = [warning for warning in raised if issubclass(warning.category, UserWarning)]  # others are the libraries' own
    for text in dict.fromkeys(str(warning.message) for warning in ours):
        report(f"warning: {in_one_line(text)}")
    if ready:
        _refuse_overrides(source, settings)
        windows, copies = cutting.joined(ready)
        windows = subjects.choose(windows)
        channels = source.channels
        if copies:
            report(f"{copies} files hold the same windows as another; they stay on one side of a split in time")
    with collecting():
        subjects.check()
    for line in subjects.lines():
        report(line)
    if windows is not None:
        counts.finish(windows, classes)
    wrong = _wrong(source, settings, counts, windows, allow_missing, not all(subjects.met.values()))
    if errors and windows is None:
        wrong = []  # the errors say why
    if wrong and not collect:
        raise UserError("; ".join(wrong))
    return Reading(windows, channels, counts, tuple(dict.fromkeys(errors + wrong)))


def _with_test(recording: Recording, classes: int) -> np.ndarray:
    """Return a recording's labels, with `classes` added for samples that are to be tested on (see `Stretch`)."""
    labels = np.asarray(recording.labels, dtype=np.int64)
    return np.where((labels != UNLABELLED) & np.asarray(recording.test), labels + classes, labels)


def _reach(counts: Counts, settings: Preprocessing) -> int:
    """Return how many samples to either side influence a sample, in the recording where these are most."""
    slowest = min([settings.rate, *(tally.rate for tally in counts.recordings if tally.rate)])
    longest = max([settings.max_gap, *(tally.max_gap for tally in counts.recordings)])
    return reach(dataclasses.replace(settings, max_gap=longest), slowest)


def _wrong(
    source: Source, settings: Preprocessing, counts: Counts, windows: Windows | None, allow_missing: bool, chosen: bool
) -> list[str]:
    """Return what is wrong with a data set as a whole, or, where `chosen`, with the subjects of it that are used."""
    wrong = _unlisted(source, counts)
    if windows is None:
        if counts.recordings:
            seconds = settings.window / settings.rate
            wrong.append(
                f"no window of {settings.window} samples ({seconds:g} s) fits between gaps and unlabelled samples of "
                f"{counts.total('rows')} rows; try a smaller window"
            )
        return wrong
    if allow_missing:
        return wrong
    of_class = np.sum(list(counts.windows.values()), axis=0)
    explained = differing_in_case(counts.unlisted, source.classes).values()
    absent = [name for name, count in zip(source.classes, of_class, strict=True) if not count and name not in explained]
    if absent:
        whose = " of the subjects that are used" if chosen else ""
        advice = "use more subjects" if chosen else "list the classes to be learnt"
        wrong.append(
            f"no window{whose} has {some(map(repr, absent))}, of the classes of {source.name}; {advice}, or go on "
            "without them with --allow-missing"
        )
    subjects: dict[str, list[Tally]] = {}
    for tally in counts.recordings:
        subjects.setdefault(tally.subject, []).append(tally)
    for name, tallies in subjects.items():
        if name not in counts.windows and not any(tally.failed for tally in tallies):
            wrong.append(_vanished(name, tallies, settings))
    return wrong


def _unlisted(source: Source, counts: Counts) -> list[str]:
    """Return errors for labels in the files that are neither a class nor to be ignored."""
    same = differing_in_case(counts.unlisted, source.listed)
    wrong = [
        f"label '{label}' ({counts.unlisted[label]} rows) is listed as '{same[label]}'; write it the same way"
        for label in same
    ]
    others = [label for label in counts.unlisted if label not in same]
    if others:
        hint = suggest(others[0], source.listed)
        named = some(f"'{label}' ({counts.unlisted[label]} rows)" for label in others)
        wrong.append(
            f"not listed in the classes of {source.name}: {named}{hint}; list the labels to be learnt, and "
            f"leave out the others with ignore: [{', '.join(others[:3])}{', ...' if len(others) > 3 else ''}]"
        )
    return wrong


def _vanished(subject: str, tallies: list[Tally], settings: Preprocessing) -> str:
    rows = sum(tally.rows for tally in tallies)
    losses = {
        "has less than a window without a gap": sum(tally.at_gaps for tally in tallies),
        "every window touches an unlabelled sample": sum(tally.unlabelled for tally in tallies),
        "no window is pure enough": sum(tally.impure for tally in tallies),
    }
    why = max(losses, key=losses.__getitem__) if any(losses.values()) else f"a window takes {settings.window} samples"
    return f"subject {subject}: not one window of its {rows} rows ({why}); --allow-missing goes on without it"


def _refuse_overrides(source: Source, settings: Preprocessing) -> None:
    for key in OVERRIDES:
        if getattr(settings, key) != getattr(source.preprocessing, key):
            raise UserError(f"--{key}: {source.name} comes filtered and cut into windows; leave the flag out")


def _check_windows(source: Source, windows: Windows) -> None:
    """Raise UserError where the windows do not fit the data set's own description."""
    shape, labels, classes = windows.x.shape, windows.y, len(source.classes)
    if len(shape) != 4 or shape[1:3] != (len(source.channels), 1) or not shape[0]:
        raise UserError(f"{source.name}: windows of shape {shape}, not (n, {len(source.channels)} channels, 1, time)")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= classes:
        raise UserError(f"{source.name}: labels must be whole numbers from 0 to {classes - 1}")
    for name in ("y", "subject", "stretch", "start", "recording", "test"):
        values = getattr(windows, name)
        if values is not None and values.shape != shape[:1]:
            raise UserError(f"{source.name}: {shape[0]} windows, but '{name}' has shape {values.shape}")
