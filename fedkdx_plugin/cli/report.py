"""`fedkdx report FOLDER...` writes a report of finished runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from registry.errors import UserError
from registry.flags import Parser

MOST_NAMED = 4  # folders named in the title


def named(text: str | None) -> list[str]:
    """Return the names in a list with commas; [] for None. Raises UserError: it holds no name."""
    names = [name.strip() for name in (text or "").split(",") if name.strip()]
    if text is not None and not names:
        raise UserError("--reference: no name given; write NAME or NAME,NAME")
    return names


def main(words: Sequence[str]) -> int:
    """Write a report. Returns the exit code. Raises UserError: wrong input."""
    parser = Parser(prog="fedkdx report", description="Write a report of the runs in these folders.")
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="folders of runs, comparisons or experiments")
    parser.add_argument("-o", "--out", metavar="DIR", help="folder of the report (default: 'report' in the folder)")
    parser.add_argument(
        "--reference",
        metavar="NAME[,NAME]",
        help="methods that all others are compared with, each with its tests, by the names that they have in a report "
        "(default: FedKDX+ and FedKDX, else the best method)",
    )
    given = parser.parse_args(words)
    references = named(given.reference)
    if given.out is None and len(given.folders) > 1:
        raise UserError("a report of several folders has no default folder; give one with -o DIR")

    from fedkdx_plugin.experiments.experiment import title_and_about
    from fedkdx_plugin.reports import report
    from fedkdx_plugin.results.runs import find, read_all

    folders = [Path(folder) for folder in given.folders]
    found: list[Path] = []
    refused: list[UserError] = []
    for folder in folders:
        try:
            found += find(folder)
        except UserError as error:
            refused.append(error)
    if not found:
        raise refused[0]
    for reason in refused:
        print(f"skipped: {reason}", file=sys.stderr)
    title, about = "", ""
    if len(folders) == 1:
        try:
            title, about = title_and_about(folders[0])
        except UserError as error:
            print(f"skipped: {error}", file=sys.stderr)
    names = list(dict.fromkeys(folder.resolve().name for folder in folders))
    called = ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if (more := len(names) - MOST_NAMED) > 0 else "")
    out = Path(given.out) if given.out else folders[0] / "report"
    runs, missing = read_all(found)
    for one in missing:
        print(f"skipped: {one.name}: {one.reason}", file=sys.stderr)
    print(f"report: {report.compose(runs, missing, out, title or called, about, references)}")
    return 0
