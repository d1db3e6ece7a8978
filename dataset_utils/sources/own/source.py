"""Data source for recordings that a YAML file describes."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dataset_utils.counts import Tally, some
from dataset_utils.files import check_listable, check_regular, is_file, is_folder, state_of
from dataset_utils.recording import Recording, Source, Windows
from dataset_utils.sources.own import inventory, marks, streams
from dataset_utils.sources.own.cut import read_windows
from dataset_utils.sources.own.description import Description, Marks, Stream, read_description
from dataset_utils.sources.own.labels import Text, class_names, indexed
from dataset_utils.sources.own.naming import Rule
from dataset_utils.sources.own.reading import read
from dataset_utils.sources.own.table import Table, Wanted
from dataset_utils.time_axis import UNITS, likely_unit
from dataset_utils.windows import joined
from registry.errors import UserError


def load_source(yaml_path: Path) -> Source:
    """Return the data set that a YAML file describes. Raises UserError; see `read_description`."""
    return OwnData(read_description(yaml_path))


class OwnData(Source):
    """A folder of the user's recordings.

    Attributes:
        described: contents of the YAML file.
    """

    def __init__(self, description: Description) -> None:
        self.described = description
        self.name = description.name
        self.channels = description.channels
        self.acceleration = description.acceleration
        self.preprocessing = description.preprocessing
        self.root = description.folder.parent if is_file(description.folder) else description.folder

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:  # type: ignore[override]  # read-only: found out when first asked for
        """Class names; if the YAML gives none, the distinct labels, numbers in order."""
        return tuple(dict.fromkeys(self._names.values()))

    @property
    def listed(self) -> tuple[str, ...]:
        """Labels that are read as classes; see `Source.listed`."""
        return tuple(self._names)

    def description(self) -> Mapping[str, Any]:
        """Return the whole YAML, as any change of it may change the windows."""
        return self.described.values

    def find(self, raw: Path | None, data_root: Path, download: bool) -> Path:
        """Return the folder or file that the YAML names."""
        if raw is not None:
            raise UserError(f"--raw {raw}: leave it out; {self.described.path} says where the data are ('folder')")
        folder = self.described.folder
        if state_of(folder) is None:
            raise UserError(f"{folder}: there is no such folder; correct 'folder' in {self.described.path}")
        if is_folder(folder):
            check_listable(folder)
        else:
            check_regular(folder)
        return folder

    def files(self, path: Path) -> list[Path]:
        """Return the files of recordings and of labels; see `Source.files`."""
        recorded = self._recorded()
        beside = (other for file in recorded for other in inventory.companions(file))
        return sorted({*recorded, *beside, *inventory.label_files(self.described, self.root)})

    def ignored(self, path: Path) -> dict[str, str]:
        """Return file that is not read -> reason; see `Source.ignored`."""
        return inventory.ignored(self.described, self.root, self._recorded())

    def load(self, path: Path) -> Iterable[Recording] | Windows:
        """Read a recording for each subject and session, or windows where the files hold windows."""
        loaded = (part() for part in self.parts(path))
        if self.described.cut_already:
            return joined([own for own in loaded if isinstance(own, Windows)])[0]
        return chain.from_iterable(own for own in loaded if not isinstance(own, Windows))

    def parts(self, path: Path) -> Iterator[Callable[[], Iterable[Recording] | Windows]]:
        """Yield a function for each file, or for the files of each recording; see `Source.parts`."""
        described = self.described
        described.test.check_files(self._recorded())
        if described.subject.kind == "file" and (alike := inventory.alike(self._recorded())):
            warnings.warn(
                f"subjects are called as their files, so {some(alike)} in several folders are one each; where they are "
                "other people, write 'subject: folder', or a pattern with the folder's name",
                stacklevel=2,
            )
        if len(described.streams) > 1:
            for key, files in self._joined():
                yield functools.partial(self._merged, *key, files)
        else:
            for file in self._recorded():
                if described.cut_already:
                    yield functools.partial(read_windows, file, self.root, described, self._names, self.classes)
                else:
                    yield functools.partial(self._recordings, file)
        yield described.test.check_seen

    @functools.cached_property
    def _names(self) -> dict[str, str]:
        """Label -> class name, in the order of classes."""
        described = self.described
        if described.classes is not None:
            return described.classes
        found: set[str] = set()
        errors: list[UserError] = []
        if isinstance(described.label, Marks):
            found |= marks.labels_of(described, self.root)
        elif described.label is not None:
            found |= {described.label.of(file, self.root) for file in self._recorded()}
        else:
            for stream in described.streams:
                if not stream.label:
                    continue
                for file in self._files(stream):
                    try:
                        table = read(file, self._wanted(stream), stream.dialect, True)
                        found |= set(table.texts[stream.label].counts())
                    except UserError as error:  # raised again when the file is read
                        errors.append(error)
            if errors and not found:
                raise errors[0]
        return class_names(found, described.ignore, f"{described.folder}")

    @functools.cache  # noqa: B019 (lives as long as the source)
    def _files(self, stream: Stream) -> list[Path]:
        return inventory.files_of(stream, self.described, self.root)

    def _recorded(self) -> list[Path]:
        return sorted({file for stream in self.described.streams for file in self._files(stream)})

    def _wanted(self, stream: Stream) -> Wanted:
        rules = (self.described.subject, self.described.session)
        columns = [stream.label, self.described.test.column, *(rule.column for rule in rules if rule is not None)]
        return Wanted(stream.channels, stream.time, tuple(dict.fromkeys(c for c in columns if c)), stream.label)

    def _recordings(self, file: Path) -> Iterator[Recording]:
        (stream,) = self.described.streams
        table = read(file, self._wanted(stream), stream.dialect)
        rows = len(table.signals)
        subject = self._text(self.described.subject, file, table, "subject")
        session = self._text(self.described.session, file, table, "session")
        label = table.texts[stream.label] if stream.label else None
        if isinstance(self.described.label, Rule):
            label = Text.constant(self.described.label.of(file, self.root), rows)
        name = self._name(file)
        given = self.described.test
        tested = given.rows(file, table.texts[given.column] if given.column else None, rows)
        seconds, unit = self._clock(table)
        missed = None
        if isinstance(self.described.label, Marks) and not self.described.label.of_part:
            label, missed = self._marked(self._name(file), file, ("", ""), seconds, unit)
        name = self._name(file)
        groups = list(_groups(subject, session, table.time is not None))
        for part in groups:
            first = part[0] if isinstance(part, np.ndarray) else part.start
            who, when = subject.values[subject.codes[first]], session.values[session.codes[first]]
            own = name if len(groups) == 1 else f"{name} ({', '.join(filter(None, (who, when)))})"
            text = None if label is None else label.take(part)
            if text is None:
                start = seconds[first] if table.time is None else 0.0  # without times: the part's own
                text, missed = self._marked(own, file, (who, when), seconds[part] - start, unit)
            yield dataclasses.replace(
                self._recording(
                    own, who, table.signals[part], None if table.time is None else table.time[part], text, table, missed
                ),
                test=True if given.names(who, when) else tested[part],
            )
            missed = None if missed is None else 0  # the file's are counted once

    def _clock(self, table: Table) -> tuple[np.ndarray, str]:
        """Return the time of each row in seconds (without times: from the first row on), and the unit of the times."""
        settings, time = self.preprocessing, table.time
        if time is None:
            return np.arange(len(table.signals)) / (table.rate or settings.recorded or settings.rate), "s"
        unit = table.unit or (likely_unit(time - time[0], settings) if len(time) else "s")
        return time * UNITS[unit], unit

    def _recording(
        self,
        name: str,
        subject: str,
        signals: np.ndarray,
        time: np.ndarray | None,
        label: Text,
        table: Table,
        missed: int | None = None,
    ) -> Recording:
        """Return one recording of a table's rows.

        Args:
            name: name of the recording.
            subject: name of the subject.
            signals: (rows, channels).
            time: (rows,), or None.
            label: (rows,), the labels.
            table: the file's contents.
            missed: number of events outside the recording, where labels are events.
        """
        found = indexed(label, self._names, self.classes, self.described.ignore)
        left_out = found.left_out
        if self.preprocessing.before is not None:
            left_out = {why: n for why, n in left_out.items() if why != "no label"}
            left_out |= {marks.OUTSIDE: missed} if missed else {}
        unit = table.unit or (self._clock(table)[1] if isinstance(self.described.label, Marks) else None)
        return Recording(
            subject, signals, found.labels, time, name, table.rate, unit, left_out, found.unlisted, table.found_out
        )

    def _marked(self, name: str, file: Path, key: tuple[str, str], seconds: np.ndarray, unit: str) -> tuple[Text, int]:
        rule = self.described.label
        assert isinstance(rule, Marks)
        path = marks.path_of(rule, file, self.root, *key)
        return marks.place(marks.read_marks(path, rule, key[0], unit), seconds, rule, name)

    def _text(self, rule: Rule | None, file: Path, table: Table, what: str) -> Text:
        """Return the subject or the session of each row. Raises UserError where a cell is empty."""
        rows = len(table.signals)
        if rule is None:
            return Text.constant("", rows)
        if rule.column is None:
            return Text.constant(rule.of(file, self.root), rows)
        text = table.texts[rule.column]
        empty = text.counts().get("", 0)
        if empty:
            raise UserError(f"{file}: {empty} of {rows} rows have no {what} (column '{rule.column}' is empty)")
        return text

    def _name(self, file: Path) -> str:
        return file.relative_to(self.root).as_posix()

    def _joined(self) -> list[tuple[tuple[str, str], list[Path]]]:
        """Return subject and session -> a file of each stream. Raises UserError for a missing file or several."""
        described = self.described
        found: list[dict[tuple[str, str], Path]] = []
        for stream in described.streams:
            of_stream: dict[tuple[str, str], Path] = {}
            for file in self._files(stream):
                session = described.session.of(file, self.root) if described.session else ""
                key = (described.subject.of(file, self.root), session)
                if key in of_stream:
                    raise UserError(
                        f"{of_stream[key]} and {file.name}: two files of {' '.join(key).strip()} for one of 'streams'; "
                        "tell them apart with 'session'"
                    )
                of_stream[key] = file
            found.append(of_stream)
        keys = sorted({key for of_stream in found for key in of_stream})
        for key in keys:
            for of_stream, stream in zip(found, described.streams, strict=True):
                if key not in of_stream:
                    raise UserError(f"{self.root}: {' '.join(key).strip()} has no file that fits {list(stream.files)}")
        return [(key, [of_stream[key] for of_stream in found]) for key in keys]

    def _merged(self, subject: str, session: str, files: list[Path]) -> Iterator[Recording]:
        described = self.described
        recordings = []
        for stream, file in zip(described.streams, files, strict=True):
            table = read(file, self._wanted(stream), stream.dialect)
            label = table.texts[stream.label] if stream.label else Text.constant("", len(table.signals))
            recordings.append(self._recording(self._name(file), subject, table.signals, table.time, label, table))
        tallies = [Tally.of(recording) for recording in recordings]
        for tally, stream in zip(tallies, described.streams, strict=True):
            if not stream.label:
                tally.left_out = {}
        each = [stream.preprocessing(self.preprocessing) for stream in described.streams]
        merged = streams.merge(recordings, each, self.preprocessing, tallies)
        name = " ".join(filter(None, (subject, session)))
        of_labels = next((r for r, s in zip(recordings, described.streams, strict=True) if s.label), None)
        labels = merged.labels
        left_out: Mapping[str, int] | None = {}
        unlisted: Mapping[str, int] = {}
        if described.label is not None:
            seconds = merged.first + np.arange(len(labels)) / self.preprocessing.rate
            if isinstance(described.label, Rule):
                text = Text.constant(described.label.of(files[0], self.root), len(labels))
            else:
                text, _ = self._marked(name, files[0], (subject, session), seconds, "s")
            found = indexed(text, self._names, self.classes, described.ignore)
            labels, left_out, unlisted = found.labels, found.left_out, found.unlisted
        elif of_labels is not None:
            left_out, unlisted = None, of_labels.unlisted
        yield Recording(
            subject,
            merged.signals,
            labels,
            name=name,
            left_out=left_out,
            unlisted=unlisted,
            found_out=tuple(dict.fromkeys(text for r in recordings for text in r.found_out)),
            streams=tuple(tallies),
            test=described.test.names(subject, session) or any(described.test.rows(file, None, 1)[0] for file in files),
            begins=merged.first,
        )


def _groups(subject: Text, session: Text, timed: bool) -> Iterator[np.ndarray | slice]:
    """Yield the rows of each recording in a file.

    With times these are all rows of a subject and session, at any position; without, rows that follow each other.
    """
    key = subject.codes * np.int32(len(session.values)) + session.codes
    edges = np.concatenate([[0], np.flatnonzero(key[1:] != key[:-1]) + 1, [len(key)]])
    if timed and len(edges) - 1 > len(np.unique(key[edges[:-1]])):  # one recording's rows are at several positions
        for one in np.unique(key):
            yield np.flatnonzero(key == one)
    else:
        for a, b in pairwise(edges.tolist()):
            yield slice(a, b)
