"""Flower without its processes: a grid that hands each message to a ClientApp of a node, and its reply back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

FIRST = 7_000_000_000_000_000_000  # node ids are large, and in no order that has to do with clients' numbers


def set_identity() -> None:
    """Let Flower's messages be made outside of its processes, by what is private in this version."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1


class FakeGrid(Grid):
    """Nodes in this process, each with a context of its own; tests take some away, or spoil their replies.

    Args:
        app: the nodes' ClientApp, or one for each.
        nodes: number of nodes; node k is client k, and those of higher numbers have lower ids.

    Attributes:
        contexts: node -> its context.
        away: nodes that are not connected.
        spoil: client -> what becomes of its reply; None is silence. Replies to queries stay as they are.
        sent, came: all messages that travelled to nodes, and back.
    """

    def __init__(self, app: ClientApp | list[ClientApp], nodes: int = 3) -> None:
        apps = app if isinstance(app, list) else [app] * nodes
        ids = [FIRST - 1000 * client for client in range(nodes)]
        self.client_of = {id: client for client, id in enumerate(ids)}
        self.apps = dict(zip(ids, apps, strict=True))
        self.contexts = {id: Context(1, id, {"partition-id": k}, RecordDict(), {}) for k, id in enumerate(ids)}
        self.away: set[int] = set()
        self.spoil: dict[int, Callable[[Message], Message | None]] = {}
        self.sent: list[Message] = []
        self.came: list[Message] = []
        self._replies: dict[str, Message] = {}
        self._numbers = itertools.count(1)
        set_identity()

    def set_run(self, run) -> None:
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, *args, **options) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self.contexts.keys() - self.away)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = id = str(next(self._numbers))
            self.sent.append(message)
            ids.append(id)
            if reply := self._answer(message):
                self._replies[id] = reply
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(id) for id in list(message_ids) if id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        ids = list(self.push_messages(list(messages)))
        return list(self.pull_messages(reversed(ids)))  # the order of arrival must not matter

    def _answer(self, message: Message) -> Message | None:
        node = message.metadata.dst_node_id
        try:
            reply = self.apps[node](message, self.contexts[node])
        except Exception as error:  # as Flower tells the server of it
            reply = Message(Error(2, f"{type(error).__name__}: {error}"), reply_to=message)
        self.came.append(reply)
        client = self.client_of[node]
        if message.metadata.message_type == "query" or client not in self.spoil:
            return reply
        return self.spoil[client](reply)
