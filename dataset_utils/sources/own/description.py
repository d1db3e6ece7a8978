"""Description of the user's own recordings in a YAML file."""

from __future__ import annotations

import codecs
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataset_utils import limits
from dataset_utils.files import read_yaml
from dataset_utils.recording import Preprocessing
from dataset_utils.sources.own.checked import Checked, quoted
from dataset_utils.sources.own.given import GivenRule
from dataset_utils.sources.own.labels import label_text
from dataset_utils.sources.own.naming import Rule
from dataset_utils.spec import window_samples
from dataset_utils.time_axis import UNITS
from registry.parameters import suggest
from registry.text import NAMES, can_be_shown

REQUIRED = ("name", "folder", "window")
OPTIONAL = (
    *("rate", "columns", "label", "files", "time", "subject", "session", "streams", "cut_already", "resample"),
    *("overlap", "purity", "classes", "ignore", "acceleration", "filters", "max_gap", "dialect", "test"),
)
STREAM = ("time", "label", "dialect", "max_gap")
DIALECT = ("separator", "decimal", "encoding", "skip", "header")
FILTERS = ("median", "lowpass", "gravity")
AXES = ("channels first", "time first")


@dataclass(frozen=True)
class Dialect:
    """Format of text files; None is detected.

    Attributes:
        separator: character between cells; ' ' stands for any number of blanks.
        decimal: decimal mark, '.' or ','.
        encoding: encoding of the text.
        skip: number of lines before the header, or before the first row of files without a header.
        header: column names of files without a header.
    """

    separator: str | None = None
    decimal: str | None = None
    encoding: str | None = None
    skip: int | None = None
    header: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Time:
    """A column of times.

    Attributes:
        column: name of the column.
        unit: 's', 'ms', 'us', 'ns', 'iso', a pattern of dates such as '%d.%m.%Y %H:%M:%S', several kinds of dates of
            which each file has one, or None to detect it.
        timezone: time zone of dates that name none.
        repeated: see `Preprocessing`.
    """

    column: str
    unit: str | tuple[str, ...] | None = None
    timezone: str | None = None
    repeated: str = ""

    @property
    def of_numbers(self) -> str | None:
        """Unit of times that are numbers; None where it is to be detected, or times are dates."""
        return self.unit if isinstance(self.unit, str) and self.unit in UNITS else None


@dataclass(frozen=True)
class Stream:
    """Files of one sensor, or of all sensors.

    Attributes:
        files: patterns of the files' paths below the folder; () for all readable files.
        channels: columns of the signals.
        rate: sampling rate, Hz; 0 to measure it by the times.
        time: column of times; None if rows follow each other without gaps.
        label: column of the labels, or None.
        dialect: format of text files.
        max_gap: of one of several streams: for how long values may be missing, seconds; None: as for the data set.
    """

    files: tuple[str, ...]
    channels: tuple[str, ...]
    rate: float
    time: Time | None
    label: str | None
    dialect: Dialect
    max_gap: float | None = None

    def preprocessing(self, common: Preprocessing) -> Preprocessing:
        """Return how one of several streams is put onto an even time axis, given the data set's preprocessing."""
        return replace(
            common,
            rate=self.rate,
            max_gap=common.max_gap if self.max_gap is None else self.max_gap,
            repeated=self.time.repeated if self.time else "",
            resample=False,
            recorded=0.0,
        )


@dataclass(frozen=True)
class Marks:
    """A file of labelled intervals or of events.

    Attributes:
        file: path below the folder; {file}, {folder}, {subject} and {session} stand for those of the recording.
        start, end: columns of times, in the recording's unit where `start` has none; `end` is None for events.
        label: column of the labels.
        subject: column of the subjects, or None.
        dialect: format of a text file.
    """

    file: str
    start: Time
    end: str | None
    label: str
    subject: str | None
    dialect: Dialect

    @property
    def of_part(self) -> bool:
        """Whether marks belong to a subject or session in a file rather than to the whole file."""
        return self.subject is not None or "{subject}" in self.file or "{session}" in self.file


