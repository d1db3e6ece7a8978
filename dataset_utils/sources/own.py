"""The user's own recordings: a folder of .csv or .npz files, described by a short YAML (docs/datasets.md)."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dataset_utils.recording import UNLABELLED, Preprocessing, Recording, Source
from dataset_utils.sources import own_files
from dataset_utils.sources.own_given import GivenRule
from registry.errors import UserError
from registry.parameters import suggest

REQUIRED = ("name", "folder", "rate", "window", "columns")
OPTIONAL = ("label", "overlap", "time", "subject", "classes", "acceleration", "filters", "max_gap", "test")
FILTERS = ("median", "lowpass", "gravity")
NO_LABEL = ("", "nan", "-1")
"""Labels of what is to be discarded."""


def load_source(yaml_path: Path) -> Source:
    """The data set that a YAML file describes.

    Raises:
        UserError: no such file, no YAML, an unknown or missing key, or a value that makes no sense.
    """
    try:
        described = yaml.safe_load(yaml_path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{yaml_path}: cannot be read ({error.strerror or error})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{yaml_path}: is no YAML ({' '.join(str(error).split())})") from error
    if not isinstance(described, dict):
        raise UserError(f"{yaml_path}: must hold keys and values; see docs/datasets.md")
    return OwnData(yaml_path, described)


class OwnData(Source):
    """A folder of the user's recordings."""

    def __init__(self, yaml_path: Path, described: dict[str, Any]) -> None:
        self.yaml = _Checked(yaml_path, described)
        self.name = self.yaml.text("name")
        self.folder = yaml_path.parent / self.yaml.text("folder")
        self.channels = self.yaml.names("columns")
        self.acceleration = self.yaml.names("acceleration", default=())
        for channel in self.acceleration:
            if channel not in self.channels:
                hint = suggest(channel, self.channels)
                raise UserError(f"{yaml_path}: acceleration '{channel}' is none of columns{hint}")
        self.preprocessing = _preprocessing(self.yaml)
        self.subject = _SubjectRule(self.yaml)
        self.test = GivenRule(yaml_path, described.get("test"))
        self.layout = own_files.Layout(
            self.channels,
            self.yaml.text("label", default="y"),
            self.yaml.text("time", default=None),
            self.subject.column,
            self.test.column,
        )
        self.named = _class_names(self.yaml)

    @functools.cached_property
    def classes(self) -> tuple[str, ...]:
        """The class names; where the YAML gives none, the distinct labels, numbers in their order."""
        return tuple(dict.fromkeys(self._label_names.values()))

    def description(self) -> dict[str, Any]:
        """The whole YAML: whatever is changed there may change the windows."""
        return self.yaml.values

    def find(self, raw: Path | None, data_root: Path, download: bool) -> Path:
        """The folder that the YAML names."""
        if raw is not None:
            raise UserError(f"--raw {raw}: leave it out; {self.yaml.path} says where the data are ('folder')")
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: there is no such folder; correct 'folder' in {self.yaml.path}")
        return self.folder

    def files(self, path: Path) -> list[Path]:
        """See `Source.files`."""
        found = sorted(file for kind in own_files.READERS for file in path.glob(f"*{kind}"))
        if not found:
            raise UserError(f"{path}: holds no {' or '.join(own_files.READERS)} file")
        return found

    def load(self, path: Path) -> Iterator[Recording]:
        """One recording a file, or a run of one subject's rows where the subject is a column."""
        number = {name: index for index, name in enumerate(self.classes)}
        names = self._label_names
        labelled = False
        self.test.check_files(self.files(path))
        for file in self.files(path):
            table = own_files.read(file, self.layout)
            values, inverse = np.unique(table.labels, return_inverse=True)
            indices = [number[names[v]] if (v := label_text(text)) in names else UNLABELLED for text in values]
            labels = np.array(indices, dtype=np.int64)[inverse]
            labelled |= bool((labels != UNLABELLED).any())
            tested = self.test.rows(file, table.parts, len(labels))
            changes = tested[1:] != tested[:-1]
            if table.subjects is not None:
                changes |= table.subjects[1:] != table.subjects[:-1]
            for piece in np.split(np.arange(len(labels)), np.flatnonzero(changes) + 1):
                time = None if table.time is None else table.time[piece]
                subject = self.subject.of(file) if table.subjects is None else label_text(table.subjects[piece[0]])
                test = bool(tested[piece[0]]) or self.test.names(subject)
                yield Recording(subject, table.signals[piece], labels[piece], time, test)
        self.test.check_subjects()
        if not labelled:
            raise UserError(f"{self.yaml.path}: none of 'classes' is a label in {path}; it has {_some(values)}")

    @functools.cached_property
    def _label_names(self) -> dict[str, str]:
        """Label -> class name, in the order of classes."""
        if self.named is not None:
            return self.named
        labels = set()
        for file in self.files(self.folder):
            labels |= {label_text(text) for text in own_files.read_labels(file, self.layout)}
        labels -= set(NO_LABEL)
        if len(labels) < 2:
            raise UserError(f"{self.folder}: '{self.layout.label}' holds fewer than two distinct labels")
        return {label: label for label in sorted(labels, key=_numbers_first)}


