"""Plan that server and clients of an app share: the algorithm, its hyper-parameters, the training, the models."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedkdx_plugin.configuration.choice import Choice
from fedkdx_plugin.configuration.config import Config, from_dict, with_names
from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.evaluation import predictors
from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.engine.schedule import Schedule
from fedkdx_plugin.engine.training import Settings
from fedkdx_plugin.engine.workspace import Workspace
from fedkdx_plugin.experiments.setting import check, check_assumed, make_task, training
from fedkdx_plugin.flower.apps.models import Given, Make, as_shape, maker, speaks_of_head
from fedkdx_plugin.flower.options import ELSEWHERE
from fedkdx_plugin.flower.protocol import MOST_CLASSES
from registry import catalog
from registry.blame import is_expected
from registry.errors import UserError
from registry.interface import Server, Task
from registry.parameters import suggest
from registry.text import shown

# options of the clients' work, which the server sends; those that it has for itself alone
CLIENTS = (
    "seed",
    "batch_size",
    "local_epochs",
    "local_learning_rate",
    "learning_rate_decay",
    "learning_rate_decay_gamma",
    "clip_norm",
    "optimizer",
    "class_weights",
    "augment",
    "bn",
    "norm",
)
SERVERS = ("preset", "aggregate", "assumed_bad", "max_share", "outliers", "eval_gap")
RENAMED = {"student_model": "student"}
TRIAL, TRIAL_EPOCHS = 8, 2  # windows and epochs with which everything is tried before the first round


@dataclass(frozen=True)
class Plan:
    """An algorithm, and how its clients train which models.

    Attributes:
        choice: the algorithm with its hyper-parameters.
        config: the options.
        own: shape of one window, as the user's networks take it.
        classes: number of classes.
        model, student: make the models (see `registry.interface.Task`).
    """

    choice: Choice
    config: Config
    own: tuple[int, ...]
    classes: int
    model: Make
    student: Make

    @staticmethod
    def of(
        algorithm: str | type[Server],
        model: Given,
        student: Given | None,
        shape: Sequence[int],
        classes: int,
        options: Mapping[str, Any],
    ) -> Plan:
        """Return a plan, checked. Raises UserError: wrong input, or an algorithm that cannot run in an app."""
        try:
            return Plan._of(algorithm, model, student, shape, classes, options)
        except UserError as error:
            raise UserError(with_names(str(error), RENAMED)) from error

    @staticmethod
    def _of(
        algorithm: str | type[Server],
        model: Given,
        student: Given | None,
        shape: Sequence[int],
        classes: int,
        options: Mapping[str, Any],
    ) -> Plan:
        as_shape(shape)
        if isinstance(classes, bool) or not isinstance(classes, int) or not 2 <= classes <= MOST_CLASSES:
            raise UserError(f"classes={classes!r}: write a whole number from 2 to {MOST_CLASSES}")
        config = from_dict({**options, "algorithm": [spec_of(algorithm)], "data": ELSEWHERE}, "options")
        (choice,) = check(config)
        check_assumed([config])
        if choice.server.pools_data:
            raise UserError(
                f"{choice.name} pools everybody's data, which never leave a client; it cannot run in an app"
            )
        if choice.server.trains_everyone(choice.server.Params()):
            raise UserError(f"{choice.name} needs no server, as its clients send nothing; it cannot run in an app")
        made = maker(model, shape)
        shared = made if student is None or student is model else maker(student, shape)
        return Plan(choice, config, tuple(shape), classes, made, shared)

    def task(self) -> Task:
        """Return the learning task."""
        made = make_task(self.config, as_shape(self.own), self.classes)
        return dataclasses.replace(made, model_class=self.model, student_class=self.student)

    def settings(self) -> Settings:
        """Return how clients train. Raises UserError: the windows cannot be augmented so."""
        channels = [str(number) for number in range(self.own[0])]
        return training(self.config, self.choice, channels)

    def to_text(self, workspace: Workspace) -> str:
        """Return what `read` reads, as it is sent.

        Args:
            workspace: the server's networks, whose form clients compare with that of theirs.
        """
        options = {name: value for name, value in self.config.to_dict().items() if name in CLIENTS}
        options["local_learning_rate"] = self.choice.learning_rate
        about: dict[str, Any] = {"algorithm": self.choice.name, "set": _plain(dataclasses.asdict(self.choice.params))}
        about |= {"options": options, "shape": list(self.own), "classes": self.classes, "form": form_of(workspace)}
        return json.dumps(about, sort_keys=True)

    @staticmethod
    def read(text: object, algorithm: str | type[Server], model: Given, student: Given | None) -> tuple[Plan, str]:
        """Return the plan of a server that has the same algorithm, and the form of its networks.

        Args:
            text: what `to_text` returned, from outside: it decides on values of options alone.
            algorithm, model, student: the client's own.

        Raises:
            UserError: it is no such text, or of another algorithm.
        """
        try:
            about = json.loads(str(text))
            name, options, values = str(about["algorithm"]), dict(about["options"]), dict(about["set"])
            shape, classes, form = about["shape"], about["classes"], str(about["form"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"the server's plan cannot be read: {type(error).__name__}: {error}") from error
        own = catalog.find("algorithms", spec_of(algorithm)).name
        if name != own:
            raise UserError(
                f"the server's strategy is {shown(name)}, but this client's app is of {own}; give both the same"
            )
        if unknown := sorted(options.keys() - set(CLIENTS)):
            raise UserError(f"the server's plan sets '{shown(unknown[0])}', which is no option of a client")
        sets = {f"{own}.{key}": value for key, value in values.items()}
        return Plan.of(algorithm, model, student, shape, classes, options | {"set": sets}), form

    def try_out(self) -> None:
        """Make a round of two made-up clients, so that what does not fit is found before the first real one.

        Raises:
            UserError: the algorithm cannot use these models, or they fail.
        """
        task, choice = self.task(), self.choice
        try:
            choice.server.check(task, choice.params)
            settings = dataclasses.replace(self.settings(), batch_size=TRIAL, local_epochs=TRIAL_EPOCHS)
            about = choice.server, task, choice.params, _made_up(task)
            federation = Federation(*about, settings, Schedule(1, 1.0), "sequential")
            federation.run()
            if speaks_of_head(federation.workspace.clients[0], federation.workspace.nets, TRIAL_EPOCHS):
                for model in predictors(federation.workspace).values():
                    model.head  # noqa: B018 (raises where it is not known)
        except UserError as error:
            if not is_expected(error) or str(error).startswith(choice.name):
                raise
            raise UserError(f"{choice.name}: {with_names(str(error), RENAMED)}") from error
        except Exception as error:
            raise UserError(f"{choice.name} fails with this model: {type(error).__name__}: {error}") from error
        self._check_repeats(federation.workspace)

    def _check_repeats(self, workspace: Workspace) -> None:
        """Raise UserError where the models have other initial weights each time, as every client makes its own."""
        again = self.workspace().initial
        if not all(torch.equal(tensor, again[name]) for name, tensor in workspace.initial.items()):
            raise UserError(
                "model: the function gives other initial weights each time; draw them by PyTorch's own generator, "
                "which is seeded, or load the same ones"
            )

    def workspace(self) -> Workspace:
        """Return the networks, with their initial weights, of one client without windows."""
        task = dataclasses.replace(self.task(), seed=self.config.seed, params=self.choice.params)
        return Workspace(self.choice.server, task, self.choice.params, [0], self.config.seed, torch.device("cpu"))


def check_options(options: Mapping[str, Any]) -> None:
    """Raise UserError for an option that a strategy does not have."""
    for name in options:
        if name not in CLIENTS + SERVERS:
            known = ", ".join(CLIENTS + SERVERS)
            raise UserError(f"Strategy: no option '{name}'{suggest(name, CLIENTS + SERVERS)}; known: {known}")


def spec_of(algorithm: str | type[Server]) -> str:
    """Return by which text an algorithm is found. Raises UserError: no such name, or no `Server` class."""
    if isinstance(algorithm, type):
        return catalog.register("algorithms", algorithm).name
    if not isinstance(algorithm, str):
        raise UserError(f"algorithm={algorithm!r}: write a name (fedkdx list) or a Server class")
    return catalog.find("algorithms", algorithm).spec


def form_of(workspace: Workspace) -> str:
    """Return a digest of names, shapes and types of all networks' state."""
    form = [(name, list(tensor.shape), str(tensor.dtype)) for name, tensor in sorted(workspace.initial.items())]
    return hashlib.sha256(json.dumps(form).encode()).hexdigest()


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def _made_up(task: Task) -> DeviceData:
    """Return two clients' windows of noise."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2 * TRIAL, *task.shape, generator=rng)
    y = torch.arange(2 * TRIAL) % task.classes
    return DeviceData(
        train_x=[x[:TRIAL], x[TRIAL:]],
        train_y=[y[:TRIAL], y[TRIAL:]],
        test_x=x,
        test_y=y,
        test_client=torch.arange(2).repeat_interleave(TRIAL),
        test_slices=[slice(0, TRIAL), slice(TRIAL, 2 * TRIAL)],
    )
