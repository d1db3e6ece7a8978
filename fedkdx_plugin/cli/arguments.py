"""The flags of the command line, and the configuration that they give."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from dataset_utils.spec import Parser, add_arguments
from fedkdx_plugin.configuration.config import Config, Options, from_dict, read_yaml
from registry import __version__
from registry.errors import UserError

EXAMPLE = "example: python run.py -data SPAR -algo Local,FedAvg,FedKDX -m cnn -jr 0.4 -gr 20"


def build_parser() -> Parser:
    """All flags; what is not given is absent from the namespace, or None."""
    parser = Parser(
        prog="fedkdx",
        description="Compare federated-learning algorithms on wearable and healthcare data.",
        epilog=EXAMPLE,
        allow_abbrev=False,
    )
    parser.add_argument(
        "-data", "--dataset", dest="data", help="a data set's name, a YAML file of your own, or a folder of shards"
    )
    for option in fields(Options):
        flags, default = option.metadata["flags"], option.default
        if not flags:
            continue
        choices, text = option.metadata.get("choices"), option.metadata["help"]
        shown = ",".join(default) if isinstance(default, tuple) else default
        parser.add_argument(
            *flags,
            dest=option.name,
            metavar="|".join(choices) if choices else option.name.rpartition("_")[2].upper(),
            help=text if default is None else f"{text} (default: {shown})",
        )
    parser.add_argument(
        "--set",
        action="append",
        metavar="NAME=VALUE",
        help="a hyper-parameter (FedKDX.gamma=0.5 for one algorithm alone)",
    )
    parser.add_argument("--config", metavar="YAML", help="read options from a file; the command line wins over it")
    parser.add_argument(
        "--resume",
        metavar="FOLDER",
        help="go on with a comparison that was interrupted, or to more rounds (-gr); takes no other option",
    )
    parser.add_argument(
        "--experiment", metavar="NAME", help="make all runs of experiments/NAME.yaml, or of a YAML file, and a report"
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="KEY=VALUES",
        help="of an experiment: the runs of these values alone (data=SLEEP)",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="of an experiment: runs side by side (default: one a CPU thread, one on a GPU)",
    )
    parser.add_argument(
        "--report", nargs="+", metavar="FOLDER", help="write a report of the runs in these folders; goes with -o alone"
    )
    parser.add_argument(
        "--tensorboard", action="store_true", help="of a comparison: write its figures for TensorBoard, too"
    )
    parser.add_argument("--list", action="store_true", help="show algorithms, models and data sets, then stop")
    parser.add_argument(
        "--dry-run", action="store_true", help="show the resolved configuration and what is in the data, then stop"
    )
    parser.add_argument("--version", action="version", version=f"fedkdx {__version__}")
    add_arguments(parser, seed_flag="--data-seed")
    return parser


def read_config(arguments: argparse.Namespace) -> Config:
    """The checked configuration: defaults <- YAML <- command line. Raises UserError."""
    given = {key: value for key, value in vars(arguments).items() if value is not None}
    for key in ("list", "dry_run", "tensorboard"):
        given.pop(key)
    for key in ("only", "jobs"):
        if key in given:
            raise UserError(f"--{key} goes with --experiment")
    path = given.pop("config", None)
    values: dict[str, Any] = read_yaml(Path(path)) if path else {}
    sets, assigned = values.get("set") or {}, dict(map(assignment, given.pop("set", [])))
    if isinstance(sets, Mapping):  # else `from_dict` says so
        sets = dict(sets) | assigned
    return from_dict(values | given | {"set": sets}, path or "command line")


def resumed(arguments: argparse.Namespace) -> Path | None:
    """The folder of `--resume`, whose configuration `arguments` then names; None without it. Raises UserError.

    The folder of one run of a comparison stands for the comparison.
    """
    given, arguments.resume = arguments.resume, None
    if given is None:
        return None
    other = [name for name, value in vars(arguments).items() if value not in (None, False)]
    other = [name for name in other if name not in ("tensorboard", "global_rounds")]
    if other:
        raise UserError(
            f"--resume takes the folder's own configuration and, but for more rounds (-gr), no other option, such as "
            f"{other[0]}"
        )
    folder = Path(given).absolute()
    if (folder / "environment.json").is_file():  # one run's own
        folder = folder.parent
        if not (folder / "config.yaml").is_file():
            raise UserError(f"--resume {given}: a run of an experiment; the experiment's own command goes on with it")
    arguments.config = str(folder / "config.yaml")
    if not Path(arguments.config).is_file():
        raise UserError(f"--resume {given}: no comparison there (it should hold a config.yaml)")
    return folder


def assignment(text: str) -> tuple[str, str]:
    """NAME=VALUE of `--set`. Raises UserError."""
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise UserError(f"--set {text}: write NAME=VALUE")
    return name.strip(), value.strip()
