"""The configuration of a comparison: defaults <- YAML <- command line, checked before anything runs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataset_utils import files
from dataset_utils.spec import Files, ShardSpec
from registry import parameters
from registry.errors import UserError
from registry.parameters import option


@dataclass(frozen=True)
class Options(Files):
    """Options with plain values. Names and meaning follow PFLlib's flags."""

    algorithm: tuple[str, ...] = option(
        ("FedKDX",), "one or several algorithms, separated by commas, or 'all'", flags="-algo --algorithm"
    )
    model: str = option("cnn", "every client's model (the teacher, if there are two)", flags="-m --model")
    student_model: str | None = option(None, "the shared student's model (default: as -m)", flags="-sm --student-model")
    global_rounds: int = option(500, "communication rounds", low=1, flags="-gr --global-rounds --rounds")
    join_ratio: float = option(
        0.4, "share of the clients selected in a round", low=1e-9, high=1, flags="-jr --join-ratio"
    )
    unseen: float = option(
        0.0, "clients never selected and evaluated separately: a number, or a share below 1", low=0, flags="--unseen"
    )
    late: str | None = option(None, "share of clients that join in a later round, such as 0.3@50", flags="--late")
    rare: str | None = option(
        None, "share of clients available in a round only with a probability, such as 0.3@0.1", flags="--rare"
    )
    dropout: float = option(
        0.0, "probability that a selected client drops out of a round", low=0, high=1, flags="--dropout"
    )
    stragglers: float = option(
        0.0,
        "probability that a selected client has time for only some of its epochs",
        low=0,
        high=1,
        flags="--stragglers",
    )
    corrupt: float = option(0.0, "probability that a client's reply arrives damaged", low=0, high=1, flags="--corrupt")
    outliers: float | None = option(
        None,
        "set replies aside whose norm is more than this many times the usual one; 0: none (default: between sites "
        "1000, else none)",
        low=0,
        flags="--outliers",
    )
    attack: str = option(
        "none",
        "what the attackers do: send false replies, or train on false labels (label-flip); none: they are honest",
        choices=("none", "sign-flip", "scaling", "label-flip", "gaussian", "little-is-enough"),  # engine.attacks.KINDS
        flags="--attack",
    )
    attackers: float = option(
        0.0, "share of the clients that attack; metrics are of the others alone", low=0, below=1, flags="--attackers"
    )
    attack_strength: float | None = option(
        None,
        "factor of the update (default: sign-flip 1, scaling 10), of the noise (gaussian 10), or of the standard "
        "deviation (little-is-enough 1.5)",
        above=0,
        flags="--attack-strength",
    )
    aggregate: str = option(
        "mean",
        "how the server averages the clients' states or updates: by the weighted mean, or by one that bad clients "
        "move little",
        choices=("mean", "median", "trimmed", "krum", "multi-krum", "geometric"),  # registry.aggregation.RULES
        flags="--aggregate",
    )
    assumed_bad: float = option(
        0.2,
        "share of a round's replies assumed to be bad: trimmed leaves out so many on each side, krum and multi-krum "
        "distrust so many; other means do not use it",
        low=0,
        below=0.5,
        flags="--assumed-bad",
    )
    max_share: float = option(
        1.0,
        "largest weight of one client in the mean; what exceeds it goes to the others",
        above=0,
        high=1,
        flags="--max-share",
    )
    dp: str = option(
        "none",
        "differential privacy: none, of a client's whole data (client), or of each of its windows (example)",
        choices=("none", "client", "example"),  # privacy.options.LEVELS
        flags="--dp",
    )
    epsilon: float | None = option(None, "budget ε of --dp, spent by the last round", above=0, flags="--epsilon")
    delta: float | None = option(
        None,
        "δ of --dp, below 1 / number of clients, with --dp example below 1 / windows of the smallest client",
        above=0,
        below=1,
        flags="--delta",
    )
    clip: str | None = option(
        None,
        "bound on the norm of an update with --dp client: a number, or auto (their median; the default); with --dp "
        "example on that of a window's gradient: a number",
        flags="--clip",
    )
    dp_noise: str = option(
        "central",
        "who adds the noise of --dp client: the server, or each client a share of it",
        choices=("central", "distributed"),  # privacy.options.NOISES
        flags="--dp-noise",
    )
    sampling: str = option(
        "fixed",
        "how clients are selected: a fixed number of them, or each by itself with a probability of -jr (poisson), "
        "which takes less noise with --dp",
        choices=("fixed", "poisson"),  # privacy.accounting.SAMPLINGS
        flags="--sampling",
    )
    secure_aggregation: bool = option(
        False,
        "clients mask what they send, so that the server learns the mean of a round's replies and none of them",
        flags="--secure-aggregation",
        switch=True,
    )
    batch_size: int = option(32, "windows in a local batch", low=1, flags="-lbs --batch-size")
    local_learning_rate: float | None = option(
        None,
        "learning rate of the clients' optimiser (default: the preset's for it, or 0.01); of one algorithm: "
        "--set NAME.local_learning_rate=0.05",
        low=1e-12,
        flags="-lr --local-learning-rate",
    )
    optimizer: str = option(
        "sgd",
        "the clients' optimiser, started anew in each round: plain SGD, SGD with momentum 0.9, Adam or AdamW",
        choices=("sgd", "momentum", "adam", "adamw"),  # engine.optimizers.NAMES, which imports torch
        flags="--optimizer",
    )
    class_weights: str = option(
        "none",
        "weights of the classes in the clients' cross-entropy: none, or balanced (each class that a client has counts "
        "alike)",
        choices=("none", "balanced"),  # engine.training.CLASS_WEIGHTS, which imports torch
        flags="--class-weights",
    )
    augment: tuple[str, ...] = option(
        ("none",),
        "augmentations of training windows, separated by commas: jitter (noise), scale (of channels), rotate (of x, y, "
        "z), permute (of segments); or none",
        choices=("none", "jitter", "scale", "rotate", "permute"),  # engine.augmentation.NAMES, which imports torch
        flags="--augment",
    )
    learning_rate_decay: bool = option(
        True,
        "reduce a client's learning rate each time it has trained (true or false)",
        flags="-ld --learning-rate-decay",
    )
    learning_rate_decay_gamma: float = option(
        0.99, "factor of that decay", low=1e-9, high=1, flags="-ldg --learning-rate-decay-gamma"
    )
    local_epochs: int = option(4, "passes over a client's data in a round", low=1, flags="-ls --local-epochs")
    clip_norm: float = option(10.0, "bound on each network's gradient norm; 0: no bound", low=0, flags="--clip-norm")
    bn: str = option(
        "average", "batch norm: averaged with the weights, or local (FedBN)", choices=("average", "local"), flags="--bn"
    )
    norm: str = option(
        "batch",
        "what normalises in the models: batch norm, or group, layer or no norm in its place",
        choices=("batch", "group", "layer", "none"),  # registry.normalisation.NORMS, which imports torch
        flags="--norm",
    )
    num_classes: int | None = option(
        None, "number of classes, checked against the data", low=2, flags="-nb --num-classes"
    )
    times: int = option(
        1,
        "number of repetitions, with seeds seed, seed + 1, ...; --vary sets what differs between them",
        low=1,
        flags="-t --times",
    )
    vary: str = option(
        "training",
        "what -t varies: training (initial weights, batches, client sampling) or data (also split, kept share and "
        "partition)",
        choices=("training", "data"),
        flags="--vary",
    )
    seed: int = option(0, "seed of weights, batches and client sampling", low=0, flags="--seed")
    device: str = option(
        "auto", "cpu, cuda, or auto (cuda if there is one)", choices=("auto", "cpu", "cuda"), flags="-dev --device"
    )
    device_id: int = option(0, "number of the CUDA device", low=0, flags="-did --device-id")
    backend: str = option(
        "auto",
        "how clients are trained: one by one, in processes, stacked on one device, or auto (the fastest here)",
        choices=("auto", "sequential", "parallel", "stacked"),  # backends.selection.NAMES, which imports torch
        flags="--backend",
    )
    precision: str = option(
        "float32",
        "matrix products on a GPU: in float32; or faster, in tf32 with mantissas of 10 bits, or in training in bf16 "
        "with 7 (mixed precision: sums and weights stay in float32)",
        choices=("float32", "tf32", "bf16"),  # engine.precision.MIXED, which imports torch
        flags="--precision",
    )
    client_memory: str = option(
        "device",
        "where client state and training windows are kept between rounds: on the GPU, or in host memory",
        choices=("device", "host"),
        flags="--client-memory",
    )
    engine: str = option(
        "local",
        "local: in this process; flower: a Flower federation of one process for each site on this machine, as a trial",
        choices=("local", "flower"),
        flags="--engine",
    )
    eval_gap: int = option(1, "rounds between evaluations", low=1, flags="-eg --eval-gap")
    preset: str = option("paper", "preset of hyper-parameters: paper, tuned, or a YAML file", flags="--preset")
    label: str = option("", "text added to the algorithms' names, to distinguish variants of one", flags="--label")
    goal: str = option("test", "label that is part of the run folder's name", flags="-go --goal")
    out: str = option("runs", "folder in which run folders are made", flags="-o --out")

    def __post_init__(self) -> None:
        """Check values that depend on more than their range. Raises UserError."""
        super().__post_init__()
        if not self.algorithm:
            raise UserError("-algo: no algorithm is named; fedkdx list shows all")
        once = 0 < len(self.augment) == len(set(self.augment))
        if not once or ("none" in self.augment and len(self.augment) > 1):
            raise UserError(f"--augment: {','.join(self.augment)!r}: write none, or one or several names, each once")
        if self.bn == "local" and self.norm != "batch":
            raise UserError(f"--bn local: --norm {self.norm} leaves no batch norm; leave one of the two out")
        if not all(c.isalnum() or c in "-_" for c in self.goal):
            raise UserError(f"-go: {self.goal!r} may hold letters, digits, '-' and '_' only")
        if not self.label.isprintable() or any(c in self.label for c in "/\\|"):
            raise UserError(f"--label: {self.label!r} may hold no line break, slash or bar")


