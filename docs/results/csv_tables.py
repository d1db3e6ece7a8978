"""Tables of results in Markdown, made from the CSV files in `data/`.

`make` takes the order of a table, such as `settings from=survey,settings data=UCI-HAR setting=tenth,blocked`: its kind
(see `KINDS`), the files, and what the kind needs (see `WORDS`); every other word picks rows, by any column of text:
`model=cnn,cnn_lstm`. A value with spaces is quoted. Tables are of test windows, that of a search of validation windows,
unless `evaluated_on` says otherwise. What a method is: `csv_rows.method_of`.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import yaml
from csv_rows import SHARES, TRAINING, merged, method_of, one_subject_each, options_beside, path_of, read, unpacked

from fedkdx_plugin import reports
from fedkdx_plugin.experiments.search import FIRST
from fedkdx_plugin.reports.sections import CEILING
from fedkdx_plugin.reports.statistics import LEVEL, PAIRS, favours, holm, signed_rank, spread
from fedkdx_plugin.reports.tables import NONE, Cell, Table, markdown, number, plain, ranked
from registry.errors import UserError

PAIR = ("accuracy", "pooled")  # in this order in `networks` and `groups`
METHOD = ("hyper", "learning_rate", "options")  # what the runs of one method share
NUMBERS = ("seed", "data_seed", "rounds", "learning_rate", *SHARES, "mb_up", "mb_down")
PAPER = Path(reports.__file__).parent / "paper.yaml"
OF_PAPER = {"pooled": "accuracy", "auc": "AUC", "f1": "F1", "recall": "recall"}  # in the order of paper.yaml
FREE_IN_PAPER = {"join_ratio"}  # the one option that its runs differ in, beside the model

Args = Mapping[str, str]


def make(order: str, data: Path) -> str:
    """Return the Markdown of a table.

    Args:
        order: its kind, and words KEY=VALUE.
        data: folder of the CSV files.

    Raises:
        UserError: there is no such kind, file, column or run, or rows do not go together.
    """
    kind, args = parsed(order)
    if kind not in KINDS:
        raise UserError(f"table '{order}': no kind '{kind}'; there are {', '.join(KINDS)}")
    try:
        return markdown(KINDS[kind](rows_of(kind, args, data), args))
    except UserError as error:
        raise UserError(f"table '{order}': {error}") from error


def parsed(order: str) -> tuple[str, Args]:
    """Return the kind and the words of an order. Raises UserError: it is written wrongly."""
    try:
        kind, *words = shlex.split(order)
    except ValueError as error:
        raise UserError(f"table '{order}': write a kind and words KEY=VALUE, with quotes in pairs") from error
    if wrong := [word for word in words if "=" not in word]:
        raise UserError(f"table '{order}': '{wrong[0]}' is not KEY=VALUE")
    keys = [word.partition("=")[0] for word in words]
    if twice := next((key for key in keys if keys.count(key) > 1), ""):
        raise UserError(f"table '{order}': '{twice}' is given twice; write its values with ',' between them")
    return kind, dict(word.split("=", 1) for word in words)


def rows_of(kind: str, args: Args, data: Path) -> pd.DataFrame:
    """Return the rows of the files in `data` that words pick. Raises UserError: see `make`."""
    return _picked(merged([read(path_of(name, data)) for name in args.get("from", "").split(",")], "from"), args, kind)


def _picked(rows: pd.DataFrame, args: Args, kind: str) -> pd.DataFrame:
    """Return the rows that a table is of, numbers as numbers, with `method`. Raises UserError: there are none."""
    rows = rows.assign(method=rows.apply(method_of, axis=1) if len(rows) else "")
    usual = {"evaluated_on": "validation" if kind == "search" else "test"}
    for key, value in (usual | dict(args)).items():
        if key == "from" or key == WORDS.get(kind):
            continue
        if key not in rows:
            raise UserError(f"no column '{key}', and '{kind}' has no word of this name")
        wanted = value.split(",")
        if missing := sorted(set(wanted) - set(rows[key])):
            raise UserError(f"no run with {key}={missing[0]}")
        rows = rows[rows[key].isin(wanted)]
    if rows.empty:
        raise UserError("no run that it could be of")
    return rows.assign(**{key: pd.to_numeric(rows[key]) for key in NUMBERS})


def in_order(rows: pd.DataFrame, args: Args, key: str) -> list[str]:
    """Return the values of a column in the order of the words, else sorted; Centralised always last."""
    names = args[key].split(",") if key in args else sorted(set(rows[key]), key=str.lower)
    return sorted(names, key=lambda name: name == CEILING)


def parts(rows: pd.DataFrame, args: Args) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """Yield each data set, each of its settings, and the rows of both."""
    for data in in_order(rows, args, "data"):
        of_data = rows[rows["data"] == data]
        for setting in in_order(of_data, args, "setting"):
            if len(own := of_data[of_data["setting"] == setting]):
                yield data, setting, own


def check(rows: pd.DataFrame) -> None:
    """Raise UserError where rows of a data set and setting are not comparable, or a method's not only in the seed."""
    for (data, setting), column in rows.groupby(["data", "setting"]):
        where = f"{data}, {setting}"
        of_all = column.assign(options=[options_beside(text, TRAINING) for text in column["options"]])
        _require_same(of_all, ("model", "rounds", "evaluated_on", "options"), where)
        for seed, of_seed in column.groupby("seed"):
            _require_same(of_seed, ("data_seed",), f"{where}, seed {seed}")
        if min(column["data_seed"].nunique(), (column["data_seed"] - column["seed"]).nunique()) > 1:
            raise UserError(f"{where}: some seeds have data of their own (--vary data), others share theirs")
        for method, own in column.groupby("method"):
            _require_same(own, METHOD, f"{where}, {method}")


