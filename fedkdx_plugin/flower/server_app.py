"""The ServerApp, the server's side: makes one run with a coordinator, and writes its run folder and its journal."""

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
from fedkdx_plugin.engine.record import RoundRecord
from fedkdx_plugin.experiments.private import check_norm
from fedkdx_plugin.experiments.setting import make_task, schedule, training
from fedkdx_plugin.flower.coordinator import Coordinator
from fedkdx_plugin.flower.link import FlowerLink
from fedkdx_plugin.flower.options import FOLDER, ServerOptions, read_settings, write_outcome
from fedkdx_plugin.flower.roster import Event, Roster
from fedkdx_plugin.privacy.options import CLIENT
from fedkdx_plugin.results.run_folder import RunFolder
from registry.blame import blamed
from registry.errors import UserError

app = ServerApp()
EVENTS = "sites.csv"


class SavedEachRound(RunFolder):
    """Writes a checkpoint after each round, and when a run goes on, as that counts with privacy (`Coordinator`)."""

    def __enter__(self) -> SavedEachRound:
        assert isinstance(self.federation, Coordinator)
        if self.federation.made_again:
            self._resumed.append(self.federation.made_again)
        super().__enter__()
        if self.records:
            self._last = len(self.records), self.federation.save(), self._confusion
            self.save()
        return self

    def on_round_end(self, record: RoundRecord) -> None:
        """Write the round, and all state."""
        super().on_round_end(record)
        self.save()


class Journal:
    """Writes a row for each event with a site (`sites.csv`), and what an operator should know into the run's log."""

    def __init__(self, folder: Path) -> None:
        path = folder / EVENTS
        new = not path.exists()
        self._file = path.open("a", newline="", encoding="utf-8")
        self._log = (folder / "log.txt").open("a", encoding="utf-8")
        self._csv = csv.DictWriter(self._file, ["time", *(field.name for field in fields(Event))])
        if new:
            self._csv.writeheader()

    def __call__(self, event: Event) -> None:
        """Write one event."""
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        self._csv.writerow({"time": now} | asdict(event) | {"seconds": round(event.seconds, 3)})
        self._file.flush()
        if event.event != "answered":
            who = "" if event.client < 0 else f" client {event.client}"
            what = f"round {event.round}:{who} {event.event}{': ' if event.detail else ''}{event.detail}"
            print(now, what, file=self._log, flush=True)


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Make one run."""
    folder = Path(os.environ[FOLDER]) / str(context.run_config["folder"])
    write_outcome(folder, "running")
    try:
        _run(grid, context, folder)
    except UserError as error:
        write_outcome(folder, "failed", str(error))
        print(f"error: {error}", file=sys.stderr)
        return
    except BaseException as error:
        write_outcome(folder, "failed", blamed(error) or f"{type(error).__name__}: {error}")
        raise
    write_outcome(folder, "finished")


def _run(grid: Grid, context: Context, folder: Path) -> None:
    """Make the run of a folder. Raises UserError."""
    options = ServerOptions.read(folder)
    terms = options.terms
    config = read_settings(str(context.run_config["settings"]))
    (choice,) = choose(config)
    journal = Journal(folder)
    link = FlowerLink(grid, journal)
    roster = Roster(link, terms.clients, terms.least, terms.wait, journal)
    task = make_task(config, roster.about.shape, len(roster.about.classes))
    choice.server.check(task, choice.params)
    if config.dp == CLIENT:
        check_norm(choice, task)
    roster.wait(0)
    coordinator = Coordinator(
        choice.server,
        task,
        choice.params,
        training(config, choice),
        schedule(config),
        link,
        roster,
        str(context.run_config["run"]),
        terms.deadline,
        terms.max_refusals,
        terms.min_updates,
    )
    device = torch.device("cpu")
    saved = SavedEachRound(folder, choice.entry, options.settings, options.command, roster, device, coordinator)
    with saved:
        coordinator.run([saved], len(saved.records))
