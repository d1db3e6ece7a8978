"""A comparison: several algorithms on identical splits, identical client samples and identical seeds."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from dataset_utils import shards as shard_files
from dataset_utils.describe import described
from dataset_utils.files import replacing
from dataset_utils.generate import prepare
from dataset_utils.shards import ShardSet
from fedkdx_plugin.configuration.choice import Choice, choose, resolve, run_settings
from fedkdx_plugin.configuration.config import STARTED, Config, read_yaml, seeded
from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.faults import Faults
from fedkdx_plugin.engine.participation import Participation
from fedkdx_plugin.engine.rounds import Callback, Federation, Schedule
from fedkdx_plugin.engine.training import Settings
from fedkdx_plugin.reports import comparison_table, curves
from fedkdx_plugin.results.run_folder import RunFolder, new_folder, write_yaml
from fedkdx_plugin.tracking import tensorboard
from fedkdx_plugin.tracking.progress import Progress
from registry import catalog
from registry.errors import UserError
from registry.interface import Task


@contextmanager
def room_on_device() -> Iterator[None]:
    """Say in one line that a GPU's memory is too small. Raises UserError for it."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise UserError(
            f"out of GPU memory: {reason}; take a smaller batch (-lbs) or model (-m), --client-memory host, or -dev cpu"
        ) from error


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
    @room_on_device()
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
        data = DeviceData.from_shards(shards, device, torch.device("cpu") if config.client_memory == "host" else device)
        return Setting(config, task, shards, data, device, groups)

    @room_on_device()
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
            config.client_memory,
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
    seeds = range(config.seed, config.seed + config.times)
    _check_vary(config)
    for seed in seeds[1:] if config.vary == "data" else ():  # what cannot be made says so now
        prepare_shards(seeded(config, seed))
    setting = Setting.of(config, choices)
    shards, data = setting.shards, setting.data
    resolved = resolve(config, choices)
    folder = begin_folder(folder, Path(config.out), f"{shards.name}-{config.model}-{_label(config)}", resolved, command)
    apart = "".join(f", {len(ids)} of them {name}" for name, ids in setting.groups.items())
    print(
        f"{shards.name}: {shards.num_clients} clients{apart}, {sum(len(y) for y in data.train_y)} training and "
        f"{len(data.test_y)} {data.evaluated_on} windows, {shards.num_classes} classes; {setting.device}; "
        f"results in {folder}"
    )
    runs, rounds = [], config.global_rounds
    try:
        with Progress({choice.name: config.times * rounds for choice in choices}) as progress:
            for seed in seeds:
                if config.vary == "data" and seed != config.seed:
                    setting = Setting.of(seeded(config, seed), choices)
                for choice in choices:
                    name = f"{choice.name} seed {seed}" if config.times > 1 else choice.name
                    begin = partial(progress.begin, choice.name, name, rounds)
                    place = folder / f"{choice.name}-seed{seed}"
                    if board:
                        begin = partial(_watched, begin, place)
                    runs.append(setting.run(choice, run_settings(resolved, choice, seed), place, command, begin))
    except KeyboardInterrupt:
        print(f"\nstopped; to go on: fedkdx --resume {folder}", file=sys.stderr)
        return 130
    print(f"\n{comparison_table.write(folder, runs, config.vary)}")
    if importlib.util.find_spec("matplotlib"):
        curves.draw(folder / "comparison.png", runs, f"{shards.name}, {config.model}")
    print(f"saved in {folder}")
    return 0


def begin_folder(folder: Path | None, out: Path, name: str, resolved: Mapping[str, Any], command: list[str]) -> Path:
    """The folder of a comparison: a new one in `out`, or the one that is to go on, with the number of rounds of now.

    It holds the configuration, and where the command was given, as paths in the configuration may be relative to that.
    """
    if folder is None:
        folder = new_folder(out, name)
        with replacing(folder / STARTED) as part:
            started = {"command": command, "folder": str(Path.cwd())}
            part.write_text(json.dumps(started, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    else:
        before, now = read_yaml(folder / "config.yaml").get("global_rounds"), resolved["global_rounds"]
        if before == now:
            return folder
        print(
            f"{now} rounds instead of {before}: what depends on the number of rounds in all, such as a schedule of "
            f"compression, goes on as of {now}, so that this is not a run of {now} rounds from the start"
        )
    write_yaml(folder / "config.yaml", resolved)
    return folder


@contextmanager
def where_it_began(folder: Path | None) -> Iterator[None]:
    """Work in the folder in which a comparison was begun, as far as that is known and there; then come back."""
    if folder is None:
        yield
        return
    here = Path.cwd()
    with suppress(OSError, ValueError, KeyError, TypeError):
        os.chdir(Path(json.loads((folder / STARTED).read_text(encoding="utf-8"))["folder"]))
    try:
        yield
    finally:
        os.chdir(here)


def _check_vary(config: Config) -> None:
    """Raises UserError where data are to vary that cannot be divided anew."""
    if config.vary == "data" and Path(config.shards.data).is_dir():
        raise UserError(
            f"--vary data: {config.shards.data} holds shards, which cannot be divided again; give the data set's name "
            "instead of a folder"
        )


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
        for name, value, default in (
            ("--precision", config.precision, "float32"),
            ("--client-memory", config.client_memory, "device"),
        ):
            if value != default:
                raise UserError(f"{name} {value}: it is for a GPU, and this run is on the CPU; leave it out")
        return torch.device("cpu")
    if config.client_memory == "host" and config.backend not in ("auto", "stacked"):
        raise UserError(f"--client-memory host: it is for --backend stacked, not for {config.backend}")
    if config.device_id >= torch.cuda.device_count():
        raise UserError(f"-did {config.device_id}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    # cuBLAS repeats its bits from one stream to another only with workspaces of a fixed size
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    short = config.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = short  # PyTorch's is on for convolutions
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
