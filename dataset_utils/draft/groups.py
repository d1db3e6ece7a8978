"""Files sorted by what they hold: recordings of one kind, by their columns, and tables of labels."""

from __future__ import annotations

import glob
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset_utils.counts import many, some
from dataset_utils.draft.folder import Listed, spread
from dataset_utils.draft.look import Look, look
from dataset_utils.draft.words import ENDS, LABELS, STARTS, among
from dataset_utils.sources.own.naming import ending, stem
from dataset_utils.sources.own.reading import READERS, SECOND, kind_of
from dataset_utils.sources.own.text_files import read_parquet, read_text
from registry.errors import UserError
from registry.text import shown

HEADS, HEAD_ROWS = 200, 50
"""Most tables of a kind whose first rows are looked at, and how many rows."""
WHOLE = 12
"""Most files of a kind that are read as a whole."""
LISTED = 200
"""Most files that a description lists by name."""
COLUMNS_OF_MARKS = 12
"""Most columns of a table of labelled stretches."""


@dataclass(frozen=True)
class Group:
    """Files with the same columns.

    Attributes:
        kind: their ending.
        names: their columns.
        files: all of them, sorted.
        heads: those that were looked into, of some rows.
    """

    kind: str
    names: tuple[str, ...]
    files: tuple[Path, ...]
    heads: tuple[Look, ...]


@dataclass(frozen=True)
class Sorting:
    """Roles of the files of a folder.

    Attributes:
        groups: recordings of one kind, most files first.
        marks: tables of labelled stretches.
        told: remarks.
    """

    groups: tuple[Group, ...]
    marks: tuple[Look, ...]
    told: tuple[str, ...]


def sort(found: Listed, root: Path) -> Sorting:
    """Return what the files are. Raises UserError where none can be read as a recording."""
    kinds, failed, marks = defaultdict[str, list[Path]](list), dict[Path, str](), list[Look]()
    for file in found.files:
        try:
            kinds[kind_of(file)].append(file)
        except UserError as error:
            failed[file] = _reason(error, file)
    heads: dict[str, list[Look]] = {}
    for kind, files in kinds.items():
        looks = list[Look]()
        for file in spread(files, _most(kind)):
            try:
                looks.append(look(file, HEAD_ROWS))
            except UserError as error:
                failed[file] = _reason(error, file)
        marks += [one for one in looks if is_marks(one)]
        heads[kind] = [one for one in looks if not is_marks(one) and (one.names or one.windows)]
    told = list(found.told)
    if failed:
        file, reason = next(iter(failed.items()))
        told.append(f"{many(len(failed), 'file')} cannot be read as a table or recording, such as {reason}")
    usable = {kind: len(kinds[kind]) for kind in kinds if heads[kind]}
    if not usable:
        raise UserError(
            f"{shown(root)}: nothing can be drafted; {told[-1] if told else 'it holds tables of labels only'}"
        )
    kind = max(usable, key=lambda kind: (kind not in SECOND, usable[kind]))
    others = [f"{count} of {other}" for other, count in usable.items() if other != kind]
    if others:
        told.append(
            f"files of several kinds: those of {kind} are described, {some(others)} are not; name them in 'files'"
        )
    left_out = {one.file for one in marks} | failed.keys()
    files = [file for file in kinds[kind] if file not in left_out]
    groups = _groups(kind, files, heads[kind])
    if len(files) > _most(kind):
        told.append(f"{_most(kind)} of {len(files)} files were looked into; the others are taken to be like them")
    return Sorting(tuple(groups), tuple(marks), tuple(told))


def _most(kind: str) -> int:
    return HEADS if READERS[kind] in (read_text, read_parquet) else WHOLE


def is_marks(one: Look) -> bool:
    """Return whether a table has columns of start and end, and one that may be the label."""
    if not one.columns or len(one.names) > COLUMNS_OF_MARKS or one.windows:
        return False
    return mark_columns(one) is not None


def mark_columns(one: Look) -> tuple[str, str, str] | None:
    """Return the columns of start, end and label of a table; None where it has none."""
    start = next((name for name in one.names if among(name, STARTS)), None)
    end = next((name for name in one.names if among(name, ENDS) and name != start), None)
    texts = [name for name in one.names if name not in (start, end)]
    label = next((name for name in texts if among(name, LABELS)), None)
    if label is None:
        label = next((name for name in texts if one.columns[name].numbers is None), None)
    return (start, end, label) if start and end and label else None


