"""Execution of an experiment, for all commands that make runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dataset_utils.spec import shards_folder
from fedkdx_plugin.cli.options import Making
from fedkdx_plugin.experiments import cluster, private, runner
from fedkdx_plugin.experiments.experiment import Experiment
from fedkdx_plugin.flower import require_flower
from fedkdx_plugin.tracking.trackers import trackers
from registry.errors import UserError


def check(experiment: Experiment, making: Making) -> None:
    """Raise UserError where options do not go together, as far as no data and nothing on this machine are needed."""
    if making.slurm and making.launcher != "slurm":
        raise UserError("--slurm: is for --launcher slurm only; give that, too, or leave it out")
    if making.launcher == "slurm":
        cluster.options(making.slurm)
    if experiment.runs[0].settings["engine"] == "flower":
        if making.trackers or making.jobs or making.launcher != "local":
            raise UserError("--track, --jobs and --launcher: do not work with --engine flower; leave them out")
        from fedkdx_plugin.flower.coordinator import check_sites

        check_sites(experiment)
    refused = []
    for planned in experiment.runs:
        shards = planned.config.shards
        try:
            if shards_folder(shards.data) is None:  # which have been scaled as they say
                private.check_scale(planned.config.dp, shards.scale)
        except UserError as error:
            refused.append(error)
    if refused and (not experiment.is_grid or len(refused) == len(experiment.runs)):  # else the others can be made
        raise refused[0]


def make(experiment: Experiment, command: Sequence[str], making: Making) -> int:
    """Make the runs and show the results. Returns the exit code: 1 if runs failed, 130 after Ctrl-C."""
    check(experiment, making)
    if making.dry_run:
        runner.show(experiment)
        return 0
    if experiment.runs[0].settings["engine"] == "flower":
        require_flower()
        from fedkdx_plugin.flower.superlink import on_this_machine

        return on_this_machine(experiment, list(command))
    slurm = None
    if making.launcher == "slurm":
        slurm = cluster.options(making.slurm)
        cluster.require()
    try:
        results = runner.run(experiment, command, making.jobs, trackers(making.trackers), slurm=slurm)
    except KeyboardInterrupt:
        if experiment.folder is None:
            raise
        print(f"\nstopped; to go on: fedkdx resume {experiment.folder}", file=sys.stderr)
        return 130
    code = runner.finish(results)
    if experiment.source.get("only"):
        print("tables and report are of the runs of --only alone; the same command without it writes those of all")
    return code
