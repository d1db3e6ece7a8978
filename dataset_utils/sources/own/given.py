"""Rule for which of the user's own recordings are tested on where the split is 'given'."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset_utils.sources.own.checked import quoted
from dataset_utils.sources.own.labels import Text, label_text
from dataset_utils.sources.own.naming import stem
from registry.errors import UserError
from registry.parameters import suggest
from registry.text import spelt_alike

FORMS = "{subjects: [p3, p7]}, {sessions: [v2]}, {files: [p1_evening]} or {column: part, values: [test]}"


class GivenRule:
    """The key `test` of a description.

    Args:
        path: the YAML file, for messages.
        folder: folder of the recordings.
        rule: value of the key; None where it is missing.

    Attributes:
        column: CSV column or .npz array whose values tell test rows from others, or None.

    Raises:
        UserError: the value has none of `FORMS`.
    """

    def __init__(self, path: Path, folder: Path, rule: Any) -> None:
        self.path, self.folder = path, folder
        keys = set(rule) if isinstance(rule, dict) else set()
        if rule is not None and keys not in ({"subjects"}, {"sessions"}, {"files"}, {"column", "values"}):
            raise UserError(f"{path}: 'test' must be {FORMS}, not {quoted(rule)}")
        given: dict[str, Any] = rule or {}
        column = given.get("column")
        if "column" in given and (isinstance(column, bool) or not isinstance(column, str | int)):
            raise UserError(f"{path}: 'test': 'column' must be a word, not {quoted(column)}")
        self.column = str(column) if "column" in given else None
        self._files, self._values = (self._texts(given, key) for key in ("files", "values"))
        self._named = {key: self._texts(given, key) for key in ("subjects", "sessions")}
        self._seen: dict[str, dict[str, None]] = {key: {} for key in self._named}
        self._values_seen: dict[str, None] = {}

    def _texts(self, given: dict[str, Any], key: str) -> tuple[str, ...]:
        values = given.get(key)
        if key in given and (not isinstance(values, list) or not values):
            raise UserError(f"{self.path}: 'test': '{key}' must be a list with something in it, not {quoted(values)}")
        if any(isinstance(value, bool) or value is None for value in values or ()):
            raise UserError(
                f"{self.path}: YAML reads yes, no, on, off and null in 'test' as true, false and nothing; quote them"
            )
        texts = map(str, values or ())
        return tuple(label_text(text) if key == "values" else spelt_alike(text.strip()) for text in texts)

    def check_files(self, files: Sequence[Path]) -> None:
        """Raise UserError for a name of no file, or of several."""
        for name in self._files:
            named = [file for file in files if name in self._names(file)]
            if not named:
                there = [other for file in files for other in self._names(file)]
                raise UserError(
                    f"{self.path}: 'test' names the file '{name}', which is not there{suggest(name, there)}"
                )
            if len(named) > 1:
                paths = " and ".join(self._names(file)[0] for file in named[:2])
                raise UserError(f"{self.path}: 'test' names the file '{name}', which {paths} are; write the path")

    def rows(self, file: Path, parts: Text | None, rows: int) -> np.ndarray:
        """Return which rows of a file are to be tested on by its name or by the column, (rows,), bool."""
        if parts is None:
            return np.full(rows, any(name in self._files for name in self._names(file)))
        values = [label_text(value) for value in parts.values]
        self._values_seen.update(dict.fromkeys(values))
        tested: np.ndarray = np.isin(np.array(values, dtype=str), self._values)[parts.codes]
        return tested

    def _names(self, file: Path) -> tuple[str, ...]:
        """Return the names of a file: its path below the folder and its name, each with and without endings."""
        path = file.relative_to(self.folder) if self.folder in file.parents else Path(file.name)
        names = path.as_posix(), path.with_name(stem(file)).as_posix(), file.name, stem(file)
        return tuple(map(spelt_alike, names))

    @property
    def by_session(self) -> bool:
        """Tell whether sessions are named."""
        return bool(self._named["sessions"])

    def names(self, subject: str, session: str = "") -> bool:
        """Return whether all recordings of a subject, or all of a session, are to be tested on."""
        found = {"subjects": spelt_alike(subject), "sessions": spelt_alike(session)}
        for key, value in found.items():
            self._seen[key].setdefault(value)
        return any(value in self._named[key] for key, value in found.items())

    def check_seen(self) -> tuple[()]:
        """Raise UserError for a named subject, session or value of which nothing was read; return nothing."""
        for key, names in self._named.items():
            for name in names:
                if name not in self._seen[key]:
                    raise UserError(
                        f"{self.path}: 'test' names the {key[:-1]} '{name}', of which there is no recording"
                        f"{suggest(name, self._seen[key])}"
                    )
        for value in self._values:
            if value not in self._values_seen:
                raise UserError(
                    f"{self.path}: 'test' names the value '{value}', which column '{self.column}' never has"
                    f"{suggest(value, self._values_seen)}"
                )
        return ()