@dataclass(frozen=True)
class Description:
    """Contents of a YAML file.

    Attributes:
        path: the YAML file.
        name: name of the data set.
        folder: folder of the recordings, or one file.
        streams: one, or several that are merged by time.
        subject, session: rules that give subject and session.
        label: rule for the file's name, marks, or None if a column of a stream holds the labels.
        classes: label -> class name, in order; None for all labels found.
        ignore: labels to leave out.
        acceleration: channels that are split into body and gravity.
        preprocessing: parameters of filtering and cutting.
        cut_already: order of axes of files that hold windows, or None.
        test: rule for the recordings to be tested on where the split is 'given'.
        values: the YAML's values.
    """

    path: Path
    name: str
    folder: Path
    streams: tuple[Stream, ...]
    subject: Rule
    session: Rule | None
    label: Rule | Marks | None
    classes: dict[str, str] | None
    ignore: frozenset[str]
    acceleration: tuple[str, ...]
    preprocessing: Preprocessing
    cut_already: str | None
    test: GivenRule
    values: Mapping[str, Any]

    @property
    def channels(self) -> tuple[str, ...]:
        """Channels of all streams."""
        return tuple(channel for stream in self.streams for channel in stream.channels)


def read_description(path: Path) -> Description:
    """Read and check a YAML file.

    Raises:
        UserError: the file is missing or no YAML, a key is unknown or missing, or a value is invalid.
    """
    values = read_yaml(path)
    described = Checked(path, values, REQUIRED, OPTIONAL)
    label, column = _label(described)
    streams = _streams(described, column)
    if isinstance(label, Marks) and label.start.timezone is None:
        zone = next((stream.time.timezone for stream in streams if stream.time and stream.time.timezone), None)
        label = replace(label, start=replace(label.start, timezone=zone))
    channels = [channel for stream in streams for channel in stream.channels]
    limits.check_count(path, len(channels), limits.CHANNELS, "channels", "name fewer in 'columns'")
    acceleration = described.names("acceleration", ())
    for channel in acceleration:
        if channel not in channels:
            raise described.error(f"acceleration '{channel}' is not in 'columns'{suggest(channel, channels)}")
    subject = Rule.read(described, "subject", described.get("subject", "file"))
    session = Rule.read(described, "session", described.values["session"]) if "session" in described else None
    if len(streams) > 1:
        for key, rule in (("subject", subject), ("session", session)):
            if rule is not None and (rule.column or rule.kind == "file"):
                raise described.error(
                    f"with 'streams', '{key}' must be folder or {{pattern: ...}}, to join their files"
                )
    events = isinstance(label, Marks) and label.end is None
    return Description(
        path=path,
        name=described.text("name"),
        folder=path.parent / described.text("folder"),
        streams=streams,
        subject=subject,
        session=session,
        label=label,
        classes=_classes(described),
        ignore=_ignored(described),
        acceleration=acceleration,
        preprocessing=_preprocessing(described, streams, events),
        cut_already=described.choice("cut_already", AXES, None),
        test=_given(described, streams),
        values=values,
    )


def _given(described: Checked, streams: tuple[Stream, ...]) -> GivenRule:
    given = GivenRule(described.path, described.path.parent / described.text("folder"), described.get("test"))
    if given.by_session and (described.get("session") is None or described.get("cut_already")):
        raise described.error("'test': 'sessions' needs the key 'session', and recordings that are not cut already")
    if given.column and (len(streams) > 1 or described.get("cut_already")):
        raise described.error("'test' can name a column of recordings in single files only; name subjects or files")
    return given


def _streams(described: Checked, label: str | None) -> tuple[Stream, ...]:
    dialect = _dialect(described)
    if "streams" not in described:
        if "columns" not in described:
            raise described.error("the key 'columns' is missing; it needs: name, folder, rate, window, columns")
        files = described.get("files", [])
        return (
            Stream(
                _patterns(described, files),
                described.names("columns"),
                described.number("rate", 0.0, 1e-3, limits.RATE),
                _time(described, described.get("time")),
                label,
                dialect,
            ),
        )
    for key in ("columns", "files", "time"):
        if key in described:
            raise described.error(f"with 'streams', '{key}' belongs to each of them")
    listed = described.get("streams")
    if not isinstance(listed, list) or len(listed) < 2:
        raise described.error("'streams' must list two or more, such as {files: '*/ACC.csv', columns: [x, y, z]}")
    streams = []
    for number, values in enumerate(listed, start=1):
        one = Checked(described.path, values, ("files", "columns", "rate"), STREAM, f"stream {number}")
        time = _time(one, one.get("time"))
        rate = one.number("rate", low=1e-3, high=limits.RATE)
        own = _dialect(one) if "dialect" in one else dialect
        files, gap = _patterns(one, one.get("files")), one.number("max_gap", None, 0, limits.MAX_GAP)
        streams.append(Stream(files, one.names("columns"), rate, time, one.column("label", None), own, gap))
    labelled = [stream for stream in streams if stream.label]
    if len(labelled) > 1:
        raise described.error("only one of 'streams' can have the 'label'")
    if label and not labelled:
        raise described.error("with 'streams', a column 'label' belongs to one of them")
    names = [channel for stream in streams for channel in stream.channels]
    if len(set(names)) < len(names):
        raise described.error("'streams' name a column twice; use dialect: {header: [...]} or rename it in the files")
    return tuple(streams)


