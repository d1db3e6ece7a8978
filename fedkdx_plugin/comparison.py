"""A comparison: several algorithms on identical splits, identical client samples and identical seeds."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from dataset_utils import shards as shard_files
from dataset_utils.describe import described
from dataset_utils.generate import prepare
from dataset_utils.shards import ShardSet
from fedkdx_plugin.choice import Choice, choose, resolve, run_settings
from fedkdx_plugin.config import Config
from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.faults import Faults
from fedkdx_plugin.engine.participation import Participation
from fedkdx_plugin.engine.progress import Progress
from fedkdx_plugin.engine.results import RunFolder, new_folder, write_yaml
from fedkdx_plugin.engine.rounds import Callback, Federation, Schedule
from fedkdx_plugin.engine.training import Settings
from fedkdx_plugin.reports import curves, table, tensorboard
from registry import catalog
from registry.errors import UserError
from registry.interface import Task


def check(config: Config) -> list[Choice]:
    """All checks that need no data. Returns the algorithms; raises UserError."""
    choices = choose(config)
    _models(config)
    run_device(config)
    _participation(config)
    _faults(config)
    return choices


def show(config: Config) -> int:
    """Print the resolved configuration as YAML, and as comments what is in the data, which are read (`--dry-run`).

    Returns:
        the exit code, 2 where something is wrong with the data. Raises UserError for a wrong configuration.
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


@dataclass(frozen=True)
class Setting:
    """Where runs take place: all that they have in common but the algorithm and the seed.

    Attributes:
        config: as asked for.
        task: what is to be learnt.
        shards, data: the data on disk and on the device.
        device: where it runs.
        groups: clients set apart (see `Participation.groups`).
    """

    config: Config
    task: Task
    shards: ShardSet
    data: DeviceData
    device: torch.device
    groups: dict[str, list[int]]

    @staticmethod
    def of(config: Config, choices: list[Choice]) -> Setting:
        """Everything in place for these algorithms. Raises UserError for wrong input, before the first round."""
        device = run_device(config)
        participation = _participation(config)
        _faults(config)
        shards = prepare_shards(config)
        groups = participation.groups(shards.num_clients, config.seed)  # more than there are says so now
        task = make_task(config, shards.shape, shards.num_classes)
        task.model(), task.student()  # a model that cannot take these windows says so now
        for choice in choices:
            choice.server.check(task, choice.params)
        return Setting(config, task, shards, DeviceData.from_shards(shards, device), device, groups)

    def run(
        self,
        choice: Choice,
        settings: Mapping[str, Any],
        place: Path,
        command: list[str],
        begin: Callable[[int], Callback],
    ) -> RunFolder:
        """One algorithm under one seed, from the start or from where the folder `place` says it is.

        Args:
            settings: see `choice.run_settings`.
            begin: told how many rounds are done, gives a callback for the others.

        Returns:
            The folder with its records, complete. Raises UserError where it cannot be written or continued.
        """
        config = self.config
        federation = Federation(
            choice.server,
            self.task,
            choice.params,
            self.data,
            training(config, settings["seed"]),
            schedule(config),
            config.backend,
        )
        one = RunFolder(place, choice.entry, settings, command, self.shards, self.device, federation)
        done = len(one.records)
        callback = begin(done)
        if done < config.global_rounds:
            with closing(federation), one:
                federation.run([one, callback], done)
        return one


def run(config: Config, command: list[str], folder: Path | None = None, board: bool = False) -> int:
    """Run every algorithm under every seed; print and save the comparison. Returns the exit code.

    Args:
        folder: of a comparison with this configuration that was interrupted; None begins a new one.
        board: write TensorBoard's files, too.

    Raises:
        UserError: wrong input, found before the first round.
    """
    if board:
        tensorboard.check()
    choices = choose(config)
    setting = Setting.of(config, choices)
    shards, data = setting.shards, setting.data
    resolved = resolve(config, choices)
    if folder is None:
        folder = new_folder(Path(config.out), f"{shards.name}-{config.model}-{_label(config)}")
        write_yaml(folder / "config.yaml", resolved)
    apart = "".join(f", {len(ids)} of them {name}" for name, ids in setting.groups.items())
    print(
        f"{shards.name}: {shards.num_clients} clients{apart}, {sum(len(y) for y in data.train_y)} training and "
        f"{len(data.test_y)} {data.evaluated_on} windows, {shards.num_classes} classes; {setting.device}; "
        f"results in {folder}"
    )
    runs, rounds = [], config.global_rounds
    try:
        with Progress(len(choices) * config.times * rounds) as progress:
            for seed in range(config.seed, config.seed + config.times):
                for choice in choices:
                    name = f"{choice.name} seed {seed}" if config.times > 1 else choice.name
                    begin = partial(progress.begin, name, rounds)
                    place = folder / f"{choice.name}-seed{seed}"
                    if board:
                        begin = partial(_watched, begin, place)
                    runs.append(setting.run(choice, run_settings(resolved, choice, seed), place, command, begin))
    except KeyboardInterrupt:
        print(f"\nstopped; to go on: fedkdx --resume {folder}", file=sys.stderr)
        return 130
    print(f"\n{table.write(folder, runs)}")
    if importlib.util.find_spec("matplotlib"):
        curves.draw(folder / "comparison.png", runs, f"{shards.name}, {config.model}")
    print(f"saved in {folder}")
    return 0


