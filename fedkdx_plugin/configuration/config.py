"""The configuration of a comparison: defaults <- YAML <- command line, checked before anything runs."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset_utils.spec import ShardSpec, from_arguments
from registry import parameters
from registry.errors import UserError

# where a shard parameter's name in YAML and on the command line is not its own
RENAMED = {"clients": "num_clients", "seed": "data_seed"}
SHARD_KEYS = {field.name: RENAMED.get(field.name, field.name) for field in dataclasses.fields(ShardSpec)}


STARTED = "started.json"  # in a comparison's folder: the command, and where it was given


def option(default: Any, flags: str, help: str, **limits: Any) -> Any:
    """A field with its command-line flags, one line of help, and `low`, `high` or `choices` as its limits."""
    return field(default=default, metadata={"flags": flags.split(), "help": help, **limits})


@dataclass(frozen=True)
class Options:
    """All that is a plain value. Names and meaning follow PFLlib's flags."""

    algorithm: tuple[str, ...] = option(
        ("FedKDX",), "-algo --algorithm", "one or several, separated by commas, or 'all'"
    )
    model: str = option("cnn", "-m --model", "every client's model (the teacher, where there are two)")
    student_model: str | None = option(None, "-sm --student_model", "the shared student's model (default: as -m)")
    global_rounds: int = option(500, "-gr --global_rounds --rounds", "communication rounds", low=1)
    join_ratio: float = option(0.4, "-jr --join_ratio", "share of the clients selected in a round", low=1e-9, high=1)
    unseen: float = option(
        0.0, "--unseen", "clients never selected and measured apart: a number, or a share below 1", low=0
    )
    late: str | None = option(None, "--late", "share of clients that join in a later round, such as 0.3@50")
    rare: str | None = option(
        None, "--rare", "share of clients reached in a round only with a probability, such as 0.3@0.1"
    )
    dropout: float = option(0.0, "--dropout", "probability that a selected client drops out of a round", low=0, high=1)
    stragglers: float = option(
        0.0, "--stragglers", "probability that it has time for some of its epochs only", low=0, high=1
    )
    corrupt: float = option(0.0, "--corrupt", "probability that its reply arrives damaged", low=0, high=1)
    batch_size: int = option(32, "-lbs --batch_size", "windows in a local batch", low=1)
    local_learning_rate: float = option(0.01, "-lr --local_learning_rate", "of the clients' SGD", low=1e-12)
    learning_rate_decay: bool = option(
        True, "-ld --learning_rate_decay", "shrink a client's rate each time it has trained (true or false)"
    )
    learning_rate_decay_gamma: float = option(
        0.99, "-ldg --learning_rate_decay_gamma", "factor of that decay", low=1e-9, high=1
    )
    local_epochs: int = option(4, "-ls --local_epochs", "passes over a client's data in a round", low=1)
    clip_norm: float = option(10.0, "--clip_norm", "bound on each network's gradient norm; 0: none", low=0)
    bn: str = option(
        "average", "--bn", "batch norm: averaged with the weights, or local (FedBN)", choices=("average", "local")
    )
    num_classes: int | None = option(None, "-nb --num_classes", "checked against the data", low=2)
    times: int = option(
        1, "-t --times", "repeat with seeds seed, seed + 1, ...; what differs between them, --vary says", low=1
    )
    vary: str = option(
        "training",
        "--vary",
        "what -t varies: training (initial weights, batches, client sampling) or data (split, kept share and "
        "partition, too)",
        choices=("training", "data"),
    )
    seed: int = option(0, "--seed", "of weights, batches and client sampling", low=0)
    device: str = option("auto", "-dev --device", "cpu, cuda, or auto", choices=("auto", "cpu", "cuda"))
    device_id: int = option(0, "-did --device_id", "which CUDA device", low=0)
    backend: str = option(
        "auto",
        "--backend",
        "how clients are trained: one by one, in processes, stacked on one device, or what is fastest here",
        choices=("auto", "sequential", "parallel", "stacked"),  # engine.backends.NAMES, which imports torch
    )
    precision: str = option(
        "float32",
        "--precision",
        "products on a GPU: of float32, or of numbers shortened to 10 binary digits, which is faster",
        choices=("float32", "tf32"),
    )
    client_memory: str = option(
        "device",
        "--client-memory --client_memory",
        "where clients' state and training windows lie between rounds: on the GPU, or in the host's memory",
        choices=("device", "host"),
    )
    engine: str = option(
        "local",
        "--engine",
        "local: in this process; flower: a Flower federation of processes on this machine, one a site, to try it out",
        choices=("local", "flower"),
    )
    eval_gap: int = option(1, "-eg --eval_gap", "evaluate every so many rounds", low=1)
    preset: str = option("paper", "--preset", "hyper-parameters to begin with: paper, tuned, or a YAML file")
    label: str = option("", "--label", "shown behind the algorithms' names, to tell variants of one apart")
    goal: str = option("test", "-go --goal", "a label; part of the run folder's name")
    out: str = option("runs", "-o --out", "where run folders are made")
    raw: str | None = option(None, "", "the data set's original files")
    download: bool = option(False, "", "allow fetching them")
    data_root: str = option("data", "", "where prepared data are kept")


