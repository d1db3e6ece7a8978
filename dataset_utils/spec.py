"""Parameters of shards. Imports nothing heavy."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Container
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dataset_utils import limits
from dataset_utils.files import is_folder
from registry.errors import UserError
from registry.parameters import Params, option
from registry.text import natural, shown

PARTITIONS = ("subject", "iid", "dirichlet", "pathological")
SPLITS = ("shuffled", "blocked", "loso", "given")
SCALES = ("federated", "client", "minmax", "none")
EVALUATE_ON = ("test", "validation")
LAYOUT = 2  # number of the layout on disk and of the code that makes it; a new layout means new folders

# options that only some values of another option use: option -> the other, and those values
ONLY_WITH = {
    "alpha": ("partition", ("dirichlet",)),
    "classes_per_client": ("partition", ("pathological",)),
    "test_fraction": ("split", ("shuffled", "blocked")),
}

OVERRIDES = ("window", "overlap", "median", "lowpass", "gravity")
OWN = "(default: the data set's own)"


@dataclass(frozen=True)
class ShardSpec(Params):
    """Parameters of shards: the data, how they are cut into windows, split and divided among clients.

    Names of subjects are kept in their natural order, each once.

    Raises:
        UserError: a value of the wrong type or out of range.
    """

    data: str = option("", "a data set's name, a YAML file of your own, or a folder of shards")
    clients: int | None = option(
        None,
        "number of clients (default: one a subject); with --partition subject, fewer leave the last subjects out",
        1,
        flags="-nc --num-clients",
        key="num_clients",
    )
    partition: str = option("subject", "how the clients' data differ", choices=PARTITIONS, flags="--partition")
    alpha: float = option(
        0.1, "dirichlet: concentration of the distribution; smaller is more uneven", above=0, flags="--alpha"
    )
    classes_per_client: int = option(2, "pathological: classes a client holds", 1, flags="--classes-per-client")
    split: str = option(
        "shuffled",
        "training and test windows: shuffled (the paper's; overlapping windows on both sides flatter), blocked (apart "
        "in time, leak-free), loso (test on one subject, left out of training: the one whose number is the data seed) "
        "or given (by the data set's own description)",
        choices=SPLITS,
        flags="--split",
    )
    test_fraction: float = option(0.2, "share of the windows to test on", above=0, below=1, flags="--test-fraction")
    scale: str = option(
        "federated",
        "scaling of channels: federated (z-scores by statistics of all clients' training windows), client (z-scores by "
        "its own), minmax (0 to 1 by its own) or none",
        choices=SCALES,
        flags="--scale",
    )
    min_samples: int = option(10, "fewest training windows that a client may have", 1, flags="--min-samples")
    seed: int = option(0, "seed of the split and the partition", 0, flags="--data-seed", key="data_seed")
    window: float | str | None = option(
        None, f"length of a window: 2.56 (seconds), '2.56 s' or '128 samples' {OWN}", flags="--window"
    )
    overlap: float | None = option(
        None, f"share of a window that the next one repeats {OWN}", 0, below=1, flags="--overlap"
    )
    median: int | None = option(None, f"median filter, samples, odd; 0: none {OWN}", 0, flags="--median")
    lowpass: float | None = option(None, f"cutoff of the low-pass filter in Hz; 0: none {OWN}", 0, flags="--lowpass")
    gravity: float | None = option(None, f"cutoff in Hz that splits gravity off; 0: do not {OWN}", 0, flags="--gravity")
    train_fraction: float = option(
        1.0, "share of each client's training windows to keep", above=0, high=1, flags="--train-fraction"
    )
    evaluate_on: str = option(
        "test",
        "validation: measure on a fifth of each client's training windows, held out, in place of the test windows, "
        "which stay unseen: to choose hyper-parameters by",
        choices=EVALUATE_ON,
        flags="--evaluate-on",
    )
    subjects: tuple[str, ...] = option(
        (), "use these subjects alone, by name, separated by commas (default: all)", flags="--subjects", filled=True
    )
    exclude_subjects: tuple[str, ...] = option(
        (),
        "leave these subjects out, such as one who wore the sensor the other way round",
        flags="--exclude-subjects",
        filled=True,
    )
    allow_missing: bool = option(
        False,
        "go on where a subject or a class has no window, which is an error otherwise",
        flags="--allow-missing",
        switch=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("subjects", "exclude_subjects"):  # one choice has one text, however it was written
            object.__setattr__(self, name, tuple(sorted(set(getattr(self, name)), key=natural)))
        if self.window is not None and _length(self.window) is None:
            raise UserError(f"--window: {self.window!r} is no length; write seconds, or '128 samples'")
        if self.subjects and self.exclude_subjects:
            raise UserError("--subjects and --exclude-subjects: give one of them")
        if self.median and self.median % 2 == 0:
            raise UserError(f"--median: {self.median} is even; it must be an odd number of samples, or 0 for no filter")

    def counted(self) -> dict[str, Any]:
        """Return the parameters that the contents of shards depend on.

        Left out are the data set's name or path, parameters of another partition or split, and reductions that are not
        made.
        """
        values = {key: value for key, value in asdict(self).items() if key != "data"}
        for name in ONLY_WITH:
            if not self.uses(name):
                del values[name]
        if self.train_fraction == 1:
            del values["train_fraction"]
        if (length := _length(self.window)) is not None:
            values["window"] = " ".join(map(str, length))  # independent of its spelling
        if self.evaluate_on == "test":
            del values["evaluate_on"]
        if not self.allow_missing:
            del values["allow_missing"]
        for name in ("subjects", "exclude_subjects"):
            values[name] = sorted(values[name])  # by letters, as in the folder names of all versions
            if not values[name]:
                del values[name]
        # 1 and 1.0 must give the same name, and whole numbers that a float does not tell apart different ones
        return {k: float(v) if isinstance(v, int | float) and float(v) == v else v for k, v in sorted(values.items())}

    def uses(self, name: str) -> bool:
        """Return whether the shards depend on a parameter of `ONLY_WITH`, with this partition and this split."""
        other, values = ONLY_WITH[name]
        return getattr(self, other) in values

    def folder_name(self) -> str:
        """Return a readable name that differs if a parameter of `counted` differs."""
        text = json.dumps({"layout": LAYOUT, **self.counted()}, sort_keys=True)
        kind = {
            "dirichlet": f"dirichlet{self.alpha:g}",
            "pathological": f"pathological{self.classes_per_client}",
        }
        parts = [kind.get(self.partition, self.partition)]
        if self.clients is not None:
            parts.append(f"nc{self.clients}")
        if self.subjects:
            parts.append(f"only{len(self.subjects)}")
        if self.exclude_subjects:
            parts.append(f"without{len(self.exclude_subjects)}")
        if self.train_fraction != 1:
            parts.append(f"train{self.train_fraction:g}")
        if self.evaluate_on != "test":
            parts.append(self.evaluate_on)
        parts += [self.split, f"seed{self.seed}", hashlib.sha256(text.encode()).hexdigest()[:8]]
        return "-".join(parts)


def check_used(named: Container[str], *specs: ShardSpec) -> None:
    """Raise UserError where an option was named that none of several shards depends on: it would be ignored.

    Args:
        named: the options that somebody gave a value of, by key.
        specs: the parameters of all shards that these options are for.
    """
    for name, (other, values) in ONLY_WITH.items():
        if name in named and not any(spec.uses(name) for spec in specs):
            found = ", ".join(dict.fromkeys(getattr(spec, other) for spec in specs))
            raise UserError(
                f"--{name.replace('_', '-')}: --{other} {found} does not use it; leave it out, or take --{other} "
                f"{' or '.join(values)}"
            )


@dataclass(frozen=True)
class Files(Params):
    """Paths of the original files and of the prepared data."""

    raw: str | None = option(None, "the data set's original files: folder, zip or file", flags="--raw")
    download: bool = option(False, "allow fetching the original files", flags="--download", switch=True)
    data_root: str = option("data", "where prepared data are kept", flags="--data-root")


def window_samples(window: float | str, rate: float) -> int:
    """Return the samples of a window of `2.56` (seconds), '2.56 s' or '128 samples' at `rate` Hz.

    Raises:
        ValueError: fewer than 2, or more than `limits.WINDOW`.
    """
    length = _length(window)
    samples = 0 if length is None else min(length[0] * (rate if length[1] == "s" else 1), limits.WINDOW + 1)
    if round(samples) < 2:
        raise ValueError(f"{shown(repr(window))} is no window of two samples or more at {rate:g} Hz")
    if samples > limits.WINDOW:
        raise ValueError(f"{shown(repr(window))} is more than {limits.WINDOW} samples at {rate:g} Hz")
    return round(samples)


def _length(window: Any) -> tuple[float, str] | None:
    """Return number and unit, 's' or 'samples'; None where it is neither."""
    if isinstance(window, bool) or not isinstance(window, int | float | str):
        return None
    hit = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*(s|samples)?\s*", str(window))
    return (float(hit[1]), hit[2] or "s") if hit and math.isfinite(float(hit[1])) and float(hit[1]) > 0 else None


def shards_folder(data: str) -> Path | None:
    """Return the folder of shards that `-data` names, or None where it is a data set's name or a YAML file.

    A folder is named by a path with a separator (`./SPAR`): a folder in the working directory must not take the place
    of the data set of its name. Raises UserError where the path cannot be looked up.
    """
    path = Path(data)
    named = any(separator in data for separator in ("/", os.sep, os.altsep or os.sep)) or data in (".", "..")
    return path if named and is_folder(path) else None


def is_own_data(data: str) -> bool:
    """Return whether `-data` is the YAML file of the user's own data rather than a data set's name."""
    return Path(data).suffix.lower() in (".yaml", ".yml")
