"""Tables as Markdown, LaTeX (booktabs) and CSV; the HTML page has its own template."""

from __future__ import annotations

import csv
import io
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedkdx_plugin.reports.statistics import Spread

NONE = "–"


@dataclass(frozen=True)
class Cell:
    """Cell of a table.

    Attributes:
        text: text to show.
        value, std: the same as numbers, for CSV; None if there is only text.
        rank: 1 for the best of the column, 2 for the second, 0 for all others.
        seeds: number of seeds that the value is a mean of, and number of all seeds; None where it is no such mean.
    """

    text: str
    value: float | None = None
    std: float | None = None
    rank: int = 0
    seeds: tuple[int, int] | None = None

    @property
    def partial(self) -> bool:
        """Return whether seeds are missing in the value."""
        return self.seeds is not None and self.seeds[0] < self.seeds[1]


@dataclass(frozen=True)
class Table:
    """Table, whose first column has the names of the rows.

    Attributes:
        name: name of its files.
        caption: what it shows, and how to read it.
        columns: (group, title); adjacent columns of one group share a heading, '' has none.
        rows: rows, with one cell for each column.
    """

    name: str
    caption: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[Cell]]

    def groups(self) -> list[tuple[str, int]]:
        """Return the headings of groups and the number of columns that each spans; [] if there are no groups."""
        spans = [(name, len(list(same))) for name, same in itertools.groupby(group for group, _ in self.columns)]
        return spans if any(name for name, _ in spans) else []


def number(values: Spread, scale: float = 1.0, digits: int = 2, sign: bool = False) -> Cell:
    """Return a cell with mean ± std, times `scale`, and of how many seeds it is if not of all; '–' without a value."""
    seeds = (values.n, values.of) if values.of else None
    if np.isnan(values.mean):
        return Cell(NONE, seeds=seeds)
    spec = f"{'+' if sign else ''}.{digits}f"
    mean, std = scale * values.mean, scale * values.std
    spread = "" if np.isnan(std) else f" ± {std:.{digits}f}"
    # a mean over only the seeds that have a value may be far from that over all
    few = f" ({values.n} of {values.of} seeds)" if values.n < values.of else ""
    return Cell(f"{mean:{spec}}{spread}".replace("-", "−") + few, mean, None if np.isnan(std) else std, seeds=seeds)


def plain(value: float, digits: int = 2, sign: bool = False) -> Cell:
    """Return a cell with one number."""
    return number(Spread(value, float("nan"), 1), digits=digits, sign=sign)


def ranked(column: Sequence[Cell], among: Iterable[int], digits: int = 2) -> list[Cell]:
    """Return the column with the ranks 1 and 2 in the rows `among`; values that are equal as shown share a rank."""
    known = ((i, column[i].value) for i in among)
    values = {i: round(value, digits) for i, value in known if value is not None}
    best = sorted(set(values.values()), reverse=True)[:2]
    places = {value: place for place, value in enumerate(best, 1)} if len(values) > 1 else {}
    return [replace(cell, rank=places.get(values[i], 0) if i in values else 0) for i, cell in enumerate(column)]


def markdown(table: Table) -> str:
    """Return an aligned Markdown table; the best is bold, the second in italics, as Markdown cannot underline."""
    header = [escaped(f"{group} {title}".strip()) for group, title in table.columns]
    marks = ("", "**", "*")
    cells = [[f"{marks[cell.rank]}{escaped(cell.text)}{marks[cell.rank]}" for cell in row] for row in table.rows]
    widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]
    rule = [("-" * width) if i == 0 else f"{'-' * (width - 1)}:" for i, width in enumerate(widths)]
    lines = [
        " | ".join(
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in (header, rule, *cells)
    ]
    return "".join(f"| {line} |\n" for line in lines)


def escaped(text: str) -> str:
    """Escape the characters that have a meaning in Markdown."""
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|~" else c for c in text)


LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "±": r"$\pm$",
    "–": "--",
    "−": "$-$",
    "<": "$<$",
    ">": "$>$",
    "ε": r"$\varepsilon$",
    "α": r"$\alpha$",
    "γ": r"$\gamma$",
    "λ": r"$\lambda$",
    "μ": r"$\mu$",
    "τ": r"$\tau$",
} | {c: f"\\{c}" for c in "&%$#_{}"}


def latex(table: Table) -> str:
    r"""Return a LaTeX `table` environment; the preamble needs \usepackage{booktabs}."""
    columns = "l" + "r" * (len(table.columns) - 1)
    lines = [r"\begin{table}", r"\centering", rf"\caption{{{_latex(table.caption)}}}", rf"\label{{tab:{table.name}}}"]
    lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule"]
    lines += _latex_groups(table)
    lines += [" & ".join(_latex(title) for _, title in table.columns) + r" \\", r"\midrule"]
    marks = ("{}", r"\textbf{{{}}}", r"\underline{{{}}}")
    lines += [" & ".join(marks[cell.rank].format(_latex(cell.text)) for cell in row) + r" \\" for row in table.rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def _latex_groups(table: Table) -> list[str]:
    """Return the lines of the headings of groups; [] if there are no groups."""
    spans = table.groups()
    if not spans:
        return []
    ends = list(itertools.accumulate(span for _, span in spans))
    heads = [rf"\multicolumn{{{span}}}{{c}}{{{_latex(name)}}}" if name else " & " * (span - 1) for name, span in spans]
    rules = [rf"\cmidrule(lr){{{end - span + 1}-{end}}}" for (name, span), end in zip(spans, ends, strict=True) if name]
    return [" & ".join(heads) + r" \\", " ".join(rules)]


def _latex(text: str) -> str:
    """Escape the characters that have a meaning in LaTeX; hyphens that follow each other would become a dash."""
    pieces = re.split("(?<=-)(?=-)", text)
    return "{}".join("".join(LATEX.get(c, c) for c in piece) for piece in pieces)


def to_csv(table: Table) -> str:
    """Return CSV with plain numbers; a column with standard deviations is followed by one that contains them.

    Where means leave seeds out, a column with the number of seeds of each follows. The field of a missing number is
    empty.
    """
    columns = [[row[i] for row in table.rows] for i in range(len(table.columns))]
    kept = [(True, any(c.std is not None for c in own), any(c.partial for c in own)) for own in columns]
    header = [f"{group} {title}".strip() for group, title in table.columns]

    def line(fields: Iterable[tuple[object, object, object]]) -> list[object]:
        return [item for own, which in zip(fields, kept, strict=True) for item in itertools.compress(own, which)]

    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(line((name, f"{name} std", f"{name} seeds") for name in header))
    for row in table.rows:
        writer.writerow(line((_field(cell), cell.std, cell.seeds[0] if cell.seeds else None) for cell in row))
    return file.getvalue()


def _field(cell: Cell) -> float | str:
    """Return what CSV has in the place of a cell."""
    if cell.value is not None:
        return cell.value
    return "" if cell.text == NONE else cell.text
