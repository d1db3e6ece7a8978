"""Carry messages over Flower, from the server to its sites and back."""

from __future__ import annotations

import time
from collections.abc import Mapping

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedkdx_plugin.flower.packing import pack, unpack
from fedkdx_plugin.flower.protocol import Announcement
from fedkdx_plugin.flower.roster import Event, Tell
from registry import interface
from registry.interface import BadMessage
from registry.text import shown

POLL_SECONDS = 0.1
LOOK_SECONDS = 5.0  # between two looks at whether a silent site is still connected
ANNOUNCE_SECONDS = 120.0  # for a newcomer to say who it is
AGAIN_SECONDS = 30.0  # before one that was refused is asked again: it may have been put right
NAME = "client-"  # how `serve` registers keys: 'client-3' may be client 3 and nobody else


class FlowerLink:
    """Ask newcomers who they are, and carry requests; the `roster.Link` of a real federation.

    Flower's own waiting loop (`Grid.send_and_receive`) sleeps three seconds between looks; this one looks ten times a
    second.

    Args:
        grid: Flower's.
        tell: is called with each site that is refused.
    """

    def __init__(self, grid: Grid, tell: Tell) -> None:
        self.grid, self.tell = grid, tell
        self._announced: dict[int, Announcement] = {}  # by node
        self._refused: dict[int, tuple[str, float]] = {}  # node -> why, until when it is not asked again
        self._asked: dict[str, tuple[int, float]] = {}  # message -> node, until when
        self._node_of: dict[int, int] = {}

    def content(self, data: bytes) -> RecordDict:
        """Return what a message of these bytes holds."""
        return pack(data)

    def sites(self) -> Mapping[int, Announcement]:
        """Return the announcements of all connected sites that are accepted, by client number."""
        nodes = {node.node_id: node.name for node in self.grid.get_nodes()}
        self._hear(nodes)
        for gone in self._announced.keys() - nodes.keys():  # whoever comes back may be another
            del self._announced[gone]
        pending = [*self._asked.values(), *((node, until) for node, (_, until) in self._refused.items())]
        spoken = {node for node, until in pending if until > time.monotonic()}
        self._ask(sorted(nodes.keys() - self._announced.keys() - spoken))
        self._node_of = {}
        # of two that claim one number, the one that was let in first stays
        for node, site in self._announced.items():
            if node in nodes and site.client not in self._node_of:
                self._node_of[site.client] = node
        return {id: self._announced[node] for id, node in self._node_of.items()}

    def node_of(self, client: int) -> int:
        """Return the node of a client that was there at the last look."""
        return self._node_of[client]

    def refuse(self, client: int, reason: str) -> None:
        """Tell a client why it is not asked to take part."""
        self._let_know(self._node_of[client], reason)

    def exchange(self, requests: Mapping[int, bytes], seconds: float) -> Mapping[int, bytes | str]:
        """Send each client its request; return its answer, or the reason why there is none."""
        until = time.monotonic() + seconds
        messages = [
            Message(self.content(data), dst_node_id=self._node_of[id], message_type=MessageType.TRAIN, ttl=seconds)
            for id, data in requests.items()
        ]
        sent = self.grid.push_messages(messages)
        waiting = {message: id for message, id in zip(sent, requests, strict=True) if message}
        answers: dict[int, bytes | str] = {}
        looked = time.monotonic()
        while waiting and time.monotonic() < until:
            for reply in self.grid.pull_messages(list(waiting)):
                id = waiting.pop(reply.metadata.reply_to_message_id, None)
                if id is not None:
                    answers[id] = content_of(reply)
            if waiting and time.monotonic() - looked > LOOK_SECONDS:
                looked, there = time.monotonic(), set(self.grid.get_node_ids())
                for message, id in list(waiting.items()):
                    if self._node_of[id] not in there:
                        answers[id] = "its connection ended"
                        del waiting[message]
            time.sleep(POLL_SECONDS)
        late = dict.fromkeys(waiting.values(), f"no answer within {seconds:.0f} s (--deadline)")
        return answers | late

    def _ask(self, nodes: list[int]) -> None:
        messages = [
            Message(self.content(b""), dst_node_id=node, message_type=MessageType.QUERY, ttl=ANNOUNCE_SECONDS)
            for node in nodes
        ]
        until = time.monotonic() + ANNOUNCE_SECONDS
        for message, node in zip(self.grid.push_messages(messages) if messages else (), nodes, strict=True):
            if message:
                self._asked[message] = (node, until)

    def _let_know(self, node: int, reason: str) -> None:
        """Tell a site why it gets no requests; no answer is waited for."""
        content = self.content(reason.encode())
        self.grid.push_messages(
            [Message(content, dst_node_id=node, message_type=MessageType.QUERY, ttl=ANNOUNCE_SECONDS)]
        )

    def _hear(self, nodes: Mapping[int, str]) -> None:
        """Accept or refuse the announcements that have arrived."""
        for reply in self.grid.pull_messages(list(self._asked)) if self._asked else ():
            asked = self._asked.pop(reply.metadata.reply_to_message_id, None)
            if asked is None:
                continue
            node, _ = asked
            try:
                content = content_of(reply)
                if isinstance(content, str):
                    raise BadMessage(content)
                site = Announcement.from_message(interface.Message.from_bytes(content))
                self._check(site, node, nodes)
                self._announced[node] = site
            except BadMessage as error:
                if self._refused.get(node, ("",))[0] != str(error):
                    self.tell(Event(0, -1, "refused", f"node {node}: {error}"))
                    self._let_know(node, str(error))
                self._refused[node] = str(error), time.monotonic() + AGAIN_SECONDS

    def _check(self, site: Announcement, node: int, nodes: Mapping[int, str]) -> None:
        """Raise BadMessage where a site claims the number of another."""
        name = nodes.get(node, "")
        if name.startswith(NAME) and name != f"{NAME}{site.client}":
            raise BadMessage(f"calls itself client {site.client}, but its key is {name}'s")
        for other, known in self._announced.items():
            if known.client == site.client and other in nodes:
                raise BadMessage(f"calls itself client {site.client}, which is already there")


def content_of(reply: Message) -> bytes | str:
    """Return the bytes that a reply carries, or the reason why there are none."""
    if reply.has_error():
        return f"Flower says: {shown(reply.error.reason or f'error {reply.error.code}')}"
    try:
        return unpack(reply.content)
    except ValueError as error:
        return str(error)