def _watched(begin: Callable[[int], Callback], place: Path, done: int) -> Callback:
    return tensorboard.TensorBoard(place, begin(done))


def training(config: Config, seed: int) -> Settings:
    """How clients train."""
    return Settings(
        batch_size=config.batch_size,
        local_epochs=config.local_epochs,
        learning_rate=config.local_learning_rate,
        decay=config.learning_rate_decay_gamma if config.learning_rate_decay else 1.0,
        clip_norm=config.clip_norm,
        seed=seed,
        faults=_faults(config),
    )


def schedule(config: Config) -> Schedule:
    """How many rounds, with whom. Raises UserError."""
    return Schedule(config.global_rounds, config.join_ratio, config.eval_gap, _participation(config))


def make_task(config: Config, shape: tuple[int, int, int], classes: int) -> Task:
    """What is to be learnt. Raises UserError for an unknown model."""
    model, student = _models(config)
    return Task(shape, classes, model, student, local_bn=config.bn == "local")


def _participation(config: Config) -> Participation:
    return Participation.parse(config.unseen, config.late, config.rare, config.global_rounds)


def _faults(config: Config) -> Faults:
    faults = Faults(config.dropout, config.stragglers, config.corrupt)
    faults.check()
    return faults


def _label(config: Config) -> str:
    """The goal in a run folder's name; PFLlib's default, 'test', would be wrong on validation windows."""
    if config.shards.evaluate_on == "test":
        return config.goal
    return "validation" if config.goal == "test" else f"{config.goal}-validation"


def _models(config: Config) -> tuple[type, type]:
    return catalog.load("models", config.model), catalog.load("models", config.student_model or config.model)


def run_device(config: Config) -> torch.device:
    """The device asked for, set up to repeat itself bit for bit. Raises UserError where it is not there."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("-dev cuda: this PyTorch finds no CUDA device; use -dev cpu")
    if config.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if config.device_id >= torch.cuda.device_count():
        raise UserError(f"-did {config.device_id}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    return torch.device("cuda", config.device_id)


def prepare_shards(config: Config) -> ShardSet:
    """The shards asked for, made first where they are missing. Raises UserError."""
    given = Path(config.shards.data)
    if given.is_dir():
        folder = given
    else:
        raw = Path(config.raw) if config.raw else None
        folder = prepare(config.shards, Path(config.data_root), raw, config.download)
    shards = shard_files.load(folder)
    if given.is_dir():
        _check_given(config, shards)
    if config.num_classes not in (None, shards.num_classes):
        raise UserError(f"-nb {config.num_classes}: {folder} has {shards.num_classes} classes")
    if config.shards.clients not in (None, shards.num_clients):
        raise UserError(f"-nc {config.shards.clients}: {folder} has {shards.num_clients} clients")
    return shards


def _check_given(config: Config, shards: ShardSet) -> None:
    """Raises UserError where a folder of shards, which cannot be cut again, is not what is asked for."""
    asked, found = config.shards.evaluate_on, shards.evaluated_on
    if asked != found:
        raise UserError(
            f"--evaluate-on {asked}: {shards.folder} holds {found} windows; give the data set's name instead of a "
            f"folder, or --evaluate-on {found}"
        )
    fraction = (shards.manifest.get("spec") or {}).get("train_fraction", 1.0)
    if config.shards.train_fraction not in (1, fraction):
        raise UserError(
            f"--train-fraction {config.shards.train_fraction:g}: {shards.folder} was made with {fraction:g}; give the "
            "data set's name instead of a folder"
        )
