"""`fedkdx list` shows algorithms, models and data sets; `fedkdx list NAME` one of them, with its hyper-parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from registry import catalog
from registry.description import describe
from registry.errors import UserError
from registry.flags import Parser
from registry.parameters import key_of, suggest


def main(words: Sequence[str]) -> int:
    """Print the catalog, or what is known of one name. Returns the exit code. Raises UserError: an unknown name."""
    parser = Parser(
        prog="fedkdx list", description="Show algorithms, models and data sets, and which package provides them."
    )
    parser.add_argument("name", nargs="?", help="show this one alone; of an algorithm, also its hyper-parameters")
    name = parser.parse_args(words).name
    if name is not None:
        return _show(name)
    for kind in catalog.BUILT_IN:
        print(f"{'data sets' if kind == 'datasets' else kind}:")
        entries = catalog.entries(kind)
        claims = [entry.name.lower() for entry in entries]
        width = max(len(entry.name) for entry in entries)
        for entry in entries:
            ambiguous = claims.count(entry.name.lower()) > 1
            _print(entry, width, "AMBIGUOUS: several packages claim this name" if ambiguous else "")
        print()
    return 0


def _show(name: str) -> int:
    """Print what is known of a name of any kind."""
    known = {entry.name: kind for kind in catalog.BUILT_IN for entry in catalog.entries(kind)}
    kinds = sorted({kind for other, kind in known.items() if other.lower() == name.lower()})
    if not kinds:
        raise UserError(
            f"no algorithm, model or data set is called '{name}'{suggest(name, known)}; fedkdx list shows all"
        )
    for kind in kinds:
        entry = catalog.find(kind, name)
        print(f"{catalog.NOUNS[kind]}:")
        _print(entry, len(entry.name))
        if kind == "algorithms":
            _print_hyper_parameters(entry)
    return 0


def _print(entry: catalog.Entry, width: int, problem: str = "") -> None:
    """Print name, summary, what is sent, paper and origin of an entry, or why it cannot be loaded."""
    about = describe(entry)
    text = problem or (f"BROKEN: {about.broken}" if about.broken else about.summary)
    print(f"  {entry.name:{width}}  {text}")
    if about.sends:
        print(f"  {'':{width}}  {about.sends}")
    print(f"  {'':{width}}  " + "; ".join(filter(None, (about.paper, entry.origin))))


def _print_hyper_parameters(entry: catalog.Entry) -> None:
    """Print the hyper-parameters of an algorithm as they are set; loads the algorithm, and so torch."""
    from fedkdx_plugin.configuration.choice import Common

    declared = dataclasses.fields(catalog.load_entry(entry).Params)  # type: ignore[attr-defined]  # of a Server
    print(f"  hyper-parameters (--set {entry.name}.NAME=VALUE):")
    for own in (*declared, *dataclasses.fields(Common)):
        default = ",".join(own.default) if isinstance(own.default, tuple) else own.default
        print(f"    {key_of(own)}={'' if default is None else default}  {own.metadata['help']}")
