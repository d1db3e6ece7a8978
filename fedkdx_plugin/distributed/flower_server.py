"""The ServerApp: makes the coordinator of a run, lets it run, and leaves a run's folder as every engine does."""

from __future__ import annotations

import csv
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedkdx_plugin import comparison
from fedkdx_plugin.distributed.coordinator import Coordinator
from fedkdx_plugin.distributed.flower_link import FlowerLink
from fedkdx_plugin.distributed.plan import FOLDER, ServerOptions, read_settings, write_outcome
from fedkdx_plugin.distributed.roster import Event, Roster
from fedkdx_plugin.engine.results import RunFolder
from fedkdx_plugin.engine.rounds import RoundRecord
from registry.errors import UserError

app = ServerApp()
EVENTS = "sites.csv"


class SavedEachRound(RunFolder):
    """A run's folder whose checkpoint is never behind what the sites were told."""

    def on_round(self, record: RoundRecord) -> None:
        super().on_round(record)
        self.save()


class Journal:
    """Writes what happens with the sites, a row each, and says what an operator should know."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.say = say
        new = not path.exists()
        self._file = path.open("a", newline="", encoding="utf-8")
        self._csv = csv.DictWriter(self._file, ["time", *(field.name for field in fields(Event))])
        if new:
            self._csv.writeheader()

    def __call__(self, event: Event) -> None:
        row = asdict(event) | {"seconds": round(event.seconds, 3)}
        self._csv.writerow({"time": time.strftime("%Y-%m-%d %H:%M:%S")} | row)
        self._file.flush()
        if event.event != "answered":
            who = "" if event.client < 0 else f" client {event.client}"
            self.say(f"round {event.round}:{who} {event.event}{': ' if event.detail else ''}{event.detail}")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run."""
    folder = Path(os.environ[FOLDER]) / str(context.run_config["folder"])
    write_outcome(folder, "running")
    try:
        _run(grid, context, folder)
    except UserError as error:
        write_outcome(folder, "failed", str(error))
        print(f"error: {error}", file=sys.stderr)
        return
    except BaseException as error:
        write_outcome(folder, "failed", f"{type(error).__name__}: {error}")
        raise
    write_outcome(folder, "finished")


def _run(grid: Grid, context: Context, folder: Path) -> None:
    options = ServerOptions.read(folder)
    config = read_settings(str(context.run_config["settings"]))
    (choice,) = comparison.choose(config)
    lines: list[str] = []
    journal = Journal(folder / EVENTS, lines.append)
    link = FlowerLink(grid, journal)
    roster = Roster(link, options.clients, options.min_clients, options.wait, journal)
    task = comparison.make_task(config, roster.about.shape, len(roster.about.classes))
    choice.server.check(task, choice.params)
    roster.wait(0)
    coordinator = Coordinator(
        choice.server,
        task,
        choice.params,
        comparison.training(config, config.seed),
        comparison.schedule(config),
        link,
        roster,
        str(context.run_config["run"]),
        options.deadline,
    )
    device = torch.device("cpu")
    one = SavedEachRound(folder, choice.entry, options.settings, options.command, roster, device, coordinator)
    with one:
        for line in lines:
            one.note(line)
        journal.say = one.note
        coordinator.run([one], len(one.records))