def _reason(error: UserError, file: Path) -> str:
    return str(error).replace(str(file), shown(file.name, 60))


def _groups(kind: str, files: Sequence[Path], heads: Sequence[Look]) -> list[Group]:
    by_names = defaultdict[tuple[str, ...], list[Look]](list)
    for one in heads:
        by_names[one.names].append(one)
    most = max(by_names, key=lambda names: len(by_names[names]))
    seen = {one.file: names for names, looks in by_names.items() for one in looks}
    of_group = defaultdict[tuple[str, ...], list[Path]](list)
    for file in files:
        of_group[seen.get(file, most)].append(file)
    groups = [Group(kind, names, tuple(of_group[names]), tuple(looks)) for names, looks in by_names.items()]
    return sorted(groups, key=lambda group: -len(group.files))


def merged(groups: Sequence[Group]) -> tuple[Group, tuple[str, ...]]:
    """Return the files to describe as one group, with the columns that they share, and remarks on the others.

    Files whose columns differ a little are described by those that they share; of others, the largest group is.
    """
    first = groups[0]
    shared = [name for name in first.names if all(name in group.names for group in groups)]
    if len(groups) == 1:
        return first, ()
    if len(shared) >= 2 and len(shared) >= 0.5 * len(first.names):
        files = sorted((file for group in groups for file in group.files), key=first_key)
        own = [name for group in groups for name in group.names if name not in shared]
        told = f"columns differ between files: only those of all are described, not {some(map(repr, map(shown, own)))}"
        heads = tuple(one for group in groups for one in group.heads)
        return Group(first.kind, tuple(shared), tuple(files), heads), (told,)
    count = sum(len(group.files) for group in groups[1:])
    file = groups[1].files[0].name
    told = f"columns differ between files: {many(count, 'file')} with other columns are not described, such as {file}"
    return first, (told,)


def first_key(file: Path) -> tuple[int, str]:
    """Return a key that sorts files by depth and name."""
    return len(file.parts), file.as_posix()


def pattern_of(
    files: Sequence[Path], found: Listed, root: Path, of_labels: Sequence[Path] = ()
) -> str | list[str] | None:
    """Return what `files` must say for these files alone to be read.

    Args:
        files: the files.
        found: all files of the folder.
        root: the folder.
        of_labels: files that `label` names, which are no recordings.

    Returns:
        None where the key can be left out; a pattern; or the list of their paths.

    Raises:
        UserError: there are too many for a list.
    """
    wanted = set(files)
    alike = {file for file in found.files if ending(file) == ending(files[0])}
    if all(file.parent == root for file in wanted):
        first = {file for file in found.files if file.parent == root and file not in of_labels}
        first = {file for file in first if ending(file) not in SECOND} or first
        if first == wanted:
            return None
    endings = Counter(file.name[len(stem(file)) :] for file in files)
    names = [file.name for file in files]
    tails = [glob.escape(names[0]) if len(set(names)) == 1 else f"*{_common_end(names)}"]
    tails += [f"*{glob.escape(next(iter(endings)))}"] if len(endings) == 1 else [f"*{ending(files[0])}*"]
    depths = {len(file.relative_to(root).parts) for file in files}
    starts = ["*/" * (next(iter(depths)) - 1)] if len(depths) == 1 else ["**/"]
    folders = {file.parent for file in files}
    if len(folders) == 1 and next(iter(folders)) != root:
        starts.append(f"{glob.escape(next(iter(folders)).relative_to(root).as_posix())}/")
    for start in starts:
        for tail in reversed(tails):
            if {file for file in root.glob(start + tail) if file in alike and file not in of_labels} == wanted:
                return start + tail
    if len(files) > LISTED:
        raise UserError(f"{len(files)} files have no pattern of their own")
    return [glob.escape(file.relative_to(root).as_posix()) for file in files]


def _common_end(names: Sequence[str]) -> str:
    """Return the common end of several names, from a separator or the ending on."""
    end = names[0]
    for name in names[1:]:
        while not name.endswith(end):
            end = end[1:]
    places = [place for place, letter in enumerate(end) if letter in "_-. "]
    return glob.escape(end[places[0] :]) if places and len(names) > 1 else glob.escape(names[0])
