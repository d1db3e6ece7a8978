"""Sites without a network: each request meets a site made anew, as a fresh process would make it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from dataset_utils import shards
from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.engine.schedule import Schedule
from fedkdx_plugin.engine.training import Settings
from fedkdx_plugin.flower.coordinator import Coordinator
from fedkdx_plugin.flower.protocol import Announcement, Answer, Request
from fedkdx_plugin.flower.roster import Event, Roster
from fedkdx_plugin.flower.site import LocalData, Site, SiteSetup
from registry.aggregation import Averaging
from registry.errors import UserError
from registry.interface import Message, Server, Task
from tests.conftest import TinierNet, TinyNet

SETTINGS = Settings(batch_size=16, local_epochs=2, learning_rate=0.05)


class FakeLink:
    """Sites in this process; tests take some away, or spoil their answers.

    Attributes:
        away: clients that are not connected.
        spoil: client -> what becomes of its answer's bytes; None is silence.
        requests, answers: all bytes that travelled, (client, bytes).
        refused: client -> what it was told.
    """

    def __init__(self, setups: Mapping[int, SiteSetup], make: Callable[[SiteSetup], Site]) -> None:
        self.setups, self.make = setups, make
        self.away: set[int] = set()
        self.spoil: dict[int, Callable[[bytes], bytes | str | None]] = {}
        self.requests: list[tuple[int, bytes]] = []
        self.answers: list[tuple[int, bytes]] = []
        self.refused: dict[int, str] = {}

    def sites(self) -> dict[int, Announcement]:
        there = {id: setup for id, setup in self.setups.items() if id not in self.away}
        return {id: _travel(LocalData(setup).announcement()) for id, setup in there.items()}

    def refuse(self, client: int, reason: str) -> None:
        self.refused[client] = reason

    def exchange(self, requests: Mapping[int, bytes], seconds: float) -> dict[int, bytes | str]:
        answers = {}
        for id, data in reversed(requests.items()):  # the order of arrival must not matter
            self.requests.append((id, data))
            request = Request.from_message(Message.from_bytes(data))
            try:
                answer = self.make(self.setups[id]).handle(request)
            except UserError as error:
                answer = Answer(id, request.round.index, dropped=str(error))
            sent = answer.to_message().to_bytes()
            self.answers.append((id, sent))
            spoilt = self.spoil.get(id, lambda data: data)(sent)
            if spoilt is not None:
                answers[id] = spoilt
        return answers


def _travel(announcement: Announcement) -> Announcement:
    return Announcement.from_message(Message.from_bytes(announcement.to_message().to_bytes()))


class Story(list):
    """What was told."""

    def __call__(self, event: Event) -> None:
        self.append(event)

    def of(self, kind: str) -> list[Event]:
        return [event for event in self if event.event == kind]


def task(folder: Path, averaging: Averaging | None = None) -> Task:
    manifest = shards.read_manifest(folder)
    shape, classes = tuple(manifest["shape"]), len(manifest["classes"])
    return Task(shape, classes, TinyNet, TinierNet, averaging=averaging or Averaging())


def make_link(algorithm: type[Server], folder: Path, state: Path, clients: int = 3, settings=SETTINGS) -> FakeLink:
    """Each client of a folder of shards as a site with a disk of its own."""
    cpu = torch.device("cpu")
    setups = {id: SiteSetup(id, folder, id, state / f"site-{id}", cpu) for id in range(clients)}

    def make(setup: SiteSetup) -> Site:
        return Site(setup, algorithm, task(folder), algorithm.Params(), settings, LocalData(setup), clients)

    return FakeLink(setups, make)


def make_coordinator(
    algorithm: type[Server],
    folder: Path,
    link: FakeLink,
    schedule: Schedule,
    clients: int = 3,
    least: int = 1,
    patience: float = 0.0,
    settings: Settings = SETTINGS,
    min_updates: int = 1,
    averaging: Averaging | None = None,
) -> tuple[Coordinator, Story]:
    story = Story()
    roster = Roster(link, clients, least, patience, story)
    params = algorithm.Params()
    about = (algorithm, task(folder, averaging), params, settings, schedule)
    return Coordinator(*about, link, roster, "run", 60.0, min_updates=min_updates), story


def make_local(
    algorithm: type[Server],
    folder: Path,
    schedule: Schedule,
    settings: Settings = SETTINGS,
    averaging: Averaging | None = None,
) -> Federation:
    """Return the same federation in one process."""
    data = DeviceData.from_shards(shards.load(folder), torch.device("cpu"))
    return Federation(algorithm, task(folder, averaging), algorithm.Params(), data, settings, schedule, "sequential")
