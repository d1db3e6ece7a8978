"""`--dry-run` of a comparison: its configuration and data."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from dataset_utils.describe import described
from fedkdx_plugin.configuration.choice import resolve
from fedkdx_plugin.configuration.config import Config
from fedkdx_plugin.experiments.setting import check


def show(config: Config) -> int:
    """Print the resolved configuration as YAML, followed by a description of the data as comments.

    Returns:
        The exit code: 2 if something is wrong with the data.

    Raises:
        UserError: wrong configuration, or the data are not found.
    """
    choices = check(config)
    yaml.safe_dump(resolve(config, choices), sys.stdout, sort_keys=False, allow_unicode=True)
    raw = Path(config.raw) if config.raw else None
    lines, errors = described(config.shards, Path(config.data_root), raw, config.download)
    for line in lines:
        print(f"# {line}")
    for text in errors:
        print(f"error: {text}", file=sys.stderr)
    return 2 if errors else 0