@dataclass(frozen=True)
class Config(Options):
    """Configuration of a comparison.

    Attributes:
        set: hyper-parameters of the algorithms, `name` or `Algorithm.name` -> value, checked when the algorithms load.
        shards: the data set, and how it is cut into windows and divided among clients.
        complete: whether a value of every option was given, as in the files of a run: what its preset said is then
            among the values, and the preset is not needed any more.
    """

    set: Mapping[str, Any] = field(default_factory=dict)
    shards: ShardSpec = field(default_factory=lambda: ShardSpec(""))
    complete: bool = field(default=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return a flat mapping of plain values, as in YAML; `from_dict` is the inverse."""
        shards = {parameters.key_of(f): getattr(self.shards, f.name) for f in dataclasses.fields(ShardSpec)}
        options = {f.name: getattr(self, f.name) for f in dataclasses.fields(Options)}
        values = shards | options
        lists = {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
        return values | lists | {"set": dict(self.set)}


def _keys(part: type[Any]) -> set[str]:
    return {parameters.key_of(own) for own in dataclasses.fields(part)}


def option_names() -> set[str]:
    """Return the keys that a configuration may have."""
    return _keys(Options) | _keys(ShardSpec) | {"set"}


def from_dict(values: Mapping[str, Any], where: str) -> Config:
    """Make a checked configuration from flat values (YAML merged with the command line).

    Args:
        where: source of the values, for error messages.

    Raises:
        UserError: a key is unknown, a value has the wrong type or is out of range, or no data set is named.
    """
    own, of_shards = _keys(Options), _keys(ShardSpec)
    known = option_names()
    for key in values:
        if key not in known:
            raise UserError(f"{where}: unknown key '{key}'{parameters.suggest(str(key), known)}")
    if not values.get("data"):
        raise UserError("which data? -data takes a name (fedkdx list), a YAML file or a folder of shards")
    sets = values.get("set") or {}
    if not isinstance(sets, Mapping):
        raise UserError(f"{where or '--set'}: 'set' must map names to values, such as 'gamma: 0.5'")
    for name in sets:
        if not isinstance(name, str):
            raise UserError(
                f"{where or '--set'}: set: the key {name!r} is no text; write the name of a hyper-parameter"
            )
    options = parameters.parse(Options, {key: value for key, value in values.items() if key in own}, where)
    shards = parameters.parse(ShardSpec, {key: value for key, value in values.items() if key in of_shards}, where)
    return Config(**vars(options), set=dict(sets), shards=shards, complete=known <= values.keys())


def with_names(text: str, renamed: Mapping[str, str]) -> str:
    """Return a message with the names that options have in Python, before their flags in brackets.

    Args:
        renamed: option -> its name in the function that was called, where that is another.
    """
    for own in (*dataclasses.fields(Options), *dataclasses.fields(ShardSpec)):
        key = parameters.key_of(own)
        name = renamed.get(key, key)
        flags = "|".join(map(re.escape, own.metadata.get("flags") or ()))
        if flags:
            text = re.sub(rf"(?<![\w(`-])({flags})(?![\w-])", rf"{name} (\1)", text)
        if name != key:
            text = text.replace(f"compare: {key}: ", f"compare: {name}: ", 1)
    return text


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a mapping with text keys from a YAML file. Raises UserError."""
    values = files.read_yaml(path)
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: must hold 'name: value' lines")
    for key in values:
        if not isinstance(key, str):
            raise UserError(f"{path}: the key {key!r} is no text; write a name")
    return values
