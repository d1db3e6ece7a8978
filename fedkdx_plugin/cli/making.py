"""Execution of an experiment, for all commands that make runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fedkdx_plugin.cli.options import Making
from fedkdx_plugin.experiments import cluster, runner
from fedkdx_plugin.experiments.experiment import Experiment
from fedkdx_plugin.flower import require_flower
from fedkdx_plugin.tracking.trackers import trackers
from registry.errors import UserError


def make(experiment: Experiment, command: Sequence[str], making: Making) -> int:
    """Make the runs and show the results. Returns the exit code: 1 if runs failed, 130 after Ctrl-C."""
    if making.dry_run:
        runner.show(experiment)
        return 0
    if making.slurm and making.launcher != "slurm":
        raise UserError("--slurm: is for --launcher slurm only; give that, too, or leave it out")
    if experiment.runs[0].settings["engine"] == "flower":
        if making.trackers or making.jobs or making.launcher != "local":
            raise UserError("--track, --jobs and --launcher: do not work with --engine flower; leave them out")
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
    return runner.finish(results)
