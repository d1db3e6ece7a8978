"""`fedkdx join`: a site's machine."""

from __future__ import annotations

import argparse
import re
import sys
import time

import torch

from dataset_utils import shards
from fedkdx_plugin.flower import certificates, supernode
from fedkdx_plugin.flower.processes import COLOUR, Processes, last_words
from fedkdx_plugin.flower.site import LocalData, Place
from fedkdx_plugin.flower.tail import Tail
from registry.errors import UserError

AGAIN_SECONDS = 5.0  # before a SuperNode that has ended is started again
SOON_SECONDS = 30.0  # one that ends before this has hardly been there
ATTEMPTS = 3  # how often that may happen on end
WORTH_SAYING = re.compile(r"^fedkdx site |WARNING|ERROR|SuperNode ID|^\[code")


def run(given: argparse.Namespace) -> int:
    """Take part until Ctrl-C. Returns the exit code; raises UserError where that is not possible."""
    place = _place(given)
    about = LocalData(place).announcement()  # finds out here, not at the server, that it cannot be read
    channels, _, length = about.shape
    print(
        f"client {place.client}: {about.samples} training and {about.tests} {about.evaluated_on} windows of {channels} "
        f"channels x {length}, {len(about.classes)} classes; {place.device}; state in {place.state}",
        flush=True,
    )
    try:
        with Processes() as processes:
            _stay(processes, place, _server(given))
    except KeyboardInterrupt:
        print("\nleft the federation; the same command joins again", file=sys.stderr)
    return 130


def _stay(processes: Processes, place: Place, server: supernode.Server) -> None:
    """Start the SuperNode, and start it again when it ends. Raises UserError where it ends again and again."""
    short = 0
    while short < ATTEMPTS:
        began = time.monotonic()
        process, log = supernode.start(processes, place, server)
        tail = Tail(log)
        while process.poll() is None:
            _say(tail)
            time.sleep(0.2)
        _say(tail)
        short = short + 1 if time.monotonic() - began < SOON_SECONDS else 0
        print(f"the connection ended; joining again in {AGAIN_SECONDS:.0f} s", file=sys.stderr, flush=True)
        time.sleep(AGAIN_SECONDS)
    raise UserError(
        f"cannot stay in the federation: {last_words(log)}; does the server know this site's key, and was its "
        f"certificate signed by this site's authority? (all of it: {log})"
    )


def _say(tail: Tail) -> None:
    for line in tail.lines():
        if WORTH_SAYING.search(line):
            print(COLOUR.sub("", line).removeprefix("fedkdx "), file=sys.stderr, flush=True)


def _place(given: argparse.Namespace) -> Place:
    count = len(shards.read_manifest(given.data)["clients"])
    if given.shard is None and count > 1:
        raise UserError(f"{given.data}: holds {count} shards; which is this site's? --shard 0 to {count - 1}")
    cuda = torch.cuda.is_available()
    if given.device == "cuda" and not cuda:
        raise UserError("-dev cuda: this PyTorch finds no CUDA device; use -dev cpu")
    device = torch.device("cuda" if cuda and given.device != "cpu" else "cpu")
    return Place(given.client, given.data, given.shard or 0, given.state, device)


def _server(given: argparse.Namespace) -> supernode.Server:
    host, _, port = given.server.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--server {given.server}: write HOST:PORT")
    if given.insecure:
        return supernode.Server(given.server)
    files = [given.certificates / name for name in (certificates.AUTHORITY, certificates.SITE_KEY)]
    for path in files:
        if not path.is_file():
            raise UserError(f"{path}: missing; whoever runs the server gives it to this site")
    return supernode.Server(given.server, *files)
