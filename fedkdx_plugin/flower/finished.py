"""What is made of runs that have ended: the same table and picture as of runs in one process."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import h5py

from fedkdx_plugin.configuration.choice import Choice
from fedkdx_plugin.configuration.config import Config
from fedkdx_plugin.reports import comparison_table, curves
from fedkdx_plugin.results.records import read_results


def finish(folder: Path, config: Config, choices: Sequence[Choice], title: str) -> int:
    """Print and save the comparison. Returns the exit code."""
    seeds = range(config.seed, config.seed + config.times)
    runs = [_read(folder / f"{choice.name}-seed{seed}", choice, seed) for seed in seeds for choice in choices]
    print(f"\n{comparison_table.write(folder, runs, config.vary)}")
    if importlib.util.find_spec("matplotlib"):
        curves.draw(folder / "comparison.png", runs, title)
    print(f"saved in {folder}")
    return 0


def _read(place: Path, choice: Choice, seed: int) -> SimpleNamespace:
    """A run's folder, as far as tables and pictures look at a `RunFolder`."""
    with h5py.File(place / "results.h5") as file:
        records, _ = read_results(file)
        groups = {name: ids[:].tolist() for name, ids in file.get("groups", {}).items()}
        shards = SimpleNamespace(evaluated_on=file.attrs["evaluated_on"])
    return SimpleNamespace(
        entry=choice.entry, seed=seed, records=records, federation=SimpleNamespace(groups=groups), shards=shards
    )
