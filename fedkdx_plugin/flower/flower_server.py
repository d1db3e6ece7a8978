"""The ServerApp: makes the coordinator of a run, lets it run, and leaves a run's folder as every engine does."""

from __future__ import annotations

import csv
import os
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import torch
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedkdx_plugin.configuration.choice import choose
from fedkdx_plugin.engine.rounds import RoundRecord
from fedkdx_plugin.experiments.setting import make_task, schedule, training
from fedkdx_plugin.flower.coordinator import Coordinator
from fedkdx_plugin.flower.flower_link import FlowerLink
from fedkdx_plugin.flower.plan import FOLDER, ServerOptions, read_settings, write_outcome
from fedkdx_plugin.flower.roster import Event, Roster
from fedkdx_plugin.results.run_folder import RunFolder
from registry.errors import UserError

app = ServerApp()
EVENTS = "sites.csv"


class SavedEachRound(RunFolder):
    """A run's folder whose checkpoint is never behind what the sites were told."""

    def on_round_end(self, record: RoundRecord) -> None:
        super().on_round_end(record)
        self.save()


class Journal:
    """Writes what happens with the sites, a row each, and what an operator should know into the run's log."""

    def __init__(self, folder: Path) -> None:
        path = folder / EVENTS
        new = not path.exists()
        self._file = path.open("a", newline="", encoding="utf-8")
        self._log = (folder / "log.txt").open("a", encoding="utf-8")
        self._csv = csv.DictWriter(self._file, ["time", *(field.name for field in fields(Event))])
        if new:
            self._csv.writeheader()

    def __call__(self, event: Event) -> None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        self._csv.writerow({"time": now} | asdict(event) | {"seconds": round(event.seconds, 3)})
        self._file.flush()
        if event.event != "answered":
            who = "" if event.client < 0 else f" client {event.client}"
            what = f"round {event.round}:{who} {event.event}{': ' if event.detail else ''}{event.detail}"
            print(now, what, file=self._log, flush=True)


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
    terms = options.terms
    config = read_settings(str(context.run_config["settings"]))
    (choice,) = choose(config)
    journal = Journal(folder)
    link = FlowerLink(grid, journal)
    roster = Roster(link, terms.clients, terms.min_clients, terms.wait, journal)
    task = make_task(config, roster.about.shape, len(roster.about.classes))
    choice.server.check(task, choice.params)
    roster.wait(0)
    coordinator = Coordinator(
        choice.server,
        task,
        choice.params,
        training(config, config.seed),
        schedule(config),
        link,
        roster,
        str(context.run_config["run"]),
        terms.deadline,
    )
    device = torch.device("cpu")
    one = SavedEachRound(folder, choice.entry, options.settings, options.command, roster, device, coordinator)
    with one:
        coordinator.run([one], len(one.records))
