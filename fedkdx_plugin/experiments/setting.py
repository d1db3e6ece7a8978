"""The setting of a run: data, models and device of a configuration, checked and loaded."""

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
from dataset_utils.spec import shards_folder
from fedkdx_plugin.configuration.choice import Choice, choose
from fedkdx_plugin.configuration.config import Config
from fedkdx_plugin.engine import precision, secure_sums
from fedkdx_plugin.engine.attacks import Attack
from fedkdx_plugin.engine.augmentation import Augment
from fedkdx_plugin.engine.backends.selection import check_parallel, check_stacked
from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.faults import Faults
from fedkdx_plugin.engine.participation import UNSEEN, Participation
from fedkdx_plugin.engine.randomness import count_selected
from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.engine.schedule import Schedule
from fedkdx_plugin.engine.training import Settings
from fedkdx_plugin.experiments import private
from fedkdx_plugin.privacy.accounting import FIXED
from fedkdx_plugin.results.run_folder import RunFolder
from fedkdx_plugin.tracking.callbacks import Callback, Relay, RunInfo
from registry import catalog, contract
from registry.aggregation import ASSUMING, Averaging
from registry.blame import naming
from registry.errors import UserError
from registry.interface import Client, Model, Task, moves_by_sgd
from registry.parameters import key_of
from registry.text import shown

# parameters of shards: those that only some state, and those that a given folder need not have been made with
REDUCING = ("subjects", "exclude_subjects", "train_fraction")
FREE = ("data", "clients", "evaluate_on", "allow_missing")


