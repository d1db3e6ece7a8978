"""`fedkdx join` takes part in a federation with this site's own data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedkdx_plugin.cli.options import add_security, whole
from fedkdx_plugin.flower import require_flower
from registry.flags import Parser


def main(words: Sequence[str]) -> int:
    """Take part until Ctrl-C. Returns the exit code. Raises UserError: wrong input."""
    parser = Parser(
        prog="fedkdx join", description="Take part in a federation with this site's own shards, until Ctrl-C."
    )
    parser.add_argument("--server", required=True, metavar="HOST:PORT", help="address of `fedkdx serve`")
    parser.add_argument("--client", required=True, metavar="K", help="number of this site, from 0")
    parser.add_argument("-data", "--data", type=Path, required=True, help="folder of shards (fedkdx data make)")
    parser.add_argument("--shard", metavar="S", help="number of the shard in the folder, if it holds several")
    parser.add_argument(
        "--state", type=Path, required=True, help="folder for the client state, which stays at this site"
    )
    parser.add_argument("-dev", "--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    add_security(parser, "ca.pem and this site's private key, site.key")
    given = parser.parse_args(words)
    given.client = whole(given.client, "--client", 0)
    given.shard = None if given.shard is None else whole(given.shard, "--shard", 0)
    require_flower()
    from fedkdx_plugin.flower import join

    return join.run(given)
