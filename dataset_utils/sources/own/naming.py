"""Names of files, and rules that read subject, session and label from them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset_utils.sources.own.checked import Checked
from registry.errors import UserError

PACKED = (".gz", ".zip")


def ending(file: Path) -> str:
    """Return the ending of a file's name in lower case, without that of its compression: '.csv' of 'S1.CSV.gz'."""
    name = file.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return Path(name).suffix


def stem(file: Path) -> str:
    """Return a file's name without endings: 'S1' of 'S1.CSV.gz'."""
    name = file.name
    for suffix in (*PACKED, ending(file)):
        if suffix and name.lower().endswith(suffix):
            name = name[: -len(suffix)]
    return name


@dataclass(frozen=True)
class Rule:
    """Rule by which a value is read from a file.

    Attributes:
        kind: 'file' (the file's name), 'folder' (the name of its folder), 'pattern' or 'column'.
        value: the regular expression, or the column.
        where: the key and the YAML file, for messages.
    """

    kind: str
    value: str
    where: str

    @staticmethod
    def read(described: Checked, key: str, value: Any) -> Rule:
        """Check a value of the YAML: file, folder, {pattern: ...} or {column: ...}. Raises UserError."""
        where = f"the {key} pattern in {described.path}"
        if value in ("file", "folder"):
            return Rule(value, "", where)
        if not isinstance(value, dict) or len(value) != 1 or not set(value) <= {"pattern", "column"}:
            raise described.error(f"'{key}' must be file, folder, {{pattern: ...}} or {{column: ...}}, not {value!r}")
        ((kind, text),) = value.items()
        if isinstance(text, bool) or not isinstance(text, str | int) or not str(text).strip():
            raise described.error(f"{key}: '{kind}' must be a word, not {text!r}")
        text = str(text)
        if kind == "pattern":
            try:
                groups = re.compile(text).groups
            except re.error as error:
                raise described.error(f"{key} pattern {text!r} is no regular expression ({error})") from error
            if groups != 1:
                raise described.error(f"{key} pattern {text!r} needs one group in brackets, like 'S([0-9]+)_'")
        return Rule(kind, text, where)

    @property
    def column(self) -> str | None:
        """The column that holds the value, or None if the file's name does."""
        return self.value if self.kind == "column" else None

    def of(self, file: Path, root: Path) -> str:
        """Return the value in the name of a file below `root`. Raises UserError if it does not fit the pattern.

        A pattern with a slash is searched in the path below `root`, without ending; any other one in the name.
        """
        if self.kind == "file":
            return stem(file)
        if self.kind == "folder":
            return file.parent.name
        inside = file.relative_to(root).parent / stem(file) if "/" in self.value else Path(stem(file))
        hit = re.search(self.value, inside.as_posix())
        if hit is None or not hit[1]:
            raise UserError(f"{file}: its name does not fit {self.where}: '{self.value}'")
        return hit[1]
