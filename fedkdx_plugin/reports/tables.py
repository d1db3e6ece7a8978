"""Tables as Markdown, LaTeX (booktabs) and CSV; the HTML page has its own template."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

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
    """

    text: str
    value: float | None = None
    std: float | None = None
    rank: int = 0


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
    """Return a cell with mean ± std, times `scale`; '–' if there is no value."""
    if np.isnan(values.mean):
        return Cell(NONE)
    spec = f"{'+' if sign else ''}.{digits}f"
    mean, std = scale * values.mean, scale * values.std
    if np.isnan(std):
        return Cell(f"{mean:{spec}}".replace("-", "−"), mean)
    return Cell(f"{mean:{spec}} ± {std:.{digits}f}".replace("-", "−"), mean, std)


def plain(value: float, digits: int = 2, sign: bool = False) -> Cell:
    """Return a cell with one number."""
    return number(Spread(value, float("nan"), 1), digits=digits, sign=sign)


def ranked(column: Sequence[Cell], among: Iterable[int], digits: int = 2) -> list[Cell]:
    """Return the column with the ranks 1 and 2 in the rows `among`; values that are equal as shown share a rank."""
    known = ((i, column[i].value) for i in among)
    values = {i: round(value, digits) for i, value in known if value is not None}
    best = sorted(set(values.values()), reverse=True)[:2]
    places = {value: place for place, value in enumerate(best, 1)} if len(values) > 1 else {}
    return [
        Cell(cell.text, cell.value, cell.std, places.get(values[i], 0) if i in values else 0)
        for i, cell in enumerate(column)
    ]


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
    """Escape the characters that have a meaning in LaTeX."""
    return "".join(LATEX.get(c, c) for c in text)


def to_csv(table: Table) -> str:
    """Return CSV with plain numbers; a column with standard deviations is followed by one that contains them.

    The field of a missing number is empty.
    """
    with_std = [any(row[i].std is not None for row in table.rows) for i in range(len(table.columns))]
    header = [f"{group} {title}".strip() for group, title in table.columns]

    def line(cells: Sequence[Sequence[object]]) -> list[object]:
        return [item for pair, std in zip(cells, with_std, strict=True) for item in (pair if std else pair[:1])]

    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(line([(name, f"{name} std") for name in header]))
    for row in table.rows:
        writer.writerow(line([(_field(cell), cell.std) for cell in row]))
    return file.getvalue()


def _field(cell: Cell) -> float | str:
    """Return what CSV has in the place of a cell."""
    if cell.value is not None:
        return cell.value
    return "" if cell.text == NONE else cell.text
