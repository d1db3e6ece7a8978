"""A site's connection to the server: Flower's SuperNode, without the processes that it starts for every message.

Flower 1.41 starts a ClientApp anew for each message, whatever its isolation mode (its pools of warm processes are for
Kubernetes, and not for ClientApps), and sleeps three seconds between two looks. This program speaks to the SuperLink by
the connection of Flower's own SuperNode (`flwr.supernode.fleet_http_connection`, private: so Flower's version is
fixed), and hands each message to a worker that stays. No code that a server sends is installed or run.
"""

from __future__ import annotations

import argparse
import multiprocessing
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from flwr.app import Error, Message, MessageType
from flwr.common.config import get_fused_config_from_fab
from flwr.common.constant import ErrorCode
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, push_objects
from flwr.supernode.fleet_http_connection import http_request_response

from fedkdx_plugin.flower import certificates
from fedkdx_plugin.flower.packing import pack, unpack
from fedkdx_plugin.flower.processes import interrupt, say

WORKER = "fedkdx_plugin.flower.worker"  # which this process does without: it imports PyTorch
SHORTEST_SECONDS, LONGEST_SECONDS = 0.1, 3.0  # between two looks for a message
TRIES = 2  # of a worker at one message
SHARE = 0.1  # of the time already waited, up to which a message may lie unseen


def pause(waited: float) -> float:
    """Return how long to wait until the next look, after so many seconds without a message."""
    return min(max(SHARE * waited, SHORTEST_SECONDS), LONGEST_SECONDS)


class Worker:
    """A site's worker, started again where it has ended.

    Args:
        setup: file of what the site decides by itself (`site.SiteSetup`).
        client: the site's number.
    """

    def __init__(self, setup: Path, client: int) -> None:
        self.setup, self.client = setup, client
        self._start()

    def ask(self, data: bytes, run: Mapping[str, Any] | None) -> bytes | str:
        """Return the worker's answer (see `worker.answer_all`), or why there is none.

        A worker that ends meanwhile is started again, and asked once more: what it did before its answer does not
        count, so nothing is lost unless it is the work itself that ends it.
        """
        for _ in range(TRIES):
            if self.process.poll() is not None:
                self._start()
            try:
                self._pipe.send((data, run))
                answer: bytes | str = self._pipe.recv()
                return answer
            except (EOFError, OSError):
                reason = f"this site's worker ended with code {self.process.wait()}"
                say(self.client, reason)
        return f"{reason}, {TRIES} times in a row"

    def _start(self) -> None:
        self._pipe, theirs = multiprocessing.Pipe()
        number = theirs.fileno()
        command = [sys.executable, "-m", WORKER, str(self.setup), str(number)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[number])
        theirs.close()  # so that the end of the process is the end of the pipe


class Node:
    """Answers the messages of a SuperLink until the connection ends.

    Args:
        connection: what `http_request_response` gives.
        worker: does the work.
    """

    def __init__(self, connection: tuple[Any, ...], worker: Worker) -> None:
        _, self._receive, self._send, self._run, self._fab, self._pull, self._push, self._confirm = connection
        self.worker = worker
        self._configs: dict[int, Mapping[str, Any]] = {}  # by run

    def attend(self) -> None:
        """Look for messages, and answer each. Raises what the connection raises where it is lost."""
        since = time.monotonic()
        while True:
            got = self._receive()
            if got is None:
                time.sleep(pause(time.monotonic() - since))
                continue
            try:
                self._answer(*got)
            except Exception as error:  # of this message, which the server then misses
                say(self.worker.client, f"a message is lost: {type(error).__name__}: {error}")
            since = time.monotonic()

    def _answer(self, head: Message, tree: Any) -> None:
        run, began = head.metadata.run_id, time.monotonic()
        message = pull_and_inflate_object_from_tree(
            tree,
            lambda id: self._pull(run, id),
            lambda id: self._confirm(run, id),
            return_type=Message,
        )
        message.metadata.__dict__["_message_id"] = tree.object_id  # which its content does not hold
        self._reply(self._work(message), run, time.monotonic() - began)

    def _work(self, message: Message) -> Message:
        """Return the worker's answer as a Flower message."""
        try:
            data, asked = unpack(message.content), message.metadata.message_type
            config = None if asked == MessageType.QUERY else self._config(message.metadata.run_id)
            answer = self.worker.ask(data, config)
        except ValueError as error:
            answer = str(error)
        if isinstance(answer, str):
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, answer), reply_to=message)
        return Message(pack(answer), reply_to=message)

    def _config(self, run: int) -> Mapping[str, Any]:
        """Return a run's configuration, out of the app that is its carrier."""
        if run not in self._configs:
            about = self._run(run)
            self._configs = {run: get_fused_config_from_fab(self._fab(about.fab_hash, run).content, about)}
        return self._configs[run]

    def _reply(self, reply: Message, run: int, seconds: float) -> None:
        reply.metadata.__dict__["_message_id"] = reply.object_id
        wanted, session = self._send(reply, get_object_tree(reply), seconds)
        push_objects(
            get_all_nested_objects(reply),
            lambda id, content: self._push(run, session, id, content),
            object_ids_to_push=wanted,
        )


def main() -> None:
    """Answer a server's messages until the connection ends, or this process is told to end."""
    parser = argparse.ArgumentParser(prog="fedkdx node")
    parser.add_argument("--superlink", required=True)
    parser.add_argument("--client", type=int, required=True)
    parser.add_argument("--setup", type=Path, required=True)
    for name in ("--authority", "--key"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, interrupt)  # so that the server is told

    def refused(number: int, frame: FrameType | None) -> None:
        say(given.client, "error: the server does not accept this site's key, or was started anew")
        raise SystemExit(1)

    signal.signal(signal.SIGINT, refused)  # which Flower sends to its own process then, and nobody else sends
    worker = Worker(given.setup, given.client)
    authority = given.authority.read_bytes() if given.authority else None
    key = certificates.read_key(given.key) if given.key else None
    keys = (key, key.public_key()) if key else None
    try:
        with http_request_response(given.superlink, authority is None, authority, keys) as connection:
            say(worker.client, f"connected to {given.superlink}")
            Node(connection, worker).attend()
    except KeyboardInterrupt:
        return


if __name__ == "__main__":
    main()