@contextmanager
def room_on_device() -> Iterator[None]:
    """Turn an out-of-memory error of a GPU into a UserError of one line that says what to change."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise UserError(
            f"out of GPU memory: {reason}; take a smaller batch (-lbs) or model (-m), --client-memory host, or -dev cpu"
        ) from error


def check(config: Config) -> list[Choice]:
    """Check what can be checked without the data, and return the algorithms. Raises UserError: wrong input."""
    choices = choose(config)
    _optimizer(config, choices)
    _models(config)
    device = run_device(config)
    if config.engine == "local":
        check_parallel(config.backend, device)
    _participation(config)
    _faults(config)
    _attack(config)
    _averaging(config).check({choice.name: choice.server.averages for choice in choices})
    private.check(config, choices)
    if config.secure_aggregation:
        secure_sums.check({choice.name: choice.server for choice in choices}, _averaging(config), config.outliers)
    return choices


def check_assumed(configs: Sequence[Config]) -> None:
    """Raise UserError if `--assumed-bad` is given in configurations that would all ignore it."""
    given = [config for config in configs if config.assumed_bad != Averaging.bad]
    if given and not any(config.aggregate in ASSUMING for config in given):
        rules = ", ".join(dict.fromkeys(config.aggregate for config in given))
        raise UserError(
            f"--assumed-bad {given[0].assumed_bad:g}: --aggregate {rules} does not use it; leave it out, or take "
            f"--aggregate {' or '.join(ASSUMING)}"
        )


def check_on(shards: ShardSet, config: Config, choices: Sequence[Choice]) -> None:
    """Check what depends on the data. Raises UserError: the model or an algorithm cannot use them."""
    if config.num_classes not in (None, shards.num_classes):
        raise UserError(f"-nb {config.num_classes}: {shards.folder} has {shards.num_classes} classes; leave it out")
    groups = groups_of(config, shards.num_clients)  # raises if more clients are set apart than there are
    selected = count_selected(shards.num_clients - len(groups.get(UNSEEN, ())), config.join_ratio)
    if config.secure_aggregation:
        secure_sums.check_clients(selected, config.join_ratio)
    if config.engine == "local":
        check_parallel(config.backend, run_device(config), selected)
    if config.sampling == FIXED:
        _averaging(config).check_share(selected)
    Augment.of(config.augment, shards.manifest["channels"])  # raises where there is nothing to rotate
    task = make_task(config, shards.shape, shards.num_classes)
    with naming(*_models(config)):
        contract.model(task.model())  # raises if a model cannot take windows of this shape
        contract.model(task.student())
    for choice in choices:
        with naming(choice.server):
            choice.server.check(task, choice.params)
            _check_networks(config, choice.server.Client, dataclasses.replace(task, params=choice.params))
    private.check_on(shards, task, config, choices, groups)


def _check_networks(config: Config, client: type[Client], task: Task) -> None:
    """Raise UserError where networks cannot be stacked as asked, or a plug-in's hold nothing that it calls private.

    Of built-in algorithms none are made for it otherwise, as planning many runs would take several times as long.
    """
    if config.backend == "stacked" or catalog.origin_of(client):
        nets = contract.built(client, task)
        contract.private(client, task, nets)
        if config.engine == "local":
            check_stacked(config.backend, nets)


def without_student(shards: ShardSet, config: Config, choices: Sequence[Choice]) -> list[str]:
    """Return the algorithms that build no student, so that `-sm` does not matter to them; [] where it is not given."""
    if not config.student_model:
        return []
    task = make_task(config, shards.shape, shards.num_classes)
    asked: list[str] = []
    for choice in choices:

        def student(shape: tuple[int, int, int], classes: int, name: str = choice.name) -> Model:
            asked.append(name)
            return task.student_class(shape, classes)

        with naming(choice.server):
            choice.server.Client.build(dataclasses.replace(task, student_class=student, params=choice.params))
    return [choice.name for choice in choices if choice.name not in asked]


@dataclass(frozen=True)
class Setting:
    """Data, task and device of runs that differ in algorithm and seed alone.

    Attributes:
        config: the configuration.
        task: the learning task.
        shards, data: the data on disk and on the device.
        device: device of the runs.
    """

    config: Config
    task: Task
    shards: ShardSet
    data: DeviceData
    device: torch.device

    @staticmethod
    @room_on_device()
    def of(config: Config) -> Setting:
        """Load the data of a configuration and set its device up. Raises UserError: wrong input."""
        device = run_device(config)
        shards = prepare_shards(config)
        task = make_task(config, shards.shape, shards.num_classes)
        data = DeviceData.from_shards(shards, device, torch.device("cpu") if config.client_memory == "host" else device)
        return Setting(config, task, shards, data, device)

    def fits(self, config: Config) -> bool:
        """Return whether another configuration has this setting: it differs in algorithm and seed at most."""
        return _without_run(self.config) == _without_run(config)

    def run(self, config: Config, command: list[str], info: RunInfo, callbacks: Sequence[Callback] = ()) -> None:
        """Run one algorithm with one seed, from the start or from the checkpoint in its run folder.

        Args:
            config: configuration of this run, with one algorithm and one seed.
            info: the run as callbacks see it; `done` is set here from the run folder.

        Raises:
            UserError: the run folder cannot be written or resumed, or the algorithm cannot run in this setting.
            PluginError: a class of another package failed.
        """
        (choice,) = choose(config)
        with naming(choice.server, *_models(config)):
            self._run(choice, config, command, info, callbacks)

    @room_on_device()
    def _run(
        self, choice: Choice, config: Config, command: list[str], info: RunInfo, callbacks: Sequence[Callback]
    ) -> None:
        choice.server.check(self.task, choice.params)
        federation = Federation(
            choice.server,
            self.task,
            choice.params,
            self.data,
            training(config, choice, self.shards.manifest["channels"]),
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


def training(config: Config, choice: Choice, channels: Sequence[str] | None = None) -> Settings:
    """Return how an algorithm's clients train.

    Args:
        choice: the algorithm, as `choose` made it of `config`.
        channels: names of the windows' channels; None where nobody trains, as at a server between sites.

    Raises:
        UserError: an augmentation cannot be applied to these channels.
    """
    return Settings(
        batch_size=config.batch_size,
        local_epochs=config.local_epochs,
        learning_rate=choice.learning_rate,
        decay=config.learning_rate_decay_gamma if config.learning_rate_decay else 1.0,
        clip_norm=config.clip_norm,
        optimizer=config.optimizer,
        class_weights=config.class_weights,
        augment=Augment() if channels is None else Augment.of(config.augment, channels),
        seed=config.seed,
        faults=_faults(config),
        attack=_attack(config),
        privacy=private.privacy(config),
        mixed=config.precision == precision.MIXED,
    )


def schedule(config: Config) -> Schedule:
    """Return the number of rounds and who takes part in them. Raises UserError."""
    return Schedule(
        config.global_rounds,
        config.join_ratio,
        config.eval_gap,
        _participation(config),
        config.outliers,
        config.sampling,
        config.secure_aggregation,
    )


def make_task(config: Config, shape: tuple[int, int, int], classes: int) -> Task:
    """Return the learning task. Raises UserError: an unknown model."""
    model, student = _models(config)
    averaging = _averaging(config)
    return Task(shape, classes, model, student, config.bn == "local", norm=config.norm, averaging=averaging)


def _without_run(config: Config) -> Config:
    """Return a configuration with what may differ within a setting replaced by constants."""
    return dataclasses.replace(config, algorithm=("any",), set={}, seed=0, times=1, label="", preset="")


def _optimizer(config: Config, choices: Sequence[Choice]) -> None:
    """Raise UserError if an optimiser is asked for of an algorithm that is made for plain SGD."""
    own = [one.name for one in choices if one.server.assumes_sgd or not moves_by_sgd(one.server.Client)]
    if own and config.optimizer != "sgd":
        raise UserError(
            f"--optimizer {config.optimizer}: not with {', '.join(own)}, whose clients' steps are plain SGD or their "
            "own; leave one out"
        )


def _participation(config: Config) -> Participation:
    return Participation.parse(config.unseen, config.late, config.rare, config.global_rounds)


def _faults(config: Config) -> Faults:
    faults = Faults(config.dropout, config.stragglers, config.corrupt)
    faults.check()
    return faults


def _attack(config: Config) -> Attack:
    attack = Attack(config.attack, config.attackers, config.attack_strength)
    attack.check()
    return attack


def _averaging(config: Config) -> Averaging:
    return Averaging(config.aggregate, config.assumed_bad, config.max_share)


def groups_of(config: Config, clients: int) -> dict[str, list[int]]:
    """Return group name -> ids of the clients set apart. Raises UserError: too many of them are."""
    groups = _participation(config).groups(clients, config.seed)
    return groups | _attack(config).group(clients, groups, config.seed)


def _models(config: Config) -> tuple[type, type]:
    return catalog.load("models", config.model), catalog.load("models", config.student_model or config.model)


def run_device(config: Config) -> torch.device:
    """Return the configured device, set up for bit-identical repetition. Raises UserError: it is not available."""
    if config.device == "cuda" and not torch.cuda.is_available():
        raise UserError("-dev cuda: this PyTorch finds no CUDA device; use -dev cpu")
    if config.device == "cpu" or not torch.cuda.is_available():
        for name, value, default in (
            ("--precision", config.precision, "float32"),
            ("--client-memory", config.client_memory, "device"),
        ):
            if value != default:
                raise UserError(f"{name} {value}: works on a GPU only, and this run is on the CPU; leave it out")
        return torch.device("cpu")
    if config.client_memory == "host" and config.backend not in ("auto", "stacked"):
        raise UserError(
            f"--client-memory host: works with --backend stacked only, not with {config.backend}; leave it out"
        )
    if config.device_id >= torch.cuda.device_count():
        raise UserError(f"-did {config.device_id}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    # cuBLAS gives the same bits on every stream only with workspaces of a fixed size
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    short = config.precision == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = (
        short  # PyTorch's default is True for convolutions
    )
    return torch.device("cuda", config.device_id)


def prepare_shards(config: Config) -> ShardSet:
    """Return the configured shards; make them first if they are missing. Raises UserError."""
    given = shards_folder(config.shards.data)
    if given is not None:
        folder = given
    else:
        raw = Path(config.raw) if config.raw else None
        folder = prepare(config.shards, Path(config.data_root), raw, config.download)
    shards = shard_files.load(folder)
    if given is not None:
        _check_given(config, shards)
    if config.shards.clients not in (None, shards.num_clients):
        raise UserError(f"-nc {config.shards.clients}: {folder} has {shards.num_clients} clients; leave it out")
    return shards


def _check_given(config: Config, shards: ShardSet) -> None:
    """Raise UserError if a given folder of shards, which cannot be made anew, differs from the configuration."""
    asked, found = config.shards.evaluate_on, shards.evaluated_on
    if asked != found:
        raise UserError(
            f"--evaluate-on {asked}: {shards.folder} holds {found} windows; give the data set's name instead of a "
            f"folder, or --evaluate-on {found}"
        )
    spec = shards.manifest.get("spec") or {}
    for own in dataclasses.fields(config.shards):
        wanted = getattr(config.shards, own.name)
        made = spec.get(own.name, own.default if own.name in REDUCING else wanted)  # unknown of shards from elsewhere
        if own.name in FREE or wanted == own.default or wanted == (tuple(made) if isinstance(made, list) else made):
            continue
        several = isinstance(wanted, tuple)
        text = "others" if several else "the data set's own" if made is None else shown(made)
        raise UserError(
            f"--{key_of(own).replace('_', '-')} {','.join(wanted) if several else wanted}: {shards.folder} was made "
            f"with {text}; give the data set's name instead of a folder"
        )