def _require_same(rows: pd.DataFrame, keys: Sequence[str], where: str) -> None:
    for key in keys:
        if len(values := sorted(set(rows[key].astype(str)))) > 1:
            raise UserError(f"{where}: several {key}: '{values[0]}' and '{values[1]}'")


def settings(rows: pd.DataFrame, args: Args) -> Table:
    """Return methods × settings (× data sets): mean ± standard deviation over seeds in %, and mean ranks.

    The metric is the pooled accuracy, as in reports, or another share (`metric=f1`).
    Best and second are ranked in each column without Centralised. A mean rank is over the columns of all clients, of
    the methods that all of them have; methods that are equal as shown share the mean of their ranks (Demšar 2006). By
    it methods are ordered, where `method` does not say in which order.
    """
    check(rows)
    metric = args.get("metric", "pooled")
    if metric not in SHARES:
        raise UserError(f"metric={metric}: there are {', '.join(SHARES)}")
    methods = in_order(rows, args, "method")
    competing = [i for i, name in enumerate(methods) if name != CEILING]
    heads, columns, main = [], [], {}
    for data, setting, own in parts(rows, args):
        title = f"{data} {setting}" if rows["data"].nunique() > 1 else setting
        groups = _groups(own, title, metric) if metric in PAIR else {}
        for head, values in ({title: own[metric]} | groups).items():
            cells = [number(spread(list(values[own["method"] == name])), 100) for name in methods]
            heads.append(("", head))
            columns.append(ranked(cells, competing))
            if head == title:
                main[head] = {i: cells[i].value for i in competing}
    ranks = pd.DataFrame(main, dtype=float).round(2).dropna().rank(ascending=False).mean(axis=1)
    if len(ranks) > 1 and len(main) > 1:
        heads.append(("", "mean rank"))
        columns.append([plain(ranks.get(i, np.nan)) for i in range(len(methods))])
    heads.append(("", "seeds"))
    columns.append([_counts(rows[rows["method"] == name]) for name in methods])
    lines = list(map(list, zip(map(Cell, methods), *columns, strict=True)))
    if "method" not in args and len(main) > 1:  # those without a rank behind the others; the sort keeps names in order
        lines = [lines[i] for i in sorted(range(len(lines)), key=lambda i: ranks.get(i, np.inf))]
    return Table("", "", [("", "method"), *heads], lines)


