"""`run.py --engine flower`: a whole federation on this machine, a process a site, to try it out."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from fedkdx_plugin.configuration.choice import choose, resolve
from fedkdx_plugin.configuration.config import Config
from fedkdx_plugin.experiments.comparison import Setting, begin_folder, schedule
from fedkdx_plugin.flower import supernode
from fedkdx_plugin.flower.coordinator import check_algorithm, check_same_data
from fedkdx_plugin.flower.finished import finish
from fedkdx_plugin.flower.plan import Terms
from fedkdx_plugin.flower.processes import Processes
from fedkdx_plugin.flower.site import Place
from fedkdx_plugin.flower.superlink import SuperLink

WAIT_SECONDS = 120.0  # for the sites of this machine
DEADLINE_SECONDS = 3600.0  # for a round: here a site that is slow is merely slow


def run(config: Config, command: list[str], folder: Path | None = None) -> int:
    """Run every algorithm under every seed on Flower; print and save the comparison. Returns the exit code.

    Args:
        folder: of a comparison with this configuration that was interrupted; None begins a new one.

    Raises:
        UserError: wrong input, or a run that failed.
    """
    choices = choose(config)
    check_same_data(config)
    setting = Setting.of(config, choices)  # finds wrong input, and makes shards, before anything is started
    for choice in choices:
        check_algorithm(choice.server, schedule(config).participation)
    shards, clients = setting.shards, setting.shards.num_clients
    resolved = resolve(config, choices)
    folder = begin_folder(folder, Path(config.out), f"{shards.name}-{config.model}-{config.goal}", resolved, command)
    print(f"{shards.name}: {clients} sites on this machine, Flower; results in {folder}")
    threads = 0 if "OMP_NUM_THREADS" in os.environ else max(1, torch.get_num_threads() // clients)
    try:
        with Processes() as processes:
            link = SuperLink(processes, folder, secure=False)
            for id in range(clients):
                place = Place(id, shards.folder, id, folder / "sites" / str(id), setting.device)
                supernode.start(processes, place, supernode.Server(link.address), threads)
            link.run_all(config, choices, command, Terms(clients, clients, WAIT_SECONDS, DEADLINE_SECONDS))
    except KeyboardInterrupt:
        print(f"\nstopped; to go on: fedkdx --resume {folder}", file=sys.stderr)
        return 130
    return finish(folder, config, choices, f"{shards.name}, {config.model}, on Flower")
