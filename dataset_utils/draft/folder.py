"""The files of a folder that can be read, of a bounded number, and those that are looked into."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from dataset_utils.counts import many, some
from dataset_utils.files import check_listable, is_file, is_folder, state_of
from dataset_utils.sources.own.inventory import companions
from dataset_utils.sources.own.naming import ending
from dataset_utils.sources.own.reading import READERS
from registry.errors import UserError
from registry.text import natural, shown

FILES = 20_000
"""Most files of a folder that are listed."""

T = TypeVar("T")


@dataclass(frozen=True)
class Listed:
    """Files of a folder.

    Attributes:
        files: those with an ending that can be read, sorted.
        beside: others, which may hold annotations.
        told: remarks.
    """

    files: tuple[Path, ...]
    beside: tuple[Path, ...]
    told: tuple[str, ...]


def listed(folder: Path) -> Listed:
    """List the files below a folder. Raises UserError: there is no such folder, or nothing in it can be read."""
    state = state_of(folder)
    if state is None:
        raise UserError(f"{shown(folder)}: there is no such folder")
    if is_file(folder):
        raise UserError(f"{shown(folder)}: is a file; give the folder that it lies in")
    if not is_folder(folder):
        raise UserError(f"{shown(folder)}: is no folder")
    check_listable(folder)
    found, told, barred = list[Path](), list[str](), list[str]()
    more = False
    for place, folders, names in os.walk(folder, onerror=lambda error: barred.append(str(error.filename))):
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=natural)
        found += [Path(place, name) for name in names if not name.startswith(".")]
        if more := len(found) > FILES:
            break
    if not found:
        raise UserError(f"{shown(folder)}: holds no files")
    if more:
        told.append(f"more than {FILES} files: the first {FILES} were listed")
    if barred:
        told.append(f"{many(len(barred), 'subfolder')} cannot be listed: {some(map(shown, barred))}")
    # a name that cannot be shown cannot stand in a YAML file; what is no regular file may never end
    regular = [file for file in found[:FILES] if file.name.isprintable() and is_file(file)]
    if len(regular) < len(found[:FILES]):
        told.append(f"{many(len(found[:FILES]) - len(regular), 'file')} left out: no regular file, or an odd name")
    regular.sort(key=lambda file: natural(file.relative_to(folder).as_posix()))
    signals = {other for file in regular for other in companions(file)}
    readable = [f for f in regular if f not in signals and (ending(f) in READERS or f.suffix.lower() == ".zip")]
    others = [file for file in regular if file not in {*readable, *signals}]
    if others:
        kinds = Counter(file.suffix.lower() or "no ending" for file in others)
        listing = some(f"{count} of {shown(kind, 20)}" for kind, count in kinds.most_common())
        told.append(f"{many(len(others), 'file')} that cannot be read: {listing}")
    if not readable:
        what = told[-1] if others else "holds no file that can be read"
        raise UserError(f"{shown(folder)}: {what}; read are {', '.join(READERS)}")
    return Listed(tuple(readable), tuple(others), tuple(told))


def spread(items: Sequence[T], most: int) -> list[T]:
    """Return at most `most` of several items, evenly from the first to the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(n * (len(items) - 1) / max(1, most - 1))] for n in range(most)]
