"""The roster: which sites are connected, and whether what they announce fits together."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from fedkdx_plugin.flower.protocol import COMMON, Announcement
from registry import __version__
from registry.errors import UserError

T = TypeVar("T")
LOOK_SECONDS = 1.0  # between two looks at who is there
SAY_SECONDS = 30.0  # between two log lines about waiting


@dataclass(frozen=True)
class Event:
    """Records something that happened between the server and a site.

    Attributes:
        round: index of the round (0: before the first).
        client: number of the client; -1 where it is not known.
        event: 'joined', 'left', 'waiting', 'refused', 'answered' or 'silent'.
        detail: the reason, or more about it.
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
    """Carries messages to the sites and back."""

    def sites(self) -> Mapping[int, Announcement]:
        """Return what the sites that are connected now announced, by client number."""

    def refuse(self, client: int, reason: str) -> None:
        """Tell a client why it is not asked to take part."""

    def exchange(self, requests: Mapping[int, bytes], seconds: float) -> Mapping[int, bytes | str]:
        """Send each client its request; return client -> its answer, or why none came within `seconds`."""


class Roster:
    """Knows which clients can be asked now.

    It waits until enough sites are connected; what most of these have in common (`protocol.COMMON`) is what every site
    must have from then on.

    Args:
        link: carries messages to the sites.
        clients: largest number of clients, numbered from 0.
        least: smallest number of sites that a round needs.
        patience: seconds to wait for that many.
        tell: is called with each event: who joins, leaves or is refused.

    Attributes:
        about: the announcement that all others must fit.
        known: the last announcement of each client that was accepted.

    Raises:
        UserError: too few sites within `patience`.
    """

    options = "--min-clients, --wait"  # by which whoever runs it changes how long it waits, and for how many

    def __init__(self, link: Link, clients: int, least: int, patience: float, tell: Tell) -> None:
        self.link, self.clients, self.least, self.patience, self.tell = link, clients, least, patience, tell
        self.known: dict[int, Announcement] = {}
        self._there: set[int] = set()
        self._refused: dict[int, str] = {}
        self._excluded: dict[int, str] = {}
        self.about = self._first()

    def exclude(self, client: int, reason: str) -> None:
        """Leave a client out from now on; it is told why when it is next looked at."""
        self._excluded[client] = reason

    def present(self, round: int) -> list[int]:
        """Return the clients that are connected and fit, ascending."""
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
        """Return `present` once they are enough. Raises UserError where they are too few after `patience` seconds."""
        return self._wait(lambda: self.present(round), round)

    @property
    def evaluated_on(self) -> str:
        """Return the kind of the sites' test windows, 'test' or 'validation'."""
        return self.about.evaluated_on

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the names of the classes, in order."""
        return self.about.classes

    def facts(self) -> dict[str, Any]:
        """Return what the environment of a run states about its data, in place of `ShardSet.facts`."""
        about = {name: getattr(self.about, name) for name in COMMON}
        digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        return {
            "name": self.about.data,
            "folder": "at the sites",
            "evaluated_on": self.about.evaluated_on,
            "manifest_sha256": digest,  # of what all sites have in common; the data themselves are not known here
            "sites": {id: site.facts() | {"versions": dict(site.versions)} for id, site in sorted(self.known.items())},
        }

    def _first(self) -> Announcement:
        """Return what most of the first sites announce; among equals, the kind of the lowest client number."""
        sites = self.link.sites
        there = self._wait(lambda: [site for _, site in sorted(sites().items()) if site.client < self.clients], 0)
        kinds = Counter(map(_kind, there))
        common, _ = kinds.most_common(1)[0]  # of equals, the first seen
        return next(site for site in there if _kind(site) == common)

    def _wait(self, look: Callable[[], list[T]], round: int) -> list[T]:
        """Call `look` until it returns enough. Raises UserError after `patience` seconds."""
        began, said = time.monotonic(), -SAY_SECONDS
        while True:
            there, waited = look(), time.monotonic() - began
            if len(there) >= self.least:
                return there
            if waited > self.patience:
                raise UserError(
                    f"{len(there)} of at least {self.least} sites are there after {self.patience:.0f} s of waiting "
                    f"({self.options})"
                )
            if waited - said >= SAY_SECONDS and waited > LOOK_SECONDS:
                said = waited
                self.tell(Event(round, -1, "waiting", f"{len(there)} of at least {self.least} sites are there"))
            time.sleep(min(LOOK_SECONDS, self.patience / 10))

    def _against(self, site: Announcement) -> str:
        """Return why a site cannot take part; '' where it can."""
        if site.client in self._excluded:
            return self._excluded[site.client]
        if site.client >= self.clients:
            return f"calls itself client {site.client}, but the federation has clients 0 to {self.clients - 1}"
        if site.versions.get("fedkdx") != __version__:
            return f"runs fedkdx {site.versions.get('fedkdx')}, the server {__version__}; install the same version"
        return site.differs(self.about)


def _kind(site: Announcement) -> tuple[Any, ...]:
    return tuple(getattr(site, name) for name in COMMON)
