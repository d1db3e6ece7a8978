"""What the checks of algorithms are given, and what they have in common."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.faults import Damage
from fedkdx_plugin.engine.rounds import Federation, RoundRecord
from fedkdx_plugin.testing.made import CLASSES, SHAPE, Recorder, TinyNet, make_federation
from fedkdx_plugin.testing.running import require
from registry.errors import UserError
from registry.interface import Message, Model, Server, Task


@dataclass(frozen=True)
class AlgorithmCase:
    """An algorithm to check.

    Attributes:
        algorithm: the server class.
        params: hyper-parameters over the defaults, in all runs.
        without_effect: hyper-parameter -> why no short run can show its effect.
    """

    algorithm: type[Server]
    params: Mapping[str, Any] = field(default_factory=dict)
    without_effect: Mapping[str, str] = field(default_factory=dict)

    def task(self, model: type[Model] = TinyNet, student: type[Model] = TinyNet, local_bn: bool = False) -> Task:
        """Make a task; the student is of the model's class where the algorithm refuses another."""
        task = Task(SHAPE, CLASSES, model, student, local_bn)
        try:
            self.algorithm.check(task, self.algorithm.Params(**self.params))
        except UserError:
            return replace(task, student_class=model)
        return task

    def federation(
        self,
        data: DeviceData | None = None,
        task: Task | None = None,
        params: Mapping[str, Any] | None = None,
        backend: str = "sequential",
        **settings: Any,
    ) -> Federation:
        """Make a federation (see `make_federation`) as the command line would: what does not go together is refused."""
        task, own = task or self.task(), {**self.params, **(params or {})}
        self.algorithm.check(task, self.algorithm.Params(**own))
        return make_federation(self.algorithm, data, task, params=own, backend=backend, **settings)


def run(federation: Federation, done: int = 0) -> list[RoundRecord]:
    """Run a federation to its end and return what each round was."""
    recorder = Recorder()
    try:
        federation.run([recorder], done)
    finally:
        federation.close()
    return recorder.records


def difference(one: Message, other: Message) -> str:
    """Name the first thing in which two messages differ, bit by bit; '' where they do not."""
    for name in sorted(one.tensors.keys() ^ other.tensors.keys()):
        return f"'{name}' is in one of them only"
    for name, tensor in one.tensors.items():
        if not torch.equal(tensor, other.tensors[name]):
            return f"'{name}' differs"
    return "" if one.meta == other.meta else "the metadata differ"


def copy_of(message: Message) -> Message:
    """Return a message as it is after a way over the wire, in memory of its own."""
    return Message.from_bytes(message.to_bytes())


def figures(record: RoundRecord) -> tuple[Any, ...]:
    """Return all numbers of a round but wall times; NaN as text, so that it equals itself."""
    served = record.metrics["served"] if record.metrics else None
    numbers = (record.train_loss, record.bytes_up, record.bytes_down, served and served.loss, served and served.f1)
    return (*map(str, numbers), tuple(record.selected), tuple(record.rejected.items()))


def require_all_counted(records: list[RoundRecord]) -> None:
    """Require that nobody's work was dropped."""
    for record in records:
        for id, reason in record.rejected.items():
            require(False, f"round {record.round}: the honest work of client {id} was dropped ({reason})")


def require_finite(state: Mapping[str, Tensor]) -> None:
    """Require that no tensor holds NaN or infinity."""
    for name, tensor in state.items():
        require(tensor.isfinite().all(), f"'{name}' holds NaN or infinity: look for a division by zero or a logarithm")


def require_finite_metrics(record: RoundRecord) -> None:
    """Require that what the served models predict can be measured."""
    served = record.metrics["served"]
    for name in ("accuracy", "f1", "recall", "auc", "loss"):
        require(math.isfinite(getattr(served, name)), f"the served models' {name} is not finite")


class Heard(NamedTuple):
    """What went over the wire: (name, numbers) of each tensor and of each entry of the metadata that holds numbers."""

    up: list[tuple[str, Tensor]]
    down: list[tuple[str, Tensor]]


def listen(federation: Federation) -> Heard:
    """Keep a copy of all that travels from now on."""
    heard, transport = Heard([], []), federation.transport
    send_up, send_down = transport.send_up, transport.send_down

    def up(client: int, message: Message, damage: Damage | None = None) -> Message:
        heard.up.extend(_contents(message))
        return send_up(client, message, damage)

    def down(message: Message) -> Message:
        heard.down.extend(_contents(message))
        return send_down(message)

    transport.send_up, transport.send_down = up, down  # type: ignore[method-assign]
    return heard


def _contents(message: Message) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in message.tensors.items():
        yield name, tensor.detach().clone()
    for name, value in message.meta.items():
        if numbers := list(_numbers(value)):
            yield name, torch.tensor(numbers, dtype=torch.float64)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, (int, float)):
        yield float(value)
