"""Labels as they stand in files, and the classes that they are."""

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
"""Numbers that are one label however they are written: 3, 3.0, 03."""


@dataclass(frozen=True)
class Text:
    """A column of text.

    Attributes:
        codes: (rows,), int, index into `values`.
        values: the distinct texts, without blanks around; '' where a cell is empty.
    """

    codes: np.ndarray
    values: tuple[str, ...]

    @staticmethod
    def of(values: Iterable[str]) -> Text:
        """Of one text a row."""
        names, codes = np.unique(np.asarray([str(value).strip() for value in values], dtype=str), return_inverse=True)
        return Text(codes.astype(np.int32), tuple(str(name) for name in names))

    @staticmethod
    def of_array(array: np.ndarray) -> Text:
        """Of an array of text or numbers; NaN is empty."""
        if array.dtype.kind == "f":
            names, codes = np.unique(array, return_inverse=True)
            texts = ["" if math.isnan(name) else label_text(repr(float(name))) for name in names]
        else:
            names, codes = np.unique(array, return_inverse=True)
            texts = [name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in names]
        return Text(codes.astype(np.int32), tuple(text.strip() for text in texts))

    @staticmethod
    def constant(value: str, rows: int) -> Text:
        """The same text in every row."""
        return Text(np.zeros(rows, dtype=np.int32), (value,))

    def counts(self) -> dict[str, int]:
        """Text -> rows that have it."""
        total: Counter[str] = Counter()
        for value, count in zip(self.values, np.bincount(self.codes, minlength=len(self.values)), strict=True):
            if count:
                total[value] += int(count)
        return dict(total)

    def take(self, rows: np.ndarray | slice) -> Text:
        """Some rows."""
        return Text(self.codes[rows], self.values)


def label_text(text: str) -> str:
    """A label as it is compared: 3, 3.0 and 03 are one, blanks around do not count."""
    text = text.strip()
    return str(int(float(text))) if NUMBER.fullmatch(text) and len(text) < 16 else text


def class_names(found: Iterable[str], ignore: frozenset[str], where: str) -> dict[str, str]:
    """Label -> class name, the same, of the labels found where none are listed; numbers in their order.

    Raises:
        UserError: fewer than two, some differ in case only, or -1, of which nobody knows whether it is a class.
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
            f"{where}: the label -1 is a class to some and 'no label' to others; list the 'classes', or say "
            "ignore: [-1]"
        )
    if len(labels) < 2:
        raise UserError(f"{where}: fewer than two distinct labels ({', '.join(map(repr, sorted(labels))) or 'none'})")
    return {label: label for label in sorted(labels, key=_numbers_first)}


@dataclass(frozen=True)
class Indexed:
    """Class indices of labels, and what is none.

    Attributes:
        labels: (rows,), int64, class index or UNLABELLED.
        left_out: why rows are UNLABELLED -> how many.
        unlisted: label that is neither listed nor ignored -> rows.
    """

    labels: np.ndarray
    left_out: dict[str, int]
    unlisted: dict[str, int]


def indexed(text: Text, names: Mapping[str, str], classes: tuple[str, ...], ignore: frozenset[str]) -> Indexed:
    """The class index of each row of labels."""
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
