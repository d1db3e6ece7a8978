"""`run.py --engine flower`: a whole federation on this machine, a process a site, to try it out."""

from __future__ import annotations

import os
import sys

import torch

from fedkdx_plugin.configuration.choice import choose
from fedkdx_plugin.experiments.experiment import Experiment
from fedkdx_plugin.experiments.results import Results
from fedkdx_plugin.experiments.runner import finish
from fedkdx_plugin.experiments.setting import Setting, check_on
from fedkdx_plugin.flower import supernode
from fedkdx_plugin.flower.coordinator import check_sites
from fedkdx_plugin.flower.plan import Terms
from fedkdx_plugin.flower.processes import Processes
from fedkdx_plugin.flower.site import Place
from fedkdx_plugin.flower.superlink import SuperLink

WAIT_SECONDS = 120.0  # for the sites of this machine
DEADLINE_SECONDS = 3600.0  # for a round: here a site that is slow is merely slow


def run(experiment: Experiment, command: list[str]) -> int:
    """Run every algorithm under every seed on Flower; print and save the comparison. Returns the exit code.

    Raises:
        UserError: wrong input, or a run that failed.
    """
    check_sites(experiment)
    config = experiment.runs[0].config
    setting = Setting.of(config)  # finds wrong input, and makes shards, before anything is started
    for planned in experiment.runs:
        check_on(setting.shards, planned.config, choose(planned.config))
    shards, clients = setting.shards, setting.shards.num_clients
    folder = experiment.begin(command)
    print(f"{shards.name}: {clients} sites on this machine, Flower; results in {folder}")
    threads = 0 if "OMP_NUM_THREADS" in os.environ else max(1, torch.get_num_threads() // clients)
    try:
        with Processes() as processes:
            link = SuperLink(processes, folder, secure=False)
            for id in range(clients):
                place = Place(id, shards.folder, id, folder / "sites" / str(id), setting.device)
                supernode.start(processes, place, supernode.Server(link.address), threads)
            link.run_all(experiment, command, Terms(clients, clients, WAIT_SECONDS, DEADLINE_SECONDS))
    except KeyboardInterrupt:
        print(f"\nstopped; to go on: fedkdx resume {folder}", file=sys.stderr)
        return 130
    return finish(Results.of(experiment))