def _pairs(text: str, metric: str) -> dict[str, float]:
    """Return the values in 'late=a/b;rare=a/b', the first or second of each."""
    parts = (part.split("=") for part in text.split(";") if part)
    return {name: float(values.split("/")[PAIR.index(metric)] or "nan") for name, values in parts}


def _groups(rows: pd.DataFrame, title: str, metric: str) -> dict[str, pd.Series]:
    """Return a column for each group of clients set apart: heading -> accuracies of these clients by row."""
    found = pd.DataFrame([_pairs(text, metric) for text in rows["groups"]], index=rows.index)
    return {f"{title}: {name} clients": found[name] for name in sorted(found)}


def _counts(rows: pd.DataFrame) -> Cell:
    """Return the number of seeds in each data set and setting, 'a to b' where it differs."""
    counts = rows.groupby(["data", "setting"])["seed"].nunique()
    low, high = counts.min(), counts.max()
    return Cell(str(low) if low == high else f"{low} to {high}")


def detail(rows: pd.DataFrame, args: Args) -> Table:
    """Return one data set and setting in detail; a row '(student)' is one network of the method above it."""
    _one(rows, "data", "setting")
    check(rows)
    columns = ("accuracy", "pooled", "f1", "worst")
    heads = ("accuracy %", "pooled %", "F1 %", "worst client %", "MB up", "MB down", "seeds")
    lines: list[list[Cell]] = []
    served = []
    for name in in_order(rows, args, "method"):
        own = rows[rows["method"] == name]
        if name != CEILING:
            served.append(len(lines))
        shares = [number(spread(list(own[key])), 100) for key in columns]
        sent = [number(spread(list(own[key])), digits=1) for key in ("mb_up", "mb_down")]
        lines.append([Cell(name), *shares, *sent, _counts(own)])
        networks = [pd.DataFrame([_pairs(text, metric) for text in own["networks"]]) for metric in PAIR]
        for view in networks[0]:
            cells = [number(spread(list(values[view])), 100) for values in networks]
            lines.append([Cell(f"{name} ({view})"), *cells, *[Cell(NONE)] * 5])
    ranks = [ranked([line[i] for line in lines], served) for i in range(1, 1 + len(columns))]
    lines = [[line[0], *(column[i] for column in ranks), *line[1 + len(columns) :]] for i, line in enumerate(lines)]
    return Table("", "", [("", "method"), *(("", head) for head in heads)], lines)


def _one(rows: pd.DataFrame, *keys: str) -> None:
    """Raise UserError if rows have several values in one of these columns."""
    for key in keys:
        if len(values := sorted(set(rows[key]))) > 1:
            raise UserError(f"several {key}: pick one, such as {key}='{values[0]}'")


def claims(rows: pd.DataFrame, args: Args) -> Table:
    """Return the reference against each other method, over the seeds that both have: pooled accuracy, in points.

    Tests are paired by client, each client's accuracies averaged over seeds first; where clients are not one subject
    each and each seed deals the windows out anew, by seed, of which there must be six. p is of the two-sided Wilcoxon
    signed-rank test, corrected by Holm over the table. Better is what is better in the mean over seeds, in every one
    of several seeds, and by the test; worse likewise.
    """
    reference = _reference(rows, args)
    found = _compared(rows, args, reference)
    if not found:
        raise UserError(f"nothing to compare {reference} with: no seed that both have")
    heads = ("data", "setting", f"{reference} against", "difference", "of seeds", "better in", "pairs", "p", "verdict")
    return Table("", "", [("", head) for head in heads], [_claim(one) for one in found])