@dataclass(frozen=True)
class Config(Options):
    """What to run.

    Attributes:
        set: hyper-parameters of the algorithms, `name` or `Algorithm.name` -> value, checked when the algorithms load.
        shards: which data, cut and divided how.
    """

    set: Mapping[str, Any] = field(default_factory=dict)
    shards: ShardSpec = field(default_factory=lambda: ShardSpec(""))

    def to_dict(self) -> dict[str, Any]:
        """Flat and plain, as YAML holds it; `from_dict` reads it back."""
        shards = {key: getattr(self.shards, name) for name, key in SHARD_KEYS.items()}
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(Options)}
        return shards | options | {"algorithm": list(self.algorithm), "set": dict(self.set)}


def seeded(config: Config, seed: int) -> Config:
    """The configuration of the runs under one seed: `--vary data` gives each seed shards of its own."""
    if config.vary != "data":
        return config
    shards = dataclasses.replace(config.shards, seed=config.shards.seed + seed - config.seed)
    return dataclasses.replace(config, seed=seed, shards=shards)


def from_dict(values: Mapping[str, Any], where: str) -> Config:
    """A checked configuration from flat values (YAML merged with the command line).

    Args:
        where: what the values come from, for error messages.

    Raises:
        UserError: unknown key, wrong type, value out of range, or no data set named.
    """
    own = {f.name for f in dataclasses.fields(Options)}
    known = own | {"set"} | set(SHARD_KEYS.values())
    for key in values:
        if key not in known:
            raise UserError(f"{where}: unknown key '{key}'{parameters.suggest(str(key), known)}")
    if not values.get("data"):
        raise UserError("which data? -data takes a name (see --list), a YAML file or a folder of shards")
    sets = values.get("set") or {}
    if not isinstance(sets, Mapping):
        raise UserError(f"{where}: 'set' must map names to values, such as 'gamma: 0.5'")
    options = parameters.parse(Options, {key: value for key, value in values.items() if key in own}, where)
    if not options.algorithm:
        raise UserError(f"{where}: algorithm: names none; see --list")
    if not all(c.isalnum() or c in "-_" for c in options.goal):
        raise UserError(f"{where}: goal: {options.goal!r} may hold letters, digits, '-' and '_' only")
    if not options.label.isprintable() or any(c in options.label for c in "/\\|"):
        raise UserError(f"{where}: label: {options.label!r} may hold no line break, slash or bar")
    shards = from_arguments(argparse.Namespace(**values))
    return Config(**vars(options), set=dict(sets), shards=shards)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError."""
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not YAML ({' '.join(str(error).split())})") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold 'name: value' lines")
    return values
