"""Columns of a recording by their roles: label, subject, session and channels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dataset_utils.counts import many, some
from dataset_utils.draft.look import Look
from dataset_utils.draft.words import LABELS, OF_SUBJECT, SESSIONS, SUBJECTS, among
from dataset_utils.sources.own.labels import NUMBER
from registry.text import shown

MOST_LABELS = 50
"""Most distinct values of a column that is taken for the label."""
RUN = 8
"""Fewest rows, on average, of a stretch with one label; sensors change from row to row."""


@dataclass(frozen=True)
class Roles:
    """Columns by what they are.

    Attributes:
        label, subject, session: the columns, or None.
        why: role -> from what it follows.
        sure: roles that a column's name says.
        labels: distinct labels in the rows looked at, and how many rows each has.
        channels: columns of signals.
        told: remarks on columns that are none of these.
    """

    label: str | None
    subject: str | None
    session: str | None
    why: dict[str, str]
    sure: frozenset[str]
    labels: dict[str, int]
    channels: tuple[str, ...]
    told: tuple[str, ...]


def roles_of(looks: Sequence[Look], names: Sequence[str], taken: Sequence[str], of_windows: bool = False) -> Roles:
    """Return what the columns `names`, which all files share, are.

    Args:
        looks: the files.
        names: the columns.
        taken: columns that are something else: times, numbers of rows.
        of_windows: whether a row is a window, so that neighbours may have any label.
    """
    why, sure = dict[str, str](), set[str]()
    free = [name for name in names if name not in taken]
    counts = {name: _distinct(looks, name) for name in free}
    few = [n for n in free if 1 <= len(counts[n]) <= max(MOST_LABELS, 1000 * among(n, SUBJECTS)) and _is_code(looks, n)]
    subject = next((n for n in few if among(n, SUBJECTS) and not _says_label(n)), None)
    if subject is None:
        subject = next((n for n in few if all(OF_SUBJECT.fullmatch(value) for value in counts[n])), None)
    else:
        sure.add("subject")
    session = next((n for n in few if n != subject and among(n, SESSIONS) and not _says_label(n)), None)
    if session is not None:
        sure.add("session")
    of_label = [n for n in few if n not in (subject, session) and (of_windows or _run(looks, n) >= RUN)]
    candidates = [n for n in of_label if _says_label(n)] + [
        n for n in of_label if not _says_label(n) and len(counts[n]) > 1
    ]
    candidates.sort(key=lambda n: (not _says_label(n), _is_number(looks, n), len(counts[n]) < 2))
    label = candidates[0] if candidates else None
    if label is not None:
        if _says_label(label):
            sure.add("label")
        seen = many(len(counts[label]), "value")
        why["label"] = f"{seen} in stretches of {_run(looks, label):.0f} rows: {some(map(_quoted, counts[label]))}"
        if candidates[1:]:
            why["label"] += f"; also possible: {some(map(_quoted, candidates[1:]))}"
    for role, name in (("subject", subject), ("session", session)):
        if name is not None:
            why[role] = f"column of {many(len(counts[name]), 'value')}: {some(map(_quoted, counts[name]))}"
    roles = {subject, session, *candidates}
    channels, told = _channels(looks, [name for name in free if name not in roles])
    if candidates[1:]:
        told.insert(0, f"{some(map(_quoted, candidates[1:]))}: may be labels, so they are no channels")
    labels = counts[label] if label else {}
    return Roles(label, subject, session, why, frozenset(sure), dict(labels), tuple(channels), tuple(told))


def _channels(looks: Sequence[Look], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the columns of numbers, and remarks on the others."""
    channels, texts, empty, told = list[str](), list[str](), list[str](), list[str]()
    for name in names:
        filled = [look for look in looks if look.columns[name].distinct]
        of_text = [look for look in filled if look.columns[name].numbers is None]
        if not filled:
            empty.append(name)
        elif not of_text:
            channels.append(name)
        elif len(of_text) < len(filled):
            cell = next(value for value in of_text[0].columns[name].distinct if not NUMBER.fullmatch(value))
            told.append(f"'{shown(name, 40)}' holds text in {of_text[0].file.name} ('{shown(cell, 20)}')")
        else:
            texts.append(name)
    if texts:
        told.append(f"{some(map(_quoted, texts))}: text, no channels")
    if empty:
        told.append(f"{some(map(_quoted, empty))}: empty in the rows looked at, no channels")
    constant = [n for n in channels if len(_distinct(looks, n)) == 1]
    if constant:
        told.append(f"{some(map(_quoted, constant))}: one value in all rows looked at; is it a channel?")
    return channels, told


def _quoted(name: str) -> str:
    return f"'{shown(name, 40)}'"


def _says_label(name: str) -> bool:
    return among(name, LABELS)


def _distinct(looks: Sequence[Look], name: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for look in looks:
        total.update(look.columns[name].distinct)
    return total


def _is_number(looks: Sequence[Look], name: str) -> bool:
    return all(look.columns[name].numbers is not None or not look.columns[name].distinct for look in looks)


def _is_code(looks: Sequence[Look], name: str) -> bool:
    """Return whether a column holds words or whole numbers, as labels and names of subjects are."""
    if not _is_number(looks, name):
        return True
    return all(NUMBER.fullmatch(value) for look in looks for value in look.columns[name].distinct)


def _run(looks: Sequence[Look], name: str) -> float:
    """Return the mean rows of a stretch with one value."""
    return sum(look.rows for look in looks) / max(1, sum(look.columns[name].runs for look in looks))