class _SubjectRule:
    """Whose recording a file is: its whole name, a part of it, or what a column says."""

    def __init__(self, described: _Checked) -> None:
        rule = described.values.get("subject", "file")
        self.path = described.path
        self.column: str | None = None
        self.pattern = re.compile("(.*)")
        if rule == "file":
            return
        if not isinstance(rule, dict) or len(rule) != 1 or not set(rule) <= {"pattern", "column"}:
            raise UserError(f"{self.path}: 'subject' must be file, {{pattern: ...}} or {{column: ...}}, not {rule!r}")
        (kind, value), *_ = rule.items()
        if kind == "column":
            self.column = str(value)
            return
        try:
            self.pattern = re.compile(str(value))
        except re.error as error:
            raise UserError(f"{self.path}: subject pattern {value!r} is no regular expression ({error})") from error
        if self.pattern.groups != 1:
            raise UserError(f"{self.path}: subject pattern {value!r} needs one group in brackets, like 'S([0-9]+)_'")

    def of(self, file: Path) -> str:
        """The subject of a file."""
        hit = self.pattern.search(file.stem)
        if hit is None or not hit[1]:
            raise UserError(
                f"{file}: its name does not fit the subject pattern '{self.pattern.pattern}' in {self.path}"
            )
        return hit[1]


class _Checked:
    """The values of a YAML file, each fetched with its check."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path, self.values = path, values
        known = REQUIRED + OPTIONAL
        for key in values:
            if key not in known:
                hint = suggest(str(key), known)
                raise UserError(f"{path}: unknown key '{key}'{hint}; it has: {', '.join(known)}")
        for key in REQUIRED:
            if key not in values:
                raise UserError(f"{path}: the key '{key}' is missing; it needs: {', '.join(REQUIRED)}")

    def text(self, key: str, default: Any = ...) -> Any:
        value = self.values.get(key, default)
        if value is not default and not (isinstance(value, str) and value.strip()):
            raise UserError(f"{self.path}: '{key}' must be a word, not {value!r}")
        return value

    def names(self, key: str, default: Any = ...) -> tuple[str, ...]:
        value = self.values.get(key, default)
        if value is default:
            return value
        if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
            raise UserError(f"{self.path}: '{key}' must be a list of column names like [ax, ay, az], not {value!r}")
        if len(set(value)) < len(value):
            raise UserError(f"{self.path}: '{key}' names a column twice")
        return tuple(value)

    def number(self, key: str, value: Any, low: float, high: float = math.inf) -> float:
        """`value`, at least `low` and below `high`."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
            limits = f"of at least {low:g}" + (f" and below {high:g}" if high < math.inf else "")
            raise UserError(f"{self.path}: '{key}' must be a number {limits}, not {value!r}")
        return float(value)


def _preprocessing(described: _Checked) -> Preprocessing:
    values = described.values
    rate = described.number("rate", values["rate"], 1e-3)
    window = round(described.number("window", values["window"], 2 / rate) * rate)
    filters = values.get("filters", {})
    if not isinstance(filters, dict):
        raise UserError(f"{described.path}: 'filters' must be like {{median: 3, lowpass: 20, gravity: 0.3}}")
    for key in filters:
        if key not in FILTERS:
            raise UserError(f"{described.path}: unknown filter '{key}'{suggest(str(key), FILTERS)}")
    median = described.number("median", filters.get("median", 0), 0)
    if median != int(median) or (median and median % 2 == 0):
        raise UserError(f"{described.path}: 'median' must be an odd number of samples, or 0, not {median:g}")
    return Preprocessing(
        rate=rate,
        window=window,
        overlap=described.number("overlap", values.get("overlap", 0.5), 0, 1),
        median=int(median),
        lowpass=described.number("lowpass", filters.get("lowpass", 0), 0, rate / 2),
        gravity=described.number("gravity", filters.get("gravity", 0), 0, rate / 2),
        max_gap=described.number("max_gap", values.get("max_gap", Preprocessing.max_gap), 0),
    )


def _class_names(described: _Checked) -> dict[str, str] | None:
    """Label text -> class name, in the order of classes; None where the data shall tell."""
    given = described.values.get("classes")
    if given is None:
        return None
    pairs = given.items() if isinstance(given, dict) else [(v, v) for v in given] if isinstance(given, list) else ()
    if any(isinstance(label, bool) for label, _ in pairs):
        raise UserError(f"{described.path}: YAML reads yes, no, on and off in 'classes' as true and false; quote them")
    names = {label_text(str(label)): str(name) for label, name in pairs}
    if len(set(names.values())) < 2:
        raise UserError(f"{described.path}: 'classes' must list two or more labels, or map labels to names")
    return names


def _some(labels: np.ndarray) -> str:
    return ", ".join(repr(str(label)) for label in labels[:5])


def label_text(text: str) -> str:
    """A label as it is compared: '3.0' and '03' are 3."""
    text = str(text).strip()
    try:
        value = float(text)
    except ValueError:
        return text
    return str(int(value)) if math.isfinite(value) and value == int(value) else text.lower()


def _numbers_first(text: str) -> tuple[float, str]:
    try:
        return float(text), ""
    except ValueError:
        return math.inf, text
