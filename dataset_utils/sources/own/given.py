"""Which of the user's own recordings are to be tested on, where the split is 'given'."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dataset_utils.sources.own.labels import Text
from registry.errors import UserError
from registry.parameters import suggest

FORMS = "{subjects: [p3, p7]}, {files: [p1_evening]} or {column: part, values: [test]}"


class GivenRule:
    """The key `test` of a description.

    Args:
        path: of the YAML file, for messages.
        rule: the key's value; None where it is missing.

    Attributes:
        column: CSV column or .npz array whose values tell test rows from others, or None.

    Raises:
        UserError: it has none of the forms that there are.
    """

    def __init__(self, path: Path, rule: Any) -> None:
        self.path = path
        keys = set(rule) if isinstance(rule, dict) else set()
        if rule is not None and keys not in ({"subjects"}, {"files"}, {"column", "values"}):
            raise UserError(f"{path}: 'test' must be {FORMS}, not {rule!r}")
        given: dict[str, Any] = rule or {}
        self.column = str(given["column"]) if "column" in given else None
        self._subjects, self._files, self._values = (self._texts(given, key) for key in ("subjects", "files", "values"))
        self._seen: dict[str, None] = {}

    def _texts(self, given: dict[str, Any], key: str) -> tuple[str, ...]:
        values = given.get(key)
        if key in given and (not isinstance(values, list) or not values):
            raise UserError(f"{self.path}: 'test': '{key}' must be a list with something in it, not {values!r}")
        return tuple(str(value).strip() for value in values or ())

    def check_files(self, files: Sequence[Path]) -> None:
        """Raises UserError for a file that is named, but not there."""
        there = [name for file in files for name in _names(file)]
        for name in self._files:
            if name not in there:
                raise UserError(
                    f"{self.path}: 'test' names the file '{name}', which is not there{suggest(name, there)}"
                )

    def rows(self, file: Path, parts: Text | None, rows: int) -> np.ndarray:
        """(rows,), bool: which rows of a file its name or the column say are to be tested on."""
        if parts is not None:
            return np.isin(np.array(parts.values), self._values)[parts.codes]
        return np.full(rows, any(name in self._files for name in _names(file)))

    def names(self, subject: str) -> bool:
        """Whether all of a subject is to be tested on."""
        self._seen.setdefault(subject)
        return subject in self._subjects

    def check_subjects(self) -> tuple[()]:
        """Nothing. Raises UserError for a subject that is named, but of whom nothing was read."""
        for name in self._subjects:
            if name not in self._seen:
                raise UserError(f"{self.path}: 'test' names the subject '{name}', of whom there is no recording")
        return ()


def _names(file: Path) -> tuple[str, str, str]:
    """What a file may be called: with its endings, without the last, without any."""
    return file.name, file.stem, file.name.partition(".")[0]
