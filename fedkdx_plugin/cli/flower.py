"""`--engine flower`: runs as a federation of processes on this machine."""

from __future__ import annotations

from collections.abc import Sequence

from fedkdx_plugin.cli.options import Making
from fedkdx_plugin.experiments.experiment import Experiment
from fedkdx_plugin.flower import require_flower
from registry.errors import UserError


def on_this_machine(experiment: Experiment, command: Sequence[str], making: Making) -> int:
    """Make an experiment's runs on Flower. Returns the exit code. Raises UserError: wrong input."""
    if making.trackers or making.jobs:
        raise UserError("--track and --jobs: do not work with --engine flower; leave them out")
    require_flower()
    from fedkdx_plugin.flower import loopback

    return loopback.run(experiment, list(command))