def _patterns(described: Checked, files: Any) -> tuple[str, ...]:
    patterns = [files] if isinstance(files, str) else files
    if not isinstance(patterns, list) or not all(
        isinstance(p, str) and p.strip() and p.isprintable() for p in patterns
    ):
        raise described.error(f"'files' must be a pattern like '**/*.csv', or a list of them, not {quoted(files)}")
    for pattern in patterns:
        if Path(pattern).is_absolute() or ".." in Path(pattern).parts:
            raise described.error(f"files: {quoted(pattern)} must lie below 'folder'")
    return tuple(patterns)


def _time(described: Checked, value: Any) -> Time | None:
    if value is None:
        return None
    if isinstance(value, str) and value.strip():
        return Time(value)
    if not isinstance(value, dict):
        raise described.error(f"'time' must be a word, or {{column: ..., unit: ms}}, not {quoted(value)}")
    time = Checked(described.path, value, ("column",), ("unit", "timezone", "repeated"), "time")
    repeated = time.choice("repeated", ("average", "error"), None)
    return Time(time.column("column"), _unit(time), _timezone(time), repeated or "")


def _unit(described: Checked) -> str | tuple[str, ...] | None:
    given = described.get("unit")
    if isinstance(given, list) and len(given) > 1 and all(_is_pattern(item) for item in given):
        return tuple(given)
    unit: str | None = None if isinstance(given, list) else described.text("unit", None)
    if isinstance(given, list) or (unit is not None and unit not in UNITS and not _is_pattern(unit)):
        raise described.error(
            f"'unit' must be one of {', '.join(UNITS)}, iso, a pattern like '%d.%m.%Y %H:%M:%S', or a list of two or "
            f"more patterns (or iso) of which each file has one, not {quoted(given)}"
        )
    return unit


def _is_pattern(unit: Any) -> bool:
    return isinstance(unit, str) and (unit == "iso" or "%" in unit)


def _timezone(described: Checked) -> str | None:
    name: str | None = described.text("timezone", None)
    if name is not None:
        import zoneinfo

        try:
            zoneinfo.ZoneInfo(name)
        except (ValueError, OSError, zoneinfo.ZoneInfoNotFoundError) as error:
            raise described.error(f"'timezone' {quoted(name)} is unknown; one is Europe/Berlin") from error
    return name


def _dialect(described: Checked) -> Dialect:
    if "dialect" not in described:
        return Dialect()
    given = Checked(described.path, described.get("dialect"), (), DIALECT, "dialect")
    separator = given.values.get("separator")
    if separator is not None and (not isinstance(separator, str) or len(separator) != 1):
        raise given.error(f"'separator' must be one character, not {quoted(separator)}")
    encoding = given.text("encoding", None)
    if encoding is not None:
        try:
            codecs.lookup(encoding)
        except LookupError as error:
            raise given.error(f"'encoding' {encoding!r} is unknown; common ones are utf-8, utf-16, latin-1") from error
    skip = given.number("skip", None)
    if skip is not None and skip != int(skip):
        raise given.error(f"'skip' must be a whole number of lines, not {skip:g}")
    return Dialect(
        separator,
        given.choice("decimal", (".", ","), None),
        encoding,
        None if skip is None else int(skip),
        given.names("header", None),
    )


def _label(described: Checked) -> tuple[Rule | Marks | None, str | None]:
    """Return the rule or the marks that give the label, and the column that does."""
    value = described.get("label", "y")
    if isinstance(value, str | int) and not isinstance(value, bool):
        column = described.column("label", "y")
        return None, (column if "label" in described or "streams" not in described else None)
    if not isinstance(value, dict) or len(set(value) & {"column", "pattern", "from", "table", "events"}) != 1:
        raise described.error(
            "'label' must be a word, the name of a column, or one of {pattern: ...}, {from: file}, {from: folder}, "
            f"{{table: ...}}, {{events: ...}}, not {quoted(value)}"
        )
    if "column" in value:
        return None, Checked(described.path, value, ("column",), (), "label").column("column")
    if "from" in value:
        rule = Checked(described.path, value, ("from",), (), "label").choice("from", ("file", "folder"))
        return Rule.read(described, "label", rule), None
    if "pattern" in value:
        return Rule.read(described, "label", value), None
    kind = "table" if "table" in value else "events"
    columns = ("start", "end") if kind == "table" else ("time", "before")
    marks = Checked(
        described.path, value, (kind,), (*columns, "label", "subject", "unit", "timezone", "dialect"), "label"
    )
    start = marks.column("start", "start") if kind == "table" else marks.column("time", "time")
    return (
        Marks(
            _patterns(marks, marks.text(kind))[0],
            Time(start, _unit(marks), _timezone(marks)),
            marks.column("end", "end") if kind == "table" else None,
            marks.column("label", "label"),
            marks.column("subject", None),
            _dialect(marks),
        ),
        None,
    )


