"""Rows of the CSV files in `data/`: what their columns mean, how they are read and put together."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import pandas as pd

from registry.errors import UserError

# Columns of a CSV file; a row is a run. Shares are in [0, 1]; metrics are those of the last round.
RUN = (  # what makes a run: two rows that agree in these are one run
    "data",
    "setting",  # its name in protocol.md, else the options that make it
    "options",  # all that are not the defaults, without those that have columns
    "model",
    "student_model",  # where it is another than the model
    *("algorithm", "label"),
    "hyper",  # hyper-parameters that are not the defaults
    *("learning_rate", "seed", "data_seed", "rounds", "evaluated_on"),
)
SHARES = (
    "accuracy",  # mean over clients
    "pooled",  # accuracy over all windows of all clients
    *("f1", "f1_pooled"),  # macro F1, likewise
    "worst",  # the lowest accuracy of a client
    "balanced",  # mean over classes of the share found, all windows together
    *("auc", "recall"),  # as in `fedkdx_plugin.engine.metrics.Metrics`
)
RESULTS = (
    *("clients", *SHARES),
    *("mb_up", "mb_down"),  # 10^6 bytes of all clients in all rounds
    "mb_first",  # 10^6 bytes that a client gets in the first round
    "networks",  # accuracy/pooled of each network that predicts otherwise: 'teacher=a/b;student=a/b'
    "groups",  # accuracy/pooled of the clients set apart: 'late=a/b'
    "client_accuracy",  # of each client, ';' between them; nothing for one without test windows
    "names",  # of these clients' subjects, see `joined` and `packed`; nothing where clients are no subjects
)
COLUMNS = ("experiment", *RUN, *RESULTS, "seconds", "commit", "processor")  # the others may differ in a run made twice
TRAINING = frozenset(  # options of local training, which are a matter of the method rather than of the setting
    "augment batch_size bn class_weights clip_norm learning_rate_decay learning_rate_decay_gamma local_epochs norm "
    "optimizer".split()
)
SEPARATORS = (";", "..", "+")  # between the names of clients, and between several subjects of one
SUBJECTS = frozenset({"subjects", "exclude_subjects"})  # options that say who the data are of
ORDER = ("data", "setting", "algorithm", "label", "student_model", "hyper", "learning_rate", "options", "rounds")


def path_of(name: str, data: Path) -> Path:
    """Return the path of a CSV file. Raises UserError: it is no plain name."""
    if not re.fullmatch(r"[\w-]+", name):
        raise UserError(f"'{name}': name a file of {data.name}/ without its ending, such as 'survey'")
    return data / f"{name}.csv"


def read(path: Path) -> pd.DataFrame:
    """Return a CSV file, all as text. Raises UserError: it cannot be read, or has other columns."""
    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if tuple(rows.columns) != COLUMNS:
        odd = sorted(set(rows.columns).symmetric_difference(COLUMNS)) or ["their order"]
        raise UserError(f"{path}: other columns than {Path(__file__).name} knows: {', '.join(odd)}")
    return rows


def packed(names: Sequence[str]) -> str:
    """Return names as one text: '01..15' for numbers one after the other, else with ';' between them."""
    first = names[0] if names else ""
    if len(names) > 1 and first.isdecimal() and list(names) == _numbered(first, len(names)):
        return f"{first}..{names[-1]}"
    return ";".join(names)


def joined(subjects: Iterable[str]) -> str:
    """Return the name of a client: its subjects, '+' between several.

    Raises:
        UserError: the name of a subject holds what separates names, so that it would not be found again.
    """
    names = list(map(str, subjects))
    for name in names:
        if mark := next((mark for mark in SEPARATORS if mark in name), ""):
            raise UserError(f"subject '{name}': a name with '{mark}' cannot be kept in a CSV file; give it another one")
    return "+".join(names)


def one_subject_each(names: str) -> bool:
    """Return whether a text of `packed` says that each client is one subject, and so the same with every seed."""
    return names != "" and "+" not in names


def unpacked(text: str) -> list[str]:
    """Return the names that `packed` made a text of."""
    ends = re.fullmatch(r"(\d+)\.\.(\d+)", text)
    return _numbered(ends[1], int(ends[2]) - int(ends[1]) + 1) if ends else text.split(";")


def _numbered(first: str, count: int) -> list[str]:
    return [str(int(first) + place).zfill(len(first)) for place in range(count)]


def merged(parts: Sequence[pd.DataFrame], where: str) -> pd.DataFrame:
    """Return the rows of all parts, sorted, each run once: the first found. Raises UserError: one has two results."""
    rows = pd.concat(parts, ignore_index=True)
    once = rows.drop_duplicates(list(RUN))
    twice = rows.drop_duplicates([*RUN, *RESULTS])
    if len(twice) > len(once):
        second = twice[twice.duplicated(list(RUN))].iloc[0]
        first = once[(once[list(RUN)] == second[list(RUN)]).all(axis=1)].iloc[0]
        key = next(key for key in RESULTS if first[key] != second[key])
        run = f"{method_of(second)}, {second['data']}, {second['setting']}, seed {second['seed']}"
        raise UserError(
            f"{where}: {run}: {key} is {first[key]} (commit {first['commit']}) and {second[key]} (commit "
            f"{second['commit']}); take the rows of one of them out"
        )
    numbered = once.assign(_seed=pd.to_numeric(once["seed"]))
    return numbered.sort_values([*ORDER, "_seed", *RUN], kind="stable").drop(columns="_seed").reset_index(drop=True)


def method_of(row: pd.Series) -> str:
    """Return the method of a row: algorithm, label, student's model, and without a label the options of training."""
    student = f"with {row['student_model']}" if row["student_model"] else ""
    training = "" if row["label"] else options_in(row["options"], TRAINING)
    return " ".join(part for part in (row["algorithm"], row["label"], student, training) if part)


def options_in(options: str, keys: frozenset[str]) -> str:
    """Return the part of 'a=1 b=2' with these keys."""
    return " ".join(word for word in options.split() if word.partition("=")[0] in keys)


def options_beside(options: str, keys: frozenset[str]) -> str:
    """Return the part of 'a=1 b=2' without these keys."""
    return " ".join(word for word in options.split() if word.partition("=")[0] not in keys)
