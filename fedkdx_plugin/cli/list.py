"""`fedkdx list` shows algorithms, models and data sets."""

from __future__ import annotations

from collections.abc import Sequence

from registry import catalog
from registry.flags import Parser


def main(words: Sequence[str]) -> int:
    """Print the catalog: name, summary, paper and origin, or why an entry cannot be loaded. Returns the exit code."""
    Parser(
        prog="fedkdx list", description="Show algorithms, models and data sets, and which package provides them."
    ).parse_args(words)
    for kind in catalog.BUILT_IN:
        print(f"{'data sets' if kind == 'datasets' else kind}:")
        entries = catalog.entries(kind)
        claims = [entry.name.lower() for entry in entries]
        width = max(len(entry.name) for entry in entries)
        for entry in entries:
            about = catalog.describe(entry)
            if claims.count(entry.name.lower()) > 1:
                text = "AMBIGUOUS: several packages claim this name"
            else:
                text = f"BROKEN: {about.broken}" if about.broken else about.summary
            print(f"  {entry.name:{width}}  {text}")
            if about.sends:
                print(f"  {'':{width}}  {about.sends}")
            print(f"  {'':{width}}  " + "; ".join(filter(None, (about.paper, entry.origin))))
        print()
    return 0
