"""Nodes of an app that are there, and the client that each of them is."""

from __future__ import annotations

import logging

from flwr.app import ConfigRecord, RecordDict
from flwr.serverapp import Grid

from fedkdx_plugin.flower.apps.client import PLAN
from fedkdx_plugin.flower.link import FlowerLink
from fedkdx_plugin.flower.protocol import Announcement
from fedkdx_plugin.flower.roster import Event, Roster

LOG = logging.getLogger("flwr")  # Flower's own, whose lines the ServerApp's user reads
WORTH_A_LINE = {"joined": logging.INFO, "left": logging.WARNING, "waiting": logging.INFO}
WORTH_A_LINE |= dict.fromkeys(("refused", "silent"), logging.WARNING)


def tell(event: Event) -> None:
    """Log what happened with a client, short of plain answers."""
    if event.event in WORTH_A_LINE:
        who = f"client {event.client} " if event.client >= 0 else ""
        LOG.log(WORTH_A_LINE[event.event], "%s%s: %s", who, event.event, event.detail)


class AppLink(FlowerLink):
    """Link whose messages carry the server's plan, too, by which a node knows what its windows must be.

    Args:
        grid: Flower's.
        plan: see `plan.Plan.to_text`.
    """

    def __init__(self, grid: Grid, plan: str) -> None:
        super().__init__(grid, tell)
        self.plan = plan

    def content(self, data: bytes) -> RecordDict:
        """Return what a message of these bytes holds."""
        content = super().content(data)
        content[PLAN] = ConfigRecord({PLAN: self.plan})
        return content


class AppRoster(Roster):
    """Roster of clients that must be as the strategy expects, whatever most of them are.

    Args:
        expected: announcement of a client that fits.
        link, clients, least, patience: as of `Roster`.
    """

    options = "min_available_nodes, timeout"

    def __init__(self, expected: Announcement, link: AppLink, clients: int, least: int, patience: float) -> None:
        self._expected = expected
        super().__init__(link, clients, least, patience, tell)

    def _first(self) -> Announcement:
        return self._expected
