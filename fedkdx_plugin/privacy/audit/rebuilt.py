"""A run brought back from its folder: its federation at the last checkpoint, and others with the same options."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dataset_utils.files import is_file, is_folder
from dataset_utils.sealed import Sealed
from fedkdx_plugin.configuration.choice import Choice, choose
from fedkdx_plugin.configuration.config import Config, from_dict
from fedkdx_plugin.engine import scaling
from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.faults import Faults
from fedkdx_plugin.engine.participation import ATTACKERS, UNSEEN
from fedkdx_plugin.engine.randomness import count_selected
from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.engine.training import Settings
from fedkdx_plugin.experiments.experiment import experiment_folder
from fedkdx_plugin.experiments.runner import where_it_began
from fedkdx_plugin.experiments.setting import Setting, schedule, training
from fedkdx_plugin.privacy.audit.view import Update, see
from fedkdx_plugin.privacy.noise import SeededNoise
from fedkdx_plugin.privacy.options import EXAMPLE
from fedkdx_plugin.results.run_folder import RunFolder
from fedkdx_plugin.results.runs import CONFIG, ENVIRONMENT, FAILED, STATE, again, read_config, read_environment
from registry import contract
from registry.errors import UserError
from registry.interface import Message, Model, Round

ELSEWHERE = "sites"  # flower.options.ELSEWHERE, which may not be imported here


@dataclass(frozen=True)
class Rebuilt:
    """A run at its last checkpoint.

    Attributes:
        folder: the run folder.
        config: its configuration.
        choice: its algorithm.
        setting: data, task and device.
        data: the windows, scaled.
        settings: how its clients train.
        done: number of rounds made.
        saved: state of server and clients.
        clients: ids of the honest clients that have trained, whose windows are attacked.
    """

    folder: Path
    config: Config
    choice: Choice
    setting: Setting
    data: DeviceData
    settings: Settings
    done: int
    saved: Message
    clients: tuple[int, ...]

    @staticmethod
    def of(folder: Path) -> Rebuilt:
        """Bring a run back. Raises UserError: no run with a checkpoint, or one that cannot be audited, or no data."""
        settings = _settings(folder)
        with where_it_began(experiment_folder(folder)):
            config = replace(from_dict(settings, str(folder / CONFIG)), preset="paper")  # 'set' holds all that it gave
            (choice,) = choose(config)
            if choice.server.pools_data:
                raise UserError(
                    f"{folder}: {choice.name} sends all windows to one place, so that nothing is left to attack"
                )
            _check_data(folder)
            setting = Setting.of(config)
            local = training(config, choice, setting.shards.manifest["channels"])
            with closing(_federation(choice, setting, setting.data, local, config)) as federation:
                entry, device = choice.entry, setting.device
                own = RunFolder(folder, entry, settings, ["audit"], setting.shards, device, federation)
                data = scaling.apply(setting.data, federation.agreed.pooled) if federation.agreed else setting.data
                apart = {id for name in (UNSEEN, ATTACKERS) for id in federation.groups.get(name, ())}
                honest = [one.id for one in federation.workspace.clients if one.trained and one.id not in apart]
                saved = federation.save()
        return Rebuilt(folder, config, choice, setting, data, local, len(own.records), saved, tuple(honest))

    @property
    def name(self) -> str:
        """Name of the method: the algorithm, and the label of its variant if there is one."""
        return f"{self.choice.name} {self.config.label}".strip()

    def at(self, index: int) -> Round:
        """Return a round of this run, which may be one beyond the planned ones."""
        return Round(index, max(self.config.global_rounds, index), self.config.join_ratio)

    @contextmanager
    def federation(self, data: DeviceData | None = None, noise: int | None = None) -> Iterator[Federation]:
        """Make a federation as the run's was before its first round.

        Args:
            data: other windows, scaled; None: the run's.
            noise: seed of the noise of `--dp`, which nobody who attacks knows; None: the run's.
        """
        one_by_one = self.settings.privacy.level == EXAMPLE and noise is not None
        config = replace(self.config, backend="sequential") if one_by_one else self.config
        made = _federation(self.choice, self.setting, data or self.data, self.settings, config)
        with closing(made) as federation:
            _with_noise(federation, noise)
            yield federation

    @contextmanager
    def watched(self, data: DeviceData | None = None, noise: int | None = None, **local: Any) -> Iterator[Watched]:
        """Make a federation in which any client may be asked for a reply, and none fails.

        Args:
            data, noise: see `federation`.
            **local: fields of `Settings` that differ from the run's.
        """
        settings = replace(self.settings, faults=Faults(), **local)
        config = replace(self.config, late=None, rare=None, outliers=None, backend="sequential")
        with closing(_federation(self.choice, self.setting, data or self.data, settings, config)) as federation:
            _with_noise(federation, noise)
            yield Watched(federation)

    def fresh_network(self, federation: Federation, net: str) -> Model:
        """Return a model of plain PyTorch layers, newly initialised, as an attacker has it who knows the model."""
        client = federation.workspace.clients[0]
        made = contract.built(type(client), client.task)[net].to(self.setting.device)
        if not isinstance(made, Model):
            raise TypeError(f"{net} is no model")
        return made


class Watched:
    """A federation whose clients can be asked for their replies.

    Args:
        federation: as it is before the first round.

    Attributes:
        first: its state then.
    """

    def __init__(self, federation: Federation) -> None:
        self.federation, self.first = federation, federation.save()

    def updates(self, saved: Message, round: Round, clients: Sequence[int]) -> list[Update]:
        """Return what the server would see of these clients if they were selected in a round.

        They are asked in groups of as many as the run selects in a round, on which noise and sums may depend; the last
        group is filled up.

        Args:
            saved: state of the federation before the round.
            clients: ids, ascending.
        """
        size = count_selected(self.federation.data.clients, round.share)
        apart = self.federation.groups.get(UNSEEN, ())
        others = [id for id in range(self.federation.data.clients) if id not in clients and id not in apart]
        found: list[Update] = []
        for first in range(0, len(clients), size):
            asked = list(clients[first : first + size])
            group = sorted(asked + [*clients[:first], *others][: size - len(asked)])
            self.federation.restore(saved)
            # whom the run would select does not matter here
            self.federation._select = lambda round, group=group: group  # type: ignore[method-assign, misc]
            found += [one for one in see(self.federation, round) if not set(one.clients).isdisjoint(asked)]
            del self.federation._select
        return found

    def after(self, saved: Message, round: Round) -> Message:
        """Return the state after a round of the clients that the run would select."""
        self.federation.restore(saved)
        self.federation.round(round)
        return self.federation.save()


def _federation(choice: Choice, setting: Setting, data: DeviceData, settings: Settings, config: Config) -> Federation:
    server, task, params = choice.server, setting.task, choice.params
    made = Federation(server, task, params, data, settings, schedule(config), config.backend, config.client_memory)
    made.evaluate = lambda shared: {}  # no metrics are wanted
    return made


def _with_noise(federation: Federation, seed: int | None) -> None:
    if seed is None:
        return
    if federation.protection:
        federation.protection.source = SeededNoise(seed)
    if federation.settings.privacy.level == EXAMPLE:  # clients draw it, with their lots
        federation.backend.settings = replace(federation.backend.settings, seed=seed)


def check_folder(folder: Path) -> None:
    """Raise UserError where a folder holds no run, one that failed, or one with a file that is damaged or was removed.

    All files are checked, also those that an audit does not read: what it says of a run must be of the whole run.
    """
    sealed = Sealed(folder, again(folder))
    if is_file(folder / FAILED):
        raise UserError(f"{folder}: a run that failed; make it again, then audit it")
    if not sealed.holds(ENVIRONMENT):
        raise UserError(f"{folder}: is no run (a folder with {CONFIG}, {ENVIRONMENT} and {STATE})")
    sealed.check()


def _settings(folder: Path) -> dict[str, Any]:
    """Return the configuration of a run that has a checkpoint. Raises UserError."""
    check_folder(folder)
    settings = read_config(folder)
    if settings.get("engine", "local") != "local" or settings["data"] == ELSEWHERE:
        raise UserError(f"{folder}: of a federation between sites; the windows that an audit needs are at the sites")
    if not is_file(folder / STATE):
        raise UserError(
            f"{folder / STATE}: missing; a run has none before its first minute, and runs of a grid keep none: make "
            f"the run again with fedkdx run --config {folder / CONFIG}"
        )
    return settings


def _check_data(folder: Path) -> None:
    """Raise UserError where the shards that a run trained on are gone."""
    data = read_environment(folder)["data"]
    if not is_folder(Path(data["folder"])):
        raise UserError(
            f"{folder}: its windows are gone ({data['folder']}), and an audit needs them; make them again with "
            f"fedkdx data make, or {again(folder)}"
        )
