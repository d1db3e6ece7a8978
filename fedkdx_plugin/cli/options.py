"""Flags of several commands, and the configuration that they give."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset_utils.spec import Files, ShardSpec, check_used
from fedkdx_plugin.configuration.config import Config, Options, from_dict, read_yaml
from fedkdx_plugin.tracking.names import TRACKERS
from registry import catalog
from registry.errors import UserError
from registry.flags import add_flags
from registry.parameters import Params, key_of, option

# Options by what they are about: title -> names of fields of `Options`. Help and documentation show them so.
GROUPS = {
    "what is compared": ("algorithm", "model", "student_model", "preset", "label", "num_classes"),
    "rounds and repetitions": ("global_rounds", "join_ratio", "sampling", "eval_gap", "times", "vary", "seed"),
    "training at a client": (
        *("local_epochs", "batch_size", "local_learning_rate", "learning_rate_decay", "learning_rate_decay_gamma"),
        *("optimizer", "clip_norm", "class_weights", "augment", "bn", "norm"),
    ),
    "clients that are absent, slow or faulty": ("unseen", "late", "rare", "dropout", "stragglers", "corrupt"),
    "attacks and robust averages": (
        *("attack", "attackers", "attack_strength", "aggregate", "assumed_bad", "max_share", "outliers"),
    ),
    "privacy": ("dp", "epsilon", "delta", "clip", "dp_noise", "secure_aggregation"),
    "machine": ("device", "device_id", "backend", "precision", "client_memory", "engine"),
    "output": ("goal", "out"),
}


@dataclass(frozen=True)
class Making(Params):
    """Options of how runs are made, which do not change the results."""

    jobs: int | None = option(
        None,
        "number of runs in parallel, in a process each (default: 1; for a grid, one a CPU thread, or 1 on a GPU; all "
        "jobs with --launcher slurm)",
        1,
        flags="--jobs",
    )
    launcher: str = option(
        "local",
        "where runs are made: on this machine, or each as a job of a Slurm cluster",
        choices=("local", "slurm"),
        flags="--launcher",
    )
    slurm: tuple[str, ...] = option(
        (),
        "options of sbatch for --launcher slurm, such as partition=gpu,time=120,gpus_per_node=1",
        flags="--slurm",
    )
    track: tuple[str, ...] = option(
        (),
        "also send metrics to these trackers during the runs; several are separated by commas",
        choices=TRACKERS,
        flags="--track",
    )
    tensorboard: bool = option(False, "the same as --track tensorboard", flags="--tensorboard", switch=True)
    dry_run: bool = option(
        False,
        "show the resolved configuration and describe the data, or list the runs of a grid, then stop",
        flags="--dry-run",
        switch=True,
    )

    @property
    def trackers(self) -> tuple[str, ...]:
        """Names of the trackers."""
        return (*self.track, "tensorboard") if self.tensorboard else self.track


def add_options(parser: argparse.ArgumentParser, data: bool = True) -> None:
    """Add the flags of a configuration, None by default.

    Args:
        data: add `-data`, too.
    """
    if data:
        text = "name of a data set, YAML file that describes your own, or folder of shards"
        parser.add_argument("-data", "--data", "--dataset", dest="data", help=text)
    text = "set a hyper-parameter (FedKDX.gamma=0.5: of one algorithm only)"
    parser.add_argument("--set", action="append", metavar="NAME=VALUE", help=text)
    for title, names in GROUPS.items():
        add_flags(parser.add_argument_group(title), Options, only=names)
    group = parser.add_argument_group("data")
    add_flags(group, ShardSpec)
    add_flags(group, Files)


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add `--config`."""
    text = "read options from a file; those of the command line override it"
    parser.add_argument("--config", metavar="YAML", help=text)


def refuse_hyper_parameters(words: Sequence[str], known: Container[str]) -> None:
    """Raise UserError where a word is a hyper-parameter written as a flag, such as `-mu`, which would be `-m u`.

    Args:
        known: the flags that there are.
    """
    named = {f"-{dashes}{name}": name for name in _hyper_parameters(words, known) for dashes in ("", "-")}
    for word, following in zip(words, [*words[1:], "VALUE"], strict=False):
        flag, equals, value = word.partition("=")
        if (name := named.get(flag.replace("_", "-"))) and flag.replace("_", "-") not in known:
            set_to = f"--set {name.replace('-', '_')}={value if equals else following}"
            raise UserError(f"{flag}: a hyper-parameter of an algorithm is set by {set_to}")


def _hyper_parameters(words: Sequence[str], known: Container[str]) -> list[str]:
    """Return the names of all hyper-parameters, with '-' for '_'; none if every flag is known: they take seconds."""
    flags = [word.partition("=")[0].replace("_", "-") for word in words if re.match("--?[A-Za-z]", word)]
    if all(flag in known for flag in flags):
        return []
    algorithms: list[Any] = [
        catalog.load_entry(entry) for entry in catalog.entries("algorithms") if entry.origin == "built-in"
    ]
    return [key_of(own).replace("_", "-") for one in algorithms for own in dataclasses.fields(one.Params)]


def given_values(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options given on the command line by key, hyper-parameters under 'set'. Raises UserError."""
    values = {key: value for key, value in vars(arguments).items() if value is not None}
    return values | {"set": dict(map(_assignment, values.pop("set", [])))}


def read_config(arguments: argparse.Namespace) -> Config:
    """Return the checked configuration: defaults <- YAML <- command line. Raises UserError."""
    given = given_values(arguments)
    path = given.pop("config", None)
    values: dict[str, Any] = read_yaml(Path(path)) if path else {}
    sets = values.get("set") or {}
    if isinstance(sets, Mapping):  # otherwise `from_dict` raises
        sets = dict(sets) | given["set"]
    config = from_dict(values | given | {"set": sets}, path or "")
    check_used(given.keys() if config.complete else values.keys() | given.keys(), config.shards)
    # a preset that is asked for now must exist, even where the file has all values
    return dataclasses.replace(config, complete=config.complete and "preset" not in given)


def _assignment(text: str) -> tuple[str, str]:
    """Return name and value of a `--set`. Raises UserError."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UserError(f"--set {text}: is no assignment; write NAME=VALUE")
    return name.strip(), value.strip()
