"""Parameters of shards, their checks and their command-line flags. Imports nothing heavy."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NoReturn

from registry.errors import UserError

PARTITIONS = ("subject", "iid", "dirichlet", "pathological")
SPLITS = ("shuffled", "blocked", "loso", "given")
SCALES = ("federated", "client", "minmax", "none")
EVALUATE_ON = ("test", "validation")
LAYOUT = 2  # number of the layout on disk and of the code that makes it; a new layout means new folders

FLAGS = {
    "data": "-data",
    "clients": "-nc",
    "partition": "--partition",
    "alpha": "--alpha",
    "classes_per_client": "--classes-per-client",
    "split": "--split",
    "test_fraction": "--test-fraction",
    "scale": "--scale",
    "min_samples": "--min-samples",
    "seed": "--seed",
    "window": "--window",
    "overlap": "--overlap",
    "median": "--median",
    "lowpass": "--lowpass",
    "gravity": "--gravity",
    "train_fraction": "--train-fraction",
    "evaluate_on": "--evaluate-on",
    "allow_missing": "--allow-missing",
}
OVERRIDES = ("window", "overlap", "median", "lowpass", "gravity")


@dataclass(frozen=True)
class ShardSpec:
    """Parameters of shards: the data, how they are cut into windows, split and divided among clients.

    Attributes:
        data: a data set's name, or the path of the YAML file that describes the user's own data.
        clients: number of clients; None makes one for each subject.
        partition: 'subject', 'iid', 'dirichlet' or 'pathological'.
        alpha: concentration of the Dirichlet distribution; smaller is more uneven.
        classes_per_client: classes that a client of the pathological partition holds.
        split: 'shuffled', 'blocked' (apart in time, leak-free), 'loso' (one subject left out) or 'given' (by the data).
        test_fraction: share of the windows to test on, in (0, 1).
        scale: 'federated' (z-scores by pooled statistics of all clients' training windows), 'client' (z-scores by each
            client's own training windows), 'minmax' (to the range 0 to 1, likewise) or 'none'.
        min_samples: least number of training windows of a client.
        seed: seed of split and partition.
        window: length of a window: seconds, or a text such as '2.56 s' or '128 samples' (see `window_samples`); None
            keeps the data set's own, also for the next four.
        overlap, median, lowpass, gravity: as in `recording.Preprocessing`.
        train_fraction: share of each client's training windows that is kept, in (0, 1].
        evaluate_on: 'test', or 'validation': a fifth of each client's training windows is held out and replaces the
            test windows, which are not used.
        allow_missing: whether a subject or a class of the data set without a window is accepted.
    """

    data: str
    clients: int | None = None
    partition: str = "subject"
    alpha: float = 0.1
    classes_per_client: int = 2
    split: str = "shuffled"
    test_fraction: float = 0.2
    scale: str = "federated"
    min_samples: int = 10
    seed: int = 0
    window: float | str | None = None
    overlap: float | None = None
    median: int | None = None
    lowpass: float | None = None
    gravity: float | None = None
    train_fraction: float = 1.0
    evaluate_on: str = "test"
    allow_missing: bool = False

    def check(self) -> None:
        """Raise UserError, naming the flag, for an invalid value."""
        if not isinstance(self.data, str) or not self.data.strip():
            raise UserError("-data must name a data set or a YAML file that describes your own")
        _whole(self, "clients", 1)
        _whole(self, "classes_per_client", 1)
        _whole(self, "min_samples", 1)
        _whole(self, "seed", 0)
        if self.window is not None and _length(self.window) is None:
            raise UserError(f"--window must be seconds, or '128 samples', not {self.window!r}")
        _whole(self, "median", 0)
        if self.median and self.median % 2 == 0:
            raise UserError(f"--median must be an odd number of samples, or 0 for no filter, not {self.median}")
        if not isinstance(self.allow_missing, bool):
            raise UserError(f"--allow-missing must be true or false, not {self.allow_missing!r}")
        _choice(self, "partition", PARTITIONS)
        _choice(self, "split", SPLITS)
        _choice(self, "scale", SCALES)
        _choice(self, "evaluate_on", EVALUATE_ON)
        _real(self, "alpha", lambda v: v > 0, "above 0")
        _real(self, "test_fraction", lambda v: 0 < v < 1, "between 0 and 1, both excluded")
        _real(self, "train_fraction", lambda v: 0 < v <= 1, "above 0 and at most 1")
        _real(self, "overlap", lambda v: 0 <= v < 1, "at least 0 and below 1")
        _real(self, "lowpass", lambda v: v >= 0, "a frequency in Hz, or 0 for no filter")
        _real(self, "gravity", lambda v: v >= 0, "a frequency in Hz, or 0 to leave gravity in")

    def counted(self) -> dict[str, Any]:
        """Return the parameters that the contents of shards depend on.

        Left out are the data set's name or path, parameters of another partition or split, and reductions that are not
        made.
        """
        values = {key: value for key, value in asdict(self).items() if key != "data"}
        if self.partition != "dirichlet":
            del values["alpha"]
        if self.partition != "pathological":
            del values["classes_per_client"]
        if self.split in ("loso", "given"):
            del values["test_fraction"]
        if self.train_fraction == 1:
            del values["train_fraction"]
        if (length := _length(self.window)) is not None:
            values["window"] = " ".join(map(str, length))  # independent of its spelling
        if self.evaluate_on == "test":
            del values["evaluate_on"]
        if not self.allow_missing:
            del values["allow_missing"]
        # 1 and 1.0 must give the same name
        return {k: float(v) if isinstance(v, int | float) else v for k, v in sorted(values.items())}

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
        if self.train_fraction != 1:
            parts.append(f"train{self.train_fraction:g}")
        if self.evaluate_on != "test":
            parts.append(self.evaluate_on)
        parts += [self.split, f"seed{self.seed}", hashlib.sha256(text.encode()).hexdigest()[:8]]
        return "-".join(parts)


class Parser(argparse.ArgumentParser):
    """Argument parser that reports a wrong command line as a UserError."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError with the parser's message."""
        raise UserError(f"{message}; see --help")


def add_arguments(parser: argparse.ArgumentParser, seed_flag: str) -> None:
    """Add the flags that describe shards (all but `-data`); a flag left out gives None.

    Args:
        parser: parser to extend.
        seed_flag: `--seed` if there is no other seed, `--data-seed` beside a training seed.
    """
    default = ShardSpec("")
    group = parser.add_argument_group("data")
    add = group.add_argument
    add("-nc", "--num_clients", type=int, metavar="N", help="number of clients (default: one a subject)")
    add("--partition", choices=PARTITIONS, help=f"how the clients' data differ (default: {default.partition})")
    add(
        "--alpha",
        type=float,
        metavar="A",
        help=f"dirichlet: smaller is more uneven (default: {default.alpha})",
    )
    add(
        "--classes-per-client",
        type=int,
        metavar="N",
        help=f"pathological: classes a client holds (default: {default.classes_per_client})",
    )
    add(
        "--split",
        choices=SPLITS,
        help="train and test windows: shuffled (the paper's; overlapping windows on both sides flatter), "
        "blocked (apart in time, leak-free), loso (test on one subject, left out of training: the one whose number is "
        f"the data seed) or given (by the data set's own description) (default: {default.split})",
    )
    add(
        "--test-fraction",
        type=float,
        metavar="F",
        help=f"share to test on (default: {default.test_fraction})",
    )
    add(
        "--train-fraction",
        type=float,
        metavar="F",
        help=f"share of each client's training windows to keep (default: {default.train_fraction:g})",
    )
    add(
        "--evaluate-on",
        choices=EVALUATE_ON,
        help="validation: measure on a fifth of the training windows, held out, to choose hyper-parameters by "
        f"(default: {default.evaluate_on})",
    )
    add(
        "--scale",
        choices=SCALES,
        help="channels: federated (z-scores by what the clients' training parts have in common), client (z-scores by "
        f"its own) or minmax (0 to 1 by its own), or none (default: {default.scale})",
    )
    add(
        "--min-samples",
        type=int,
        metavar="N",
        help=f"training windows every client has at least (default: {default.min_samples})",
    )
    own = "(default: the data set's own)"
    add("--window", type=_number_or_text, metavar="LENGTH", help=f"of a window: 2.56 (seconds) or '128 samples' {own}")
    add("--overlap", type=float, metavar="F", help=f"share of a window that the next one repeats {own}")
    add("--median", type=int, metavar="N", help=f"median filter, samples, odd; 0: none {own}")
    add("--lowpass", type=float, metavar="HZ", help=f"cutoff of the low-pass filter; 0: none {own}")
    add("--gravity", type=float, metavar="HZ", help=f"cutoff that splits gravity off; 0: do not {own}")
    add(seed_flag, dest="data_seed", type=int, metavar="N", help="seed of split and partition (default: 0)")
    add(
        "--allow-missing",
        action="store_true",
        default=None,
        help="go on where a subject or a class has no window, which is an error otherwise",
    )
    add("--raw", metavar="PATH", help="the data set's original files: folder, zip or file")
    add("--download", action="store_true", default=None, help="allow fetching the original files")
    add("--data-root", metavar="DIR", help="where prepared data are kept (default: data)")


def from_arguments(namespace: argparse.Namespace) -> ShardSpec:
    """Return the checked spec of a parsed command line, with defaults for values that are None or absent.

    Raises:
        UserError: a value out of range.
    """
    sources = {"clients": "num_clients", "seed": "data_seed"}
    given = {f.name: getattr(namespace, sources.get(f.name, f.name), None) for f in fields(ShardSpec)}
    spec = ShardSpec(**{"data": "", **{key: value for key, value in given.items() if value is not None}})
    spec.check()
    return spec


def window_samples(window: float | str, rate: float) -> int:
    """Return the samples of a window of `2.56` (seconds), '2.56 s' or '128 samples' at `rate` Hz.

    Raises:
        ValueError: fewer than 2.
    """
    length = _length(window)
    samples = 0 if length is None else round(length[0] * (rate if length[1] == "s" else 1))
    if samples < 2:
        raise ValueError(f"{window!r} is no window of two samples or more at {rate:g} Hz")
    return samples


def _number_or_text(text: str) -> float | str:
    """Return a flag's value as a number where it is one."""
    try:
        return float(text)
    except ValueError:
        return text


def _length(window: Any) -> tuple[float, str] | None:
    """Return number and unit, 's' or 'samples'; None where it is neither."""
    if isinstance(window, bool) or not isinstance(window, int | float | str):
        return None
    hit = re.fullmatch(r"\s*([0-9]+\.?[0-9]*|\.[0-9]+)\s*(s|samples)?\s*", str(window))
    return (float(hit[1]), hit[2] or "s") if hit and math.isfinite(float(hit[1])) and float(hit[1]) > 0 else None


def is_own_data(data: str) -> bool:
    """Return whether `-data` is the YAML file of the user's own data rather than a data set's name."""
    return Path(data).suffix.lower() in (".yaml", ".yml")


def _whole(spec: ShardSpec, name: str, low: int) -> None:
    value: Any = getattr(spec, name)
    if value is None and name in ("clients", *OVERRIDES):
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise UserError(f"{FLAGS[name]} must be a whole number of at least {low}, not {value!r}")


def _real(spec: ShardSpec, name: str, fits: Callable[[float], bool], right: str) -> None:
    value: Any = getattr(spec, name)
    if value is None and name in OVERRIDES:
        return
    number = not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    if not number or not fits(value):
        raise UserError(f"{FLAGS[name]} must be {right}, not {value!r}")


def _choice(spec: ShardSpec, name: str, choices: tuple[str, ...]) -> None:
    value = getattr(spec, name)
    if value not in choices:
        raise UserError(f"{FLAGS[name]} must be one of {', '.join(choices)}, not {value!r}")