def _classes(described: Checked) -> dict[str, str] | None:
    """Return label -> class name, in the order of classes; None to take all labels found."""
    given = described.get("classes")
    if given is None:
        return None
    pairs = given.items() if isinstance(given, dict) else [(v, v) for v in given] if isinstance(given, list) else ()
    if any(isinstance(label, bool) or label is None for label, _ in pairs):
        raise described.error(
            "YAML reads yes, no, on, off and null in 'classes' as true, false and nothing; quote them"
        )
    names = {label_text(str(label)): str(name) for label, name in pairs}
    for name in names.values():
        if not can_be_shown(name):
            raise described.error(f"'classes': {quoted(name)} cannot be a name: {NAMES}")
    if len(set(names.values())) < 2:
        raise described.error("'classes' must list two or more labels, or map labels to names")
    limits.check_count(described.path, len(names), limits.CLASSES, "classes", "list fewer")
    if len(names) < len(list(pairs)):
        raise described.error("'classes' lists a label twice (3, 3.0 and 03 are one)")
    return names


def _ignored(described: Checked) -> frozenset[str]:
    given = described.get("ignore", [])
    if not isinstance(given, list) or any(isinstance(label, bool | list | dict | None) for label in given):
        raise described.error(
            f"'ignore' must be a list of labels to leave out, quoted where they are yes or no: {quoted(given)}"
        )
    return frozenset(label_text(str(label)) for label in given)


def _preprocessing(described: Checked, streams: tuple[Stream, ...], events: bool) -> Preprocessing:
    recorded = described.number("rate", 0.0, 1e-3, limits.RATE)
    resample = described.number("resample", 0.0, 1e-3, limits.RATE)
    timed = all(stream.time is not None or stream.rate for stream in streams)
    if not recorded and not (resample and timed):
        raise described.error(
            "the key 'rate' is missing; it needs: name, folder, rate, window, columns ('rate' can be left out where "
            "recordings with a 'time' are brought to one rate with 'resample')"
        )
    rate = resample or recorded
    filters = Checked(described.path, described.get("filters", {}), (), FILTERS, "filters")
    median = filters.number("median", 0.0, 0, limits.MEDIAN + 1)
    if median != int(median) or (median and median % 2 == 0):
        raise described.error(f"'median' must be an odd number of samples, or 0, not {median:g}")
    time, label = described.get("time"), described.get("label")
    before = None
    if events:
        before = Checked(described.path, {"before": label.get("before", 0)}, (), ("before",), "label").number("before")
    window = _window(described, rate)
    if before is not None and round(before * rate) >= window:
        raise described.error(f"label: 'before' must be less than the window of {window / rate:g} s, not {before:g}")
    return Preprocessing(
        rate=rate,
        window=window,
        overlap=described.number("overlap", 0.5, 0, 1),
        median=int(median),
        lowpass=filters.number("lowpass", 0.0, 0, rate / 2),
        gravity=filters.number("gravity", 0.0, 0, rate / 2),
        max_gap=described.number("max_gap", Preprocessing.max_gap, 0, limits.MAX_GAP),
        resample=bool(resample),
        recorded=recorded if resample else 0.0,
        repeated=(time.get("repeated") or "") if isinstance(time, dict) else "",
        purity=_purity(described),
        before=before,
    )


def _purity(described: Checked) -> float:
    value: float = described.number("purity", 0.0)
    if value > 1:
        raise described.error(f"'purity' is a share, at most 1, not {value:g}")
    return value


def _window(described: Checked, rate: float) -> int:
    """Return the samples of a window; see `window_samples`."""
    value = described.get("window")
    try:
        return window_samples(value, rate)
    except ValueError as error:
        raise described.error(f"'window' must be seconds, or '128 samples': {error}") from error
