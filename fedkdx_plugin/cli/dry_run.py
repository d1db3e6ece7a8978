"""`--dry-run` of a comparison: its configuration and data, checked as a run checks them."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from dataset_utils.describe import described
from dataset_utils.spec import shards_folder
from fedkdx_plugin.configuration.config import Config
from fedkdx_plugin.experiments import runner
from fedkdx_plugin.experiments.experiment import Experiment


def show(experiment: Experiment, config: Config) -> int:
    """Print the resolved configuration as YAML, followed by a description of the data as comments.

    What can be checked without making shards has been checked, or is, where the data are shards.

    Args:
        experiment: the comparison.
        config: its configuration.

    Returns:
        The exit code: 2 if something is wrong with the data.

    Raises:
        UserError: a configuration that does not go with the data, or the data are not found.
    """
    if shards_folder(config.shards.data) is not None:
        runner.prepare(experiment)
    yaml.safe_dump(dict(experiment.source["base"]), sys.stdout, sort_keys=False, allow_unicode=True)
    raw = Path(config.raw) if config.raw else None
    lines, errors = described(config.shards, Path(config.data_root), raw, config.download)
    for line in lines:
        print(f"# {line}")
    for text in errors:
        print(f"error: {text}", file=sys.stderr)
    return 2 if errors else 0
