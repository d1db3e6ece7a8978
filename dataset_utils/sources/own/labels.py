"""Labels in files, and their classes."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from dataset_utils.recording import UNLABELLED
from registry.errors import UserError

NUMBER = re.compile(r"[-+]?[0-9]+(\.0*)?")
"""Numbers that are the same label in any spelling: 3, 3.0, 03."""


@dataclass(frozen=True)
class Text:
    """A column of text.

    Attributes:
        codes: (rows,), int, index into `values`.
        values: the distinct texts, without surrounding blanks; '' for empty cells.
    """

    codes: np.ndarray
    values: tuple[str, ...]

    @staticmethod
    def of(values: Iterable[str]) -> Text:
        """Return a column of these texts, one for each row."""
        names, codes = np.unique(np.asarray([str(value).strip() for value in values], dtype=str), return_inverse=True)
        return Text(codes.astype(np.int32), tuple(str(name) for name in names))

    @staticmethod
    def of_array(array: np.ndarray) -> Text:
        """Return a column of an array of text or numbers; NaN counts as empty."""
        if array.dtype.kind == "f":
            names, codes = np.unique(array, return_inverse=True)
            texts = ["" if math.isnan(name) else label_text(repr(float(name))) for name in names]
        else:
            names, codes = np.unique(array, return_inverse=True)
            texts = [name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in names]
        return Text(codes.astype(np.int32), tuple(text.strip() for text in texts))

    @staticmethod
    def constant(value: str, rows: int) -> Text:
        """Return a column with the same text in every row."""
        return Text(np.zeros(rows, dtype=np.int32), (value,))

    def counts(self) -> dict[str, int]:
        """Return text -> number of rows."""
        total: Counter[str] = Counter()
        for value, count in zip(self.values, np.bincount(self.codes, minlength=len(self.values)), strict=True):
            if count:
                total[value] += int(count)
        return dict(total)

    def take(self, rows: np.ndarray | slice) -> Text:
        """Return some of the rows."""
        return Text(self.codes[rows], self.values)


def label_text(text: str) -> str:
    """Return the form in which labels are compared: 3, 3.0 and 03 are equal, surrounding blanks do not count."""
    text = text.strip()
    return str(int(float(text))) if NUMBER.fullmatch(text) and len(text) < 16 else text


def class_names(found: Iterable[str], ignore: frozenset[str], where: str) -> dict[str, str]:
    """Return label -> class name (the same) of the labels found where no classes are listed, numbers in order.

    Raises:
        UserError: there are fewer than two, some differ in case only, or -1 is among them, which may mean 'no label'.
    """
    labels = {label_text(label) for label in found} - ignore - {""}
    folded: dict[str, list[str]] = defaultdict(list)
    for label in sorted(labels):
        folded[label.casefold()].append(label)
    for same in folded.values():
        if len(same) > 1:
            raise UserError(
                f"{where}: the labels {' and '.join(map(repr, same))} differ in upper and lower case only; if they are "
                f"one class, say classes: {{{', '.join(f'{label}: {same[0]}' for label in same)}, ...}}"
            )
    if "-1" in labels:
        raise UserError(
            f"{where}: the label -1 may be a class or mean 'no label'; list the 'classes', or say ignore: [-1]"
        )
    if len(labels) < 2:
        found_ones = ", ".join(map(repr, sorted(labels))) or "none"
        raise UserError(f"{where}: fewer than two distinct labels ({found_ones}); correct 'label' or 'ignore'")
    return {label: label for label in sorted(labels, key=_numbers_first)}


@dataclass(frozen=True)
class Indexed:
    """Class indices of labels, and counts of labels that are no class.

    Attributes:
        labels: (rows,), int64, class index or UNLABELLED.
        left_out: reason why rows are UNLABELLED -> number of rows.
        unlisted: label that is neither listed nor ignored -> number of rows.
    """

    labels: np.ndarray
    left_out: dict[str, int]
    unlisted: dict[str, int]


def indexed(text: Text, names: Mapping[str, str], classes: tuple[str, ...], ignore: frozenset[str]) -> Indexed:
    """Return the class index of each row."""
    number = {name: index for index, name in enumerate(classes)}
    table = np.full(len(text.values), UNLABELLED, dtype=np.int64)
    for code, value in enumerate(text.values):
        label = label_text(value)
        if label in names:
            table[code] = number[names[label]]
    left_out: Counter[str] = Counter()
    unlisted: Counter[str] = Counter()
    for value, count in text.counts().items():
        label = label_text(value)
        if label in names:
            continue
        if label == "":
            left_out["no label"] += count
        elif label in ignore:
            left_out[f"label '{label}' is to be ignored"] += count
        else:
            unlisted[label] += count
    return Indexed(table[text.codes], dict(left_out), dict(unlisted))


def _numbers_first(text: str) -> tuple[float, str]:
    try:
        return float(text), ""
    except ValueError:
        return math.inf, text