def against(rows: pd.DataFrame, args: Args) -> Table:
    """Return other methods × settings (× data sets): the reference's difference in points, and what `claims` calls it.

    Corrected by Holm in each column: over the methods of one data set and setting.
    """
    reference = _reference(rows, args)
    others = [name for name in in_order(rows, args, "method") if name != reference]
    heads, columns = [], []
    for data, setting, own in parts(rows, args):
        found = {one.other: one for one in _compared(own, args, reference)}
        heads.append(("", f"{data} {setting}"))
        columns.append([_verdict_cell(found[name]) if name in found else Cell(NONE) for name in others])
    lines = list(map(list, zip(map(Cell, others), *columns, strict=True)))
    return Table("", "", [("", f"{reference} against"), *heads], lines)


class Comparison(NamedTuple):
    """The reference against another method in a data set and setting: differences in points, (seeds,) and (pairs,)."""

    data: str
    setting: str
    other: str
    seeds: np.ndarray
    pairs: np.ndarray
    p: float = np.nan

    @property
    def verdict(self) -> str:
        """Return what the comparison says of the reference; see `claims`."""
        if len(self.seeds) == 1:
            return "one seed"
        signs = {int(sign) for sign in np.sign(self.seeds)}
        if self.p < LEVEL and signs == {favours(self.pairs)} != {0}:
            return "better" if signs == {1} else "worse"
        return "not told apart"


def _reference(rows: pd.DataFrame, args: Args) -> str:
    """Return the method that others are compared with. Raises UserError: there is none, or rows do not go together."""
    check(rows)
    if (reference := args.get("reference", "")) not in set(rows["method"]):
        raise UserError(f"reference='{reference}': no such method; there are {', '.join(sorted(set(rows['method'])))}")
    return reference


def _compared(rows: pd.DataFrame, args: Args, reference: str) -> list[Comparison]:
    """Return the comparisons with each other method, p corrected over all of them; NaN where there are few pairs."""
    compared = []
    for data, setting, own in parts(rows, args):
        for other in in_order(own, {}, "method"):
            if other != reference and (found := _by_seed(own, reference, other)) is not None:
                compared.append(Comparison(data, setting, other, *found))
    tested = [i for i, one in enumerate(compared) if len(one.pairs) >= PAIRS]
    corrected = dict(zip(tested, holm([signed_rank(compared[i].pairs) for i in tested]), strict=True))
    return [one._replace(p=corrected.get(i, np.nan)) for i, one in enumerate(compared)]


