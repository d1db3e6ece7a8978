"""Reading of recordings that are already cut into windows."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dataset_utils.recording import UNLABELLED, Windows
from dataset_utils.sources.own.containers import as_text, open_arrays
from dataset_utils.sources.own.description import AXES, Description
from dataset_utils.sources.own.labels import Text, indexed
from dataset_utils.sources.own.naming import Rule
from dataset_utils.time_axis import step_of
from registry.errors import UserError


def read_windows(
    file: Path, root: Path, described: Description, names: Mapping[str, str], classes: tuple[str, ...]
) -> Windows:
    """Read the windows of an .npz, .npy, .mat or .h5 file: `x` of three axes, and a label and a subject for each.

    Windows of a subject in a file are taken to follow each other at the described `overlap`, so that a split in time
    knows which of them share samples.

    Raises:
        UserError: the file is damaged, or a shape, label or subject is missing or does not fit the description.
    """
    (stream,) = described.streams
    arrays = open_arrays(file, tuple(filter(None, (stream.label, described.subject.column))), stream.dialect)
    if "x" not in arrays:
        raise UserError(f"{file}: has no array 'x' of windows; it has: {', '.join(arrays)}")
    x = np.asarray(arrays["x"])
    if x.ndim == 4 and x.shape[2] == 1 and described.cut_already == AXES[0]:
        x = x[:, :, 0]
    if x.ndim == 3 and described.cut_already == AXES[1]:
        x = x.transpose(0, 2, 1)
    settings = described.preprocessing
    wanted = (len(stream.channels), settings.window)
    if x.ndim != 3 or x.shape[1:] != wanted or x.dtype.kind not in "fiu" or not len(x):
        raise UserError(
            f"{file}: x has shape {np.shape(arrays['x'])}, type {x.dtype}; with cut_already: {described.cut_already} "
            f"it must be numbers, {wanted[0]} channels of {wanted[1]} samples in each window"
        )
    bad = int(np.count_nonzero(~np.isfinite(x).all(axis=(1, 2))))
    if bad:
        raise UserError(f"{file}: {bad} of {len(x)} windows hold NaN or infinite values; remove them")
    label = _text(described.label, stream.label, file, root, arrays, len(x), "label")
    who = _text(described.subject, described.subject.column, file, root, arrays, len(x), "subject")
    found = indexed(label, names, classes, described.ignore)
    dropped = sum(found.left_out.values()) - found.left_out.get("no label", 0)
    missing = int(np.count_nonzero(found.labels == UNLABELLED)) - dropped
    if missing:
        odd = ", ".join(f"'{text}' ({count})" for text, count in found.unlisted.items()) or "none at all"
        raise UserError(f"{file}: {missing} of {len(x)} windows have no label that is listed: {odd}")
    if dropped:
        warnings.warn(f"{file}: {dropped} of {len(x)} windows are left out, as 'ignore' says", stacklevel=2)
    order = np.argsort(who.codes, kind="stable")
    stretch = who.codes[order].astype(np.int64)
    start = np.concatenate([np.arange(n) for n in np.bincount(who.codes, minlength=len(who.values))])
    of_subject = np.array([described.test.names(name) for name in who.values])
    test = described.test.rows(file, None, len(x)) | of_subject[who.codes]
    kept = found.labels[order] != UNLABELLED
    order, stretch, start = order[kept], stretch[kept], start[kept]
    return Windows(
        x=np.ascontiguousarray(x[order][:, :, None], dtype=np.float32),
        y=found.labels[order],
        subject=stretch,
        stretch=stretch,
        start=start.astype(np.int64) * step_of(settings.window, settings.overlap),
        subjects=who.values,
        test=test[order].astype(np.int8),
    )


def _text(
    rule: object, column: str | None, file: Path, root: Path, arrays: Mapping[str, object], rows: int, what: str
) -> Text:
    """Return the label or the subject of each window."""
    if column is None:
        assert isinstance(rule, Rule)
        return Text.constant(rule.of(file, root), rows)
    if column not in arrays:
        raise UserError(f"{file}: has no array '{column}' of the {what} of each window; it has: {', '.join(arrays)}")
    text = as_text(file, column, np.asarray(arrays[column]).squeeze())
    if len(text.codes) != rows or "" in text.counts():
        raise UserError(f"{file}: {column} must hold one {what} for each of {rows} windows")
    return text
