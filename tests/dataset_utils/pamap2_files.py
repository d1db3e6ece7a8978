"""Makes files in PAMAP2's exact format, with signals that a model can tell apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

ACTIVITIES = (1, 2, 3, 17, 16, 12, 13, 4, 7, 6, 5, 24)
"""In the order of the protocol."""
OPTIONAL = (9, 18)
"""Watching television and folding laundry: of no interest to the loader."""


def write(
    folder: Path,
    subjects: tuple[int, ...] = (101, 102),
    seconds: float = 6.0,
    seed: int = 0,
    optional: bool = True,
) -> None:
    """Write `folder`/Protocol/subjectNNN.dat, and the same in Optional.

    54 columns apart by blanks at 100 Hz; heart rate in about every 11th row; every sensor loses packets now and then;
    one second of activity 0 before each activity; six significant digits.

    Args:
        seconds: duration of an activity.
        optional: write the Optional files too.
    """
    for subject in subjects:
        for part, activities in (("Protocol", ACTIVITIES), ("Optional", OPTIONAL)):
            if part == "Protocol" or optional:
                rng = np.random.default_rng([seed, subject, len(activities)])
                path = folder / part / f"subject{subject}.dat"
                path.parent.mkdir(parents=True, exist_ok=True)
                table = pd.DataFrame(_table(rng, activities, seconds)).astype({1: int})
                table.to_csv(path, sep=" ", header=False, index=False, na_rep="NaN", float_format="%.6g")


def _table(rng: np.random.Generator, activities: tuple[int, ...], seconds: float) -> np.ndarray:
    rows = round(100 * seconds)
    label = np.concatenate([np.r_[np.zeros(100, int), np.full(rows, activity)] for activity in activities])
    time = 5.64 + 0.01 * np.arange(len(label))
    table = np.full((len(label), 54), np.nan)
    table[:, 0], table[:, 1] = time.round(2), label
    table[::11, 2] = 80 + 2 * label[::11]
    for unit in (3, 20, 37):
        table[:, unit] = 33.5
        table[:, unit + 1 : unit + 17] = _unit(rng, label, time)
        lost = rng.random(len(label)) < 0.002
        table[lost, unit : unit + 17] = np.nan
    return table


def _unit(rng: np.random.Generator, label: np.ndarray, time: np.ndarray) -> np.ndarray:
    """Return (samples, 16) in which each activity has its own posture (gravity) and pace (Hz)."""
    axes = np.arange(3)
    posture = 9.81 * np.sin(label[:, None] * (1 + axes) + axes)
    motion = np.sin(2 * np.pi * (0.3 * label)[:, None] * time[:, None] + axes)
    acceleration = posture + motion + 0.1 * rng.normal(size=posture.shape)
    gyroscope = motion + 0.05 * rng.normal(size=posture.shape)
    magnetometer = 5 * posture + 0.5 * rng.normal(size=posture.shape)
    orientation = rng.normal(size=(len(label), 4))  # the originals' are invalid too
    return np.concatenate([acceleration, acceleration.clip(-58, 58), gyroscope, magnetometer, orientation], axis=1)