def _by_seed(rows: pd.DataFrame, reference: str, other: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Return reference minus other: (seeds,), in points, and (pairs,), of what the test is of; None: no common seed."""
    own, theirs = (rows[rows["method"] == name].set_index("seed") for name in (reference, other))
    seeds = own.index.intersection(theirs.index)
    if seeds.empty:
        return None
    own, theirs = own.loc[seeds], theirs.loc[seeds]
    differences = np.round(100 * (own["pooled"] - theirs["pooled"]).to_numpy(), 10)
    one_each = all(own["names"].map(one_subject_each))
    if not one_each and own["data_seed"].nunique() > 1:
        return differences, differences
    by_client = _client_means(own) - _client_means(theirs)
    return differences, np.round(by_client.dropna().to_numpy(), 4)  # the file's 5 decimals would tell ties apart


def _client_means(rows: pd.DataFrame) -> pd.Series:
    """Return client -> accuracy, mean over the seeds for which a client has one."""
    lines = []
    for row in rows.itertuples():
        values = [float(text or "nan") for text in row.client_accuracy.split(";")]
        lines.append(dict(zip(unpacked(row.names) if row.names else range(len(values)), values, strict=True)))
    return pd.DataFrame(lines).mean()


def _claim(one: Comparison) -> list[Cell]:
    """Return the row of one comparison."""
    mean, count = float(one.seeds.mean()), len(one.seeds)
    low, high = (plain(float(value), sign=True).text for value in (one.seeds.min(), one.seeds.max()))
    tested = Cell(NONE) if np.isnan(one.p) else Cell("<0.001" if one.p < 0.001 else f"{one.p:.3f}", one.p)
    better = Cell(f"{int((one.seeds > 0).sum())} of {count}")
    spans = Cell(NONE if count == 1 else f"{low} to {high}")
    names = map(Cell, (one.data, one.setting, one.other))
    return [*names, plain(mean, sign=True), spans, better, Cell(str(len(one.pairs))), tested, Cell(one.verdict)]


def _verdict_cell(one: Comparison) -> Cell:
    """Return the difference in points, with what it is called where it is told apart."""
    cell = plain(float(one.seeds.mean()), sign=True)
    return replace(cell, text=f"{cell.text} {one.verdict}") if one.verdict in ("better", "worse") else cell


def search(rows: pd.DataFrame, args: Args) -> Table:
    """Return the best candidate of each method by pooled accuracy on validation windows; of equal ones the defaults.

    Raises:
        UserError: a candidate has not run on all that the others have, or none has the defaults.
    """
    lines = []
    for name in in_order(rows, args, "algorithm"):
        own = rows[rows["algorithm"] == name]
        means = own.groupby("label")["pooled"].mean()
        ran = {frozenset(zip(one["data"], one["setting"], one["seed"], strict=True)) for _, one in own.groupby("label")}
        if len(ran) > 1:
            raise UserError(f"{name}: not all candidates have run in all settings")
        if "defaults" not in means:
            raise UserError(f"{name}: no run has its defaults")
        best = max(means.index, key=lambda label: (means[label], label == "defaults"))
        values = [plain(100 * means[label]) for label in (best, "defaults")]
        lines.append([Cell(name), Cell(str(len(means))), Cell(best), *values])
    heads = ("method", "candidates", "best", "accuracy %", FIRST)
    return Table("", "", [("", head) for head in heads], lines)


def paper(rows: pd.DataFrame, args: Args) -> Table:
    """Return ours beside the FedKDX paper's tables, in %: runs with its options, whatever the number of rounds."""
    _one(rows, "data")
    entries = yaml.safe_load(PAPER.read_text(encoding="utf-8"))
    data, lines = rows["data"].iloc[0], []
    for name in in_order(rows, args, "method"):
        for (model, options, rounds), own in rows[rows["method"] == name].groupby(["model", "options", "rounds"]):
            changed = dict(part.split("=", 1) for part in options.split(" ") if part)
            ratio = float(changed.get("join_ratio", 0.4))
            same = (model, ratio, name) if set(changed) <= FREE_IN_PAPER else None
            _require_same(own, METHOD, f"{name}, {rounds} rounds")
            for entry in entries:
                if data in entry and (entry["model"], entry["join_ratio"], entry["method"]) == same:
                    lines.append([Cell(name), Cell(str(entry["table"])), Cell(f"{ratio:g}"), Cell(str(rounds))])
                    lines[-1] += _beside(own, entry[data])
    if not lines:
        raise UserError("no run with the paper's options")
    parts = [(head, part) for head in OF_PAPER.values() for part in ("here", "paper", "difference")]
    heads = [("", head) for head in ("method", "table", "join ratio", "rounds")]
    return Table("", "", [*heads, *parts], lines)


def _beside(rows: pd.DataFrame, published: Sequence[float]) -> list[Cell]:
    """Return the cells of each of the paper's metrics: ours, the paper's, and the difference in points."""
    cells = []
    for metric, theirs in zip(OF_PAPER, published, strict=True):
        ours = spread(list(rows[metric]))
        cells += [number(ours, 100), plain(theirs), plain(100 * ours.mean - theirs, sign=True)]
    return cells


WORDS = {"settings": "metric", "claims": "reference", "against": "reference"}  # the word of a kind that picks no rows
KINDS: dict[str, Callable[[pd.DataFrame, Args], Table]] = {
    "settings": settings,
    "detail": detail,
    "claims": claims,
    "against": against,
    "search": search,
    "paper": paper,
}
