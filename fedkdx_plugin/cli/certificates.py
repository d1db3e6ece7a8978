"""`fedkdx certificates FOLDER` makes keys and certificates for trying a federation out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedkdx_plugin.cli.options import whole
from fedkdx_plugin.flower import require_flower
from registry.flags import Parser


def main(words: Sequence[str]) -> int:
    """Make the folder. Returns the exit code. Raises UserError: wrong input."""
    parser = Parser(
        prog="fedkdx certificates",
        description="Make an authority, a certificate for the server and a key for each site, to try a federation out.",
    )
    text = "folder to make: 'server' in it is for the server, 'site-0' for the first site"
    parser.add_argument("folder", type=Path, help=text)
    parser.add_argument("--host", action="append", required=True, help="name or address of the server; may be repeated")
    parser.add_argument("--sites", required=True, metavar="N", help="number of sites")
    given = parser.parse_args(words)
    sites = whole(given.sites, "--sites", 1)
    require_flower()
    from fedkdx_plugin.flower import certificates

    certificates.make(given.folder, given.host, sites)
    print(f"made {given.folder}: give {given.folder}/site-<k> to site k alone, and keep {given.folder}/server")
    return 0
