"""A site's machine: a node with its own shards and its own folder for private state (`fedkdx join`)."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from dataset_utils import shards
from fedkdx_plugin.flower import certificates
from fedkdx_plugin.flower.options import SiteOptions
from fedkdx_plugin.flower.processes import COLOUR, Processes, Tail, last_words
from fedkdx_plugin.flower.site import LocalData, SiteSetup
from registry.errors import UserError

AGAIN_SECONDS = 5.0  # before a node that has ended is started again
SOON_SECONDS = 30.0  # a node that ends before this could not connect
ATTEMPTS = 3  # how often in a row that may happen
NODE = "fedkdx_plugin.flower.node"
WORTH_PRINTING = re.compile(r"^fedkdx site |WARNING|ERROR|^\[code")


@dataclass(frozen=True)
class Connection:
    """How a site reaches the server.

    Attributes:
        address: 'host:port'.
        authority: the certificate that must have signed the server's; None: no TLS.
        key: the site's private key; None where the server asks for none.
    """

    address: str
    authority: Path | None = None
    key: Path | None = None


def start(
    processes: Processes, setup: SiteSetup, connection: Connection, threads: int = 0
) -> tuple[subprocess.Popen[bytes], Path]:
    """Start a site's node; return the process and its log.

    Args:
        threads: number of PyTorch's threads at this site; 0: PyTorch's default.
    """
    setup.state.mkdir(parents=True, exist_ok=True)
    config, log = setup.state / "site.json", setup.state / "supernode.log"
    setup.write(config)
    command = [sys.executable, "-m", NODE, "--superlink", connection.address]
    command += ["--client", str(setup.client), "--setup", str(config.absolute())]
    for flag, path in (("--authority", connection.authority), ("--key", connection.key)):
        command += [flag, str(path.absolute())] if path else []
    env = {"OMP_NUM_THREADS": str(threads)} if threads else {}
    return processes.start(command, setup.state / "flower", log, env), log


def join(options: SiteOptions, given: Path | None) -> int:
    """Take part in a federation until Ctrl-C (`fedkdx join`). Returns the exit code.

    Args:
        given: the site's folder of certificates and keys; None: neither TLS nor authentication.

    Raises:
        UserError: wrong input, or the server cannot be reached.
    """
    authority, key = certificates.site_files(given) if given else (None, None)
    connection = Connection(options.server, authority, key)
    setup = _setup(options)
    about = LocalData(setup).announcement()  # finds wrong shards now, not when the server asks
    channels, _, length = about.shape
    print(
        f"client {setup.client}: {about.samples} training and {about.tests} {about.evaluated_on} windows of {channels} "
        f"channels x {length}, {len(about.classes)} classes; {setup.device}; state in {setup.state}",
        flush=True,
    )
    try:
        with Processes() as processes:
            _stay(processes, setup, connection)
    except KeyboardInterrupt:
        print("\nleft the federation; the same command joins again", file=sys.stderr)
    return 130


def _stay(processes: Processes, setup: SiteSetup, connection: Connection) -> None:
    """Start the node, and start it again when it ends. Raises UserError where it cannot stay connected."""
    short, log = 0, Path()
    while short < ATTEMPTS:
        began = time.monotonic()
        process, log = start(processes, setup, connection)
        tail = Tail(log)
        while process.poll() is None:
            _print(tail)
            time.sleep(0.2)
        _print(tail)
        short = short + 1 if time.monotonic() - began < SOON_SECONDS else 0
        print(f"the connection ended; joining again in {AGAIN_SECONDS:.0f} s", file=sys.stderr, flush=True)
        time.sleep(AGAIN_SECONDS)
    raise UserError(
        f"cannot stay in the federation: {last_words(log)}; does the server know this site's key, and was its "
        f"certificate signed by this site's authority? The whole log is {log}"
    )


def _print(tail: Tail) -> None:
    """Print the new lines of a node's log that concern an operator."""
    for line in tail.lines():
        if WORTH_PRINTING.search(line):
            print(COLOUR.sub("", line).removeprefix("fedkdx "), file=sys.stderr, flush=True)


def _setup(options: SiteOptions) -> SiteSetup:
    """Return the site that options describe. Raises UserError: no such shard or device."""
    folder = Path(options.data)
    count = len(shards.read_manifest(folder)["clients"])
    if options.shard is None and count > 1:
        raise UserError(f"{folder}: holds {count} shards; give the number of this site's, --shard 0 to {count - 1}")
    cuda = torch.cuda.is_available()
    if options.device == "cuda" and not cuda:
        raise UserError("-dev cuda: this PyTorch finds no CUDA device; use -dev cpu")
    device = torch.device("cuda" if cuda and options.device != "cpu" else "cpu")
    secure = options.secure_aggregation
    return SiteSetup(options.client or 0, folder, options.shard or 0, Path(options.state), device, secure)
