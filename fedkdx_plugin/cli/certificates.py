"""`fedkdx certificates FOLDER`: keys and certificates to try a federation out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedkdx_plugin.flower import require_flower
from registry.errors import UserError
from registry.flags import Parser, add_flags, given
from registry.parameters import Params, option, parse


@dataclass(frozen=True)
class Keys(Params):
    """For how many sites keys are made."""

    sites: int | None = option(None, "how many sites", 1, flags="--sites")


def main(words: Sequence[str]) -> int:
    """Make the folder. Returns the exit code; raises UserError."""
    parser = Parser(
        prog="fedkdx certificates",
        description="Make an authority, a server's certificate and a key for each site, to try a federation out.",
    )
    text = "a new folder: 'server' in it is the server's, 'site-0' the first site's"
    parser.add_argument("folder", type=Path, help=text)
    parser.add_argument("--host", action="append", required=True, help="name or address of the server; may be repeated")
    add_flags(parser, Keys)
    arguments = parser.parse_args(words)
    keys = parse(Keys, given(arguments, Keys))
    if keys.sites is None:
        raise UserError("--sites: missing; write --sites N, for how many sites keys are to be made")
    require_flower()
    from fedkdx_plugin.flower import certificates

    folder = arguments.folder
    certificates.make(folder, arguments.host, keys.sites)
    print(f"made {folder}: give {folder}/site-<k> to site k alone, and keep {folder}/server")
    return 0
