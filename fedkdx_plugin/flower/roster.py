"""Who takes part: the sites that are connected, and whether what they announce fits together."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fedkdx_plugin.flower.protocol import COMMON, Announcement
from registry import __version__
from registry.errors import UserError

LOOK_SECONDS = 1.0  # between two looks at who is there
SAY_SECONDS = 30.0  # between two lines about waiting


@dataclass(frozen=True)
class Event:
    """Something that happened between the server and a site.

    Attributes:
        round: in which one (0: before the first).
        client: with whom; -1 where nobody knows.
        event: 'joined', 'left', 'refused', 'answered' or 'silent'.
        detail: more of it, in words.
        bytes_down, bytes_up: of the request and the answer, as serialised.
        seconds: until the answer.
    """

    round: int
    client: int
    event: str
    detail: str = ""
    bytes_down: int = 0
    bytes_up: int = 0
    seconds: float = 0.0


Tell = Callable[[Event], None]


class Link(Protocol):
    """The way to the sites."""

    def sites(self) -> Mapping[int, Announcement]:
        """Who is connected now, by client number."""

    def refuse(self, client: int, reason: str) -> None:
        """Let a client know why it is not asked to take part."""

    def exchange(self, requests: Mapping[int, bytes], seconds: float) -> Mapping[int, bytes | str]:
        """Send each client its request and wait at most so long: client -> its answer, or why there is none."""


class Roster:
    """Which clients can be asked now. The first who are enough say what the federation is about.

    Args:
        link: the way to the sites.
        clients: how many the federation has at most, numbered from 0.
        least: how many must be there.
        patience: seconds to wait for them.
        tell: is told who joins, leaves and is refused.

    Attributes:
        about: the announcement that all others must fit.
        known: the last announcement of each client that was let in.
    """

    def __init__(self, link: Link, clients: int, least: int, patience: float, tell: Tell) -> None:
        self.link, self.clients, self.least, self.patience, self.tell = link, clients, least, patience, tell
        self.known: dict[int, Announcement] = {}
        self._there: set[int] = set()
        self._refused: dict[int, str] = {}
        self.about = self._first()

    def present(self, round: int) -> list[int]:
        """The clients that are there and fit, ascending."""
        there = set()
        for id, site in sorted(self.link.sites().items()):
            reason = self._against(site)
            if not reason:
                there.add(id)
                self.known[id] = site
            elif self._refused.get(id) != reason:
                self._refused[id] = reason
                self.tell(Event(round, id, "refused", reason))
                self.link.refuse(id, reason)
        for id in sorted(there - self._there):
            self._refused.pop(id, None)
            self.tell(Event(round, id, "joined", f"{self.known[id].samples} training windows"))
        for id in sorted(self._there - there):
            self.tell(Event(round, id, "left"))
        self._there = there
        return sorted(there)

    def wait(self, round: int) -> list[int]:
        """As `present`, once they are enough. Raises UserError after waiting long enough in vain."""
        return self._wait(lambda: self.present(round), round)

    @property
    def evaluated_on(self) -> str:
        """What the sites' test windows are, 'test' or 'validation'."""
        return self.about.evaluated_on

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in order."""
        return self.about.classes

    def facts(self) -> dict[str, Any]:
        """What the environment of a run says of its data, in place of `ShardSet.facts`."""
        about = {name: getattr(self.about, name) for name in COMMON}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        return {
            "name": self.about.data,
            "folder": "at the sites",
            "evaluated_on": self.about.evaluated_on,
            "manifest_sha256": digest,  # of what all sites have in common; their own data stay unknown here
            "sites": {id: site.facts() | {"versions": dict(site.versions)} for id, site in sorted(self.known.items())},
        }

    def _first(self) -> Announcement:
        """What most of the first sites agree on; the lowest number decides between equals."""
        sites = self.link.sites
        there = self._wait(lambda: [site for _, site in sorted(sites().items()) if site.client < self.clients], 0)
        kinds = Counter(map(_kind, there))
        common = max(kinds, key=kinds.get)  # of equals, the first seen
        return next(site for site in there if _kind(site) == common)

    def _wait(self, look: Callable[[], list[Any]], round: int) -> list[Any]:
        began, said = time.monotonic(), -SAY_SECONDS
        while True:
            there, waited = look(), time.monotonic() - began
            if len(there) >= self.least:
                return there
            if waited > self.patience:
                raise UserError(
                    f"{len(there)} of at least {self.least} sites are there after {self.patience:.0f} s of waiting "
                    "(--min-clients, --wait)"
                )
            if waited - said >= SAY_SECONDS and waited > LOOK_SECONDS:
                said = waited
                self.tell(Event(round, -1, "waiting", f"{len(there)} of at least {self.least} sites are there"))
            time.sleep(min(LOOK_SECONDS, self.patience / 10))

    def _against(self, site: Announcement) -> str:
        if site.client >= self.clients:
            return f"calls itself client {site.client}, but the federation has clients 0 to {self.clients - 1}"
        if site.versions.get("fedkdx") != __version__:
            return f"runs fedkdx {site.versions.get('fedkdx')}, the server {__version__}"
        return site.differs(self.about)


def _kind(site: Announcement) -> tuple[Any, ...]:
    return tuple(getattr(site, name) for name in COMMON)
