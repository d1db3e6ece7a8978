"""Where runs take place: data, models and device of a configuration, checked and put in place."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from dataset_utils import shards as shard_files
from dataset_utils.generate import prepare
from dataset_utils.shards import ShardSet
from fedkdx_plugin.configuration.choice import Choice, choose
from fedkdx_plugin.configuration.config import Config
from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.faults import Faults
from fedkdx_plugin.engine.participation import Participation
from fedkdx_plugin.engine.rounds import Federation, Schedule
from fedkdx_plugin.engine.training import Settings
from fedkdx_plugin.results.run_folder import RunFolder
from fedkdx_plugin.tracking.callbacks import Callback, Relay, RunInfo
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
    """Make all checks that need no data. Returns the algorithms; raises UserError."""
    choices = choose(config)
    _models(config)
    run_device(config)
    _participation(config)
    _faults(config)
    return choices


def check_on(shards: ShardSet, config: Config, choices: Sequence[Choice]) -> None:
    """Make all checks that need the data. Raises UserError: a model or an algorithm that cannot take them."""
    if config.num_classes not in (None, shards.num_classes):
        raise UserError(f"-nb {config.num_classes}: {shards.folder} has {shards.num_classes} classes")
    _participation(config).groups(shards.num_clients, config.seed)  # more clients set apart than there are
    task = make_task(config, shards.shape, shards.num_classes)
    task.model(), task.student()  # a model that cannot take these windows says so now
    for choice in choices:
        choice.server.check(task, choice.params)


@dataclass(frozen=True)
class Setting:
    """Where runs take place: all that they have in common but the algorithm and the seed.

    Attributes:
        config: as asked for.
        task: what is to be learnt.
        shards, data: the data on disk and on the device.
        device: where it runs.
    """

    config: Config
    task: Task
    shards: ShardSet
    data: DeviceData
    device: torch.device

    @staticmethod
    @room_on_device()
    def of(config: Config) -> Setting:
        """Put everything in place for runs of this configuration. Raises UserError for wrong input."""
        device = run_device(config)
        shards = prepare_shards(config)
        task = make_task(config, shards.shape, shards.num_classes)
        data = DeviceData.from_shards(shards, device, torch.device("cpu") if config.client_memory == "host" else device)
        return Setting(config, task, shards, data, device)

    def fits(self, config: Config) -> bool:
        """Return whether runs of another configuration can take place here: only algorithm and seed may differ."""
        free = {"algorithm": ("any",), "set": {}, "seed": 0, "times": 1, "label": "", "preset": ""}
        return dataclasses.replace(self.config, **free) == dataclasses.replace(config, **free)

    @room_on_device()
    def run(self, config: Config, command: list[str], info: RunInfo, callbacks: Sequence[Callback] = ()) -> None:
        """Run one algorithm under one seed, from the start or from where its folder says it is.

        Args:
            config: of this run: one algorithm, one seed.
            info: what callbacks are told of the run; `done` is found out here.

        Raises:
            UserError: the folder cannot be written or continued, or an algorithm that cannot run here.
        """
        (choice,) = choose(config)
        choice.server.check(self.task, choice.params)
        federation = Federation(
            choice.server,
            self.task,
            choice.params,
            self.data,
            training(config, config.seed),
            schedule(config),
            config.backend,
            config.client_memory,
        )
        with closing(federation):
            folder = RunFolder(info.folder, choice.entry, info.settings, command, self.shards, self.device, federation)
            info = dataclasses.replace(info, done=len(folder.records))
            for callback in callbacks:
                callback.on_run_start(info)
            if info.done < info.rounds:
                with folder:
                    federation.run([folder, Relay(info, callbacks)], info.done)


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
    return Schedule(config.global_rounds, config.join_ratio, config.eval_gap, _participation(config), config.outliers)


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
