"""A folder of a watch's recordings with its description, and finished runs on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from dataset_utils import shards
from fedkdx_plugin.cli.main import main

SUBJECTS = ("anna", "ben", "carl")
CLASSES = ("lie", "sit", "walk")
DESCRIPTION = {
    "name": "watch",
    "folder": "rec",
    "rate": 100,
    "resample": 50,
    "window": 1.0,
    "columns": ["ax", "ay", "az", "hr"],
    "time": "t",
    "label": "activity",
    "acceleration": ["ax", "ay", "az"],
    "filters": {"median": 3, "lowpass": 20, "gravity": 0.3},
}
FAST = ["-m", "cnn_small", "-gr", "3", "-jr", "0.7", "-ls", "3", "-lbs", "8", "-lr", "0.03", "-dev", "cpu"]
COMPARISONS = {  # name -> options; each has a run folder for every algorithm
    "federated": ["-algo", "FedAvg,Local,FedKDX,FedFomo,FedFTL,Centralised"],
    "both": ["-algo", "FedKDX+"],
    "client": ["-algo", "FedAvg,FedKDX", "--scale", "client"],
    "minmax": ["-algo", "FedAvg", "--scale", "minmax", "-m", "cnn_lstm", "-lr", "0.2"],
    "low-pass": ["-algo", "FedAvg", "--median", "0", "--gravity", "0"],
    "no filter": ["-algo", "FedAvg", "--median", "0", "--gravity", "0", "--lowpass", "0"],
    "local batch norm": ["-algo", "FedAvg", "--bn", "local"],
}


def recording(k: int, samples: int = 6000) -> pd.DataFrame:
    """Write a recording: lies, sits, walks a third each; a pause of 2.5 s, missing values, 2 s without a label."""
    rng, time = np.random.default_rng(k), np.arange(samples) / 100
    y = np.arange(samples) * 3 // samples
    wave = np.sin(2 * np.pi * time * (1 + 0.5 * y))[:, None] * [1.0, 0.5, -1.0] * (1 + k)
    signals = wave + [0.0, 0.0, 9.8] + 0.8 * rng.normal(size=(samples, 3)) + 0.5 * k
    table = pd.DataFrame(signals, columns=["ax", "ay", "az"])
    table.insert(0, "t", time)
    table["hr"] = 70 + 10 * k + 5 * rng.normal(size=samples)
    table["activity"] = np.array(CLASSES)[y]
    table.loc[100:110, "hr"] = np.nan
    table.loc[3900:4100, "activity"] = ""
    return table.drop(range(1500, 1750))


@dataclass(frozen=True)
class WatchRuns:
    """Where everything lies."""

    root: Path

    def csv(self, client: int) -> Path:
        return self.root / "rec" / f"{SUBJECTS[client]}.csv"

    def comparison(self, name: str) -> Path:
        (folder,) = (self.root / "runs" / name.replace(" ", "-")).iterdir()
        return folder

    def run(self, name: str, algorithm: str) -> Path:
        return self.comparison(name) / f"{algorithm}-seed0"


def shards_of(run) -> shards.ShardSet:
    """Return the shards that a `Run` was made on."""
    return shards.load(Path(run.data["folder"]))


def make(root: Path, comparisons: Mapping[str, list[str]] = COMPARISONS) -> WatchRuns:
    """Write the recordings and make all runs."""
    (root / "rec").mkdir()
    for k, name in enumerate(SUBJECTS):
        recording(k).to_csv(root / "rec" / f"{name}.csv", index=False)
    (root / "watch.yaml").write_text(yaml.safe_dump(DESCRIPTION, sort_keys=False))
    for name, options in comparisons.items():
        where = ["-data", str(root / "watch.yaml"), "--data-root", str(root / "data")]
        out = ["-o", str(root / "runs" / name.replace(" ", "-"))]
        assert main([*where, *FAST, *out, *options]) == 0
    return WatchRuns(root)
