"""A site's worker: a process that stays, with PyTorch and the windows loaded, and does the site's work.

It is a process of its own, so that a crash costs one answer and not the connection, and so that the connection is kept
alive however long a training takes. `node` starts it, and hands it each message over a pipe. Imports no Flower.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fedkdx_plugin.configuration.choice import choose
from fedkdx_plugin.engine.evaluation import SERVED
from fedkdx_plugin.experiments.setting import make_task, training
from fedkdx_plugin.flower.keeping import Keeper
from fedkdx_plugin.flower.options import read_settings
from fedkdx_plugin.flower.processes import say
from fedkdx_plugin.flower.protocol import Answer, Request
from fedkdx_plugin.flower.secure import SecureSite, Step
from fedkdx_plugin.flower.site import LocalData, Site, SiteSetup
from registry.errors import UserError
from registry.interface import BadMessage, Message, Round
from registry.text import shown


def answer_all(pipe: Connection, setup: SiteSetup) -> None:
    """Answer jobs until the other end of the pipe is closed.

    A job is a pair: the server's message, and the run's configuration; None in its place asks for the announcement. The
    answer is a message, or the reason why there is none.
    """
    worker = Worker(setup)
    while True:
        try:
            data, run = pipe.recv()
        except EOFError:
            return
        try:
            answer: bytes | str = worker.announce(data) if run is None else worker.work(data, run)
        except Exception as error:  # costs this answer; the worker stays
            answer = f"{type(error).__name__}: {error}"
            say(setup.client, answer)
        pipe.send(answer)


def main() -> None:
    """Work for the process that started this one: `worker SETUP PIPE`, a file and the number of an inherited pipe.

    Standard input is a pipe, too, which that process keeps open. Its end is the end of this process, also in the midst
    of a training, since another one may take its place.
    """
    setup, pipe = sys.argv[1:]
    threading.Thread(target=_end_with_standard_input, daemon=True).start()
    answer_all(Connection(int(pipe)), SiteSetup.read(Path(setup)))


def _end_with_standard_input() -> None:
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)


class Worker:
    """A site's part in any run. Private state is on disk before an answer leaves.

    What stays in memory are the windows and, within a round, what secure aggregation needs.

    Args:
        setup: what the site decides by itself.
    """

    def __init__(self, setup: SiteSetup) -> None:
        self.setup = setup
        self.data: LocalData | None = None
        self.secure = SecureSite(lambda text: say(setup.client, text))

    def announce(self, reason: bytes) -> bytes:
        """Return this site's announcement, with the windows read anew; print why the server refuses it, if it does."""
        if reason:
            say(self.setup.client, f"refused by the server: {shown(reason.decode(errors='replace'))}")
        self.data = LocalData(self.setup)
        return self.data.announcement().to_message().to_bytes()

    def work(self, data: bytes, run: Mapping[str, Any]) -> bytes:
        """Return the answer to a request to measure, train, or do both, or to a step of secure aggregation."""
        request = None
        try:
            message = Message.from_bytes(data)
            if Step.is_one(message):
                return self.secure.take(Step.from_message(message)).to_message().to_bytes()
            request = Request.from_message(message)
            if request.run != run["run"]:
                raise UserError(f"a request of run {request.run!r} in run {run['run']!r}")
            masked = self._masked(run)
            answer = self._site(run).handle(request)
            if masked:
                answer = self.secure.begin(request.run, answer)
            say(self.setup.client, _summary(request, answer))
        except (UserError, BadMessage) as error:
            say(self.setup.client, f"refused: {error}")
            round = request.round if request else Round(0, 0)
            answer = Answer(self.setup.client, round.index, dropped=f"client {self.setup.client}: {error}")
        return answer.to_message().to_bytes()

    def _masked(self, run: Mapping[str, Any]) -> bool:
        """Return whether this site masks what it sends. Raises UserError: it is to, and the server does not ask."""
        asked = read_settings(str(run["settings"])).secure_aggregation
        if self.setup.secure and not asked:
            raise UserError(
                "this site sends masked updates alone (--secure-aggregation), which the server's run does not ask for"
            )
        return asked

    def _site(self, run: Mapping[str, Any]) -> Site:
        """Return the site of a run, made anew for each request as its state on disk says. Raises UserError."""
        config = read_settings(str(run["settings"]))
        (choice,) = choose(config)
        self.data = self.data or LocalData(self.setup)
        about = self.data.announcement()
        task = make_task(config, about.shape, len(about.classes))
        settings = training(config, choice, self.data.manifest["channels"])
        clients = int(run["clients"])
        keep = Keeper(self.setup, config, choice.entry, task, self.data, clients)
        return Site(self.setup, choice.server, task, choice.params, settings, self.data, clients, keep)


def _summary(request: Request, answer: Answer) -> str:
    """Return what an operator of the site sees of a round."""
    did = []
    if answer.metrics:
        samples, accuracy = answer.metrics[SERVED].row[:2].tolist()
        did.append(f"measured on {samples:.0f} windows, accuracy {100 * accuracy:.1f} %")
    if answer.reply is not None:
        did.append(f"trained, loss {answer.loss:.4f}")
    if answer.dropped:
        did.append(f"sent no update: {answer.dropped}")
    return f"{request.run} round {request.round.index}/{request.round.total}: {'; '.join(did)}"


if __name__ == "__main__":
    main()
