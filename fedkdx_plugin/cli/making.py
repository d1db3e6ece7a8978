"""Make an experiment's runs, for every command that does."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from fedkdx_plugin.cli.options import Making
from fedkdx_plugin.experiments import runner
from fedkdx_plugin.experiments.experiment import Experiment
from fedkdx_plugin.flower import require_flower
from fedkdx_plugin.tracking.trackers import trackers
from registry.errors import UserError


def make(experiment: Experiment, command: Sequence[str], making: Making) -> int:
    """Make the runs and show what came out. Returns 0; 1 where a run failed; 130 after Ctrl-C. Raises UserError."""
    if making.dry_run:
        runner.show(experiment)
        return 0
    if experiment.runs[0].settings["engine"] == "flower":
        if making.trackers or making.jobs:
            raise UserError("--track and --jobs: not with --engine flower; leave them out")
        require_flower()
        from fedkdx_plugin.flower.superlink import on_this_machine

        return on_this_machine(experiment, list(command))
    watching = trackers(making.trackers)
    try:
        results = runner.run(experiment, command, making.jobs, watching)
    except KeyboardInterrupt:
        if experiment.folder is None:
            raise
        print(f"\nstopped; to go on: fedkdx resume {experiment.folder}", file=sys.stderr)
        return 130
    return runner.finish(results)
