"""`fedkdx audit FOLDER...` attacks finished or running runs, to measure what they leak."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedkdx_plugin.privacy.audit.options import AuditOptions
from registry.flags import Parser, add_flags, given
from registry.parameters import parse


def main(words: Sequence[str]) -> int:
    """Audit runs. Returns the exit code: 1 if some could not be audited, 2 if none could. Raises UserError."""
    parser = Parser(
        prog="fedkdx audit",
        description="Attack runs and say what they leak: which windows were trained on, what an update gives away, who "
        "sent it.",
        epilog="results are in audit/ of each run folder, and in the next fedkdx report; example: fedkdx audit "
        "runs/mine --attacks membership --shadows 8",
    )
    parser.add_argument("folders", nargs="+", metavar="FOLDER", type=Path, help="run folders, or folders of runs")
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for the table of several runs (default: FOLDER, if it is one)",
    )
    add_flags(parser, AuditOptions)
    arguments = parser.parse_args(words)
    options = parse(AuditOptions, given(arguments, AuditOptions))

    from fedkdx_plugin.privacy.audit.several import audit_all
    from fedkdx_plugin.results.audits import FOLDER

    audits = audit_all(arguments.folders, options)
    if not audits.found:
        return 2
    print(repr(audits), end="", flush=True)
    for folder in audits.found:
        print(f"audit: {folder / FOLDER}")
    alone = list(audits.found) == arguments.folders
    out = arguments.out or (arguments.folders[0] if len(arguments.folders) == 1 and not alone else None)
    if out:
        audits.write(out)
        print(f"comparison: {out / 'audit.md'}")
    return 1 if audits.refused else 0
