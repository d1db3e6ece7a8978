"""`fedkdx serve`, `fedkdx join` and `fedkdx certificates`: a federation of real sites."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dataset_utils.spec import Parser
from fedkdx_plugin.cli.arguments import build_parser, read_config, resumed
from fedkdx_plugin.flower import require_flower
from registry.errors import UserError

PORT = 9092
OWN = ("sites", "min_clients", "wait", "deadline", "host", "port", "certificates", "insecure")  # of `serve`
ELSEWHERE = "sites"  # stands for the data set's name where the data are the sites' own


def main(command: Sequence[str]) -> int:
    """Run one of the three. Returns the exit code; raises UserError."""
    name, *arguments = command
    return {"serve": _serve, "join": _join, "certificates": _certificates}[name](arguments)


def _certificates(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="fedkdx certificates",
        description="Make an authority, a server's certificate and a key for each site, to try a federation out.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "folder", type=Path, help="a new folder: 'server' in it is the server's, 'site-0' the first site's"
    )
    parser.add_argument("--host", action="append", required=True, help="name or address of the server; may be repeated")
    parser.add_argument("--sites", type=_positive, required=True, metavar="N", help="how many sites")
    given = parser.parse_args(arguments)
    require_flower()
    from fedkdx_plugin.flower import certificates

    certificates.make(given.folder, given.host, given.sites)
    print(f"made {given.folder}: give {given.folder}/site-<k> to site k alone, and keep {given.folder}/server")
    return 0


def _serve(arguments: Sequence[str]) -> int:
    parser = build_parser()
    parser.prog = "fedkdx serve"
    parser.description = "Run algorithms between sites, each of which joins with its own data (`fedkdx join`)."
    parser.epilog = "example: fedkdx serve --sites 2 --certificates keys/server -algo FedKDX -m cnn -gr 20"
    group = parser.add_argument_group("the federation")
    group.add_argument("--sites", type=_positive, required=True, metavar="N", help="how many sites at most")
    group.add_argument("--min-clients", type=_positive, metavar="N", help="sites a round needs (default: all)")
    group.add_argument("--wait", type=_seconds, default=600.0, help="seconds to wait for them (default: 600)")
    group.add_argument("--deadline", type=_seconds, default=600.0, help="seconds for a round (default: 600)")
    group.add_argument("--host", default="0.0.0.0", help="address to listen on (default: all of this machine's)")
    group.add_argument("--port", type=_port, default=PORT, help=f"port to listen on (default: {PORT})")
    _add_security(group, "server.pem, server.key, and the sites' public keys in 'keys'")
    options = parser.parse_args(arguments)
    own = {name: vars(options).pop(name) for name in OWN}
    least = own["min_clients"] or own["sites"]
    if least > own["sites"]:
        raise UserError(f"--min-clients {least}: there are at most {own['sites']} sites (--sites)")
    for name in ("list", "dry_run", "tensorboard", "report", "experiment"):
        if getattr(options, name):
            raise UserError(f"--{name.replace('_', '-')}: not with `fedkdx serve`")
    if options.data:
        raise UserError("-data: the data are the sites' own (fedkdx join); leave it out")
    folder = resumed(options)
    if not folder:
        options.data = ELSEWHERE
    config = read_config(options)
    require_flower()
    from fedkdx_plugin.flower import serve
    from fedkdx_plugin.flower.plan import Terms

    terms = Terms(own["sites"], least, own["wait"], own["deadline"])
    gate = serve.Gate(own["host"], own["port"], own["certificates"])
    return serve.run(config, ["fedkdx", "serve", *arguments], folder, terms, gate)


def _join(arguments: Sequence[str]) -> int:
    parser = Parser(
        prog="fedkdx join",
        description="Take part in a federation with this site's own shards; until Ctrl-C.",
        allow_abbrev=False,
    )
    parser.add_argument("--server", required=True, metavar="HOST:PORT", help="where `fedkdx serve` listens")
    parser.add_argument("--client", type=_whole, required=True, metavar="K", help="this site's number, from 0")
    parser.add_argument("-data", "--data", type=Path, required=True, help="folder of shards (dataset_utils.generate)")
    parser.add_argument("--shard", type=_whole, metavar="S", help="which of them, where there are several")
    parser.add_argument("--state", type=Path, required=True, help="folder for what this site keeps to itself")
    parser.add_argument("-dev", "--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    _add_security(parser, "ca.pem and this site's private key, site.key")
    given = parser.parse_args(arguments)
    require_flower()
    from fedkdx_plugin.flower import join

    return join.run(given)


def _add_security(parser: argparse._ActionsContainer, what: str) -> None:
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--certificates", type=Path, metavar="FOLDER", help=f"a folder with {what}")
    either.add_argument("--insecure", action="store_true", help="no encryption, anybody may join: for tests alone")


def _whole(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text}: a whole number from 0 was expected")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text}: a whole number from 1 was expected")
    return int(text)


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text}: a number of seconds above 0 was expected")
    return value


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text}: a port between 1 and 65535 was expected")
    return int(text)
