"""Case of an algorithm to check, and helpers that its checks share."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.faults import Damage
from fedkdx_plugin.engine.record import RoundRecord
from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.testing.made import CLASSES, SHAPE, Recorder, TinyNet, make_federation
from fedkdx_plugin.testing.running import require
from registry.errors import UserError
from registry.interface import Message, Model, Server, Task


@dataclass(frozen=True)
class AlgorithmCase:
    """Algorithm to check.

    Attributes:
        algorithm: the server class.
        params: hyper-parameters of all runs that differ from the defaults.
        without_effect: hyper-parameter -> why no short run can show its effect.
    """

    algorithm: type[Server]
    params: Mapping[str, Any] = field(default_factory=dict)
    without_effect: Mapping[str, str] = field(default_factory=dict)

    def task(self, model: type[Model] = TinyNet, student: type[Model] = TinyNet, local_bn: bool = False) -> Task:
        """Return a task; the student has the class of the model if the algorithm refuses another."""
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
        """Return a federation (see `make_federation`). Raises UserError if `Server.check` does, as runs do."""
        task, own = task or self.task(), {**self.params, **(params or {})}
        self.algorithm.check(task, self.algorithm.Params(**own))
        return make_federation(self.algorithm, data, task, params=own, backend=backend, **settings)


def run(federation: Federation, done: int = 0) -> list[RoundRecord]:
    """Run a federation to its end and return the record of each round."""
    recorder = Recorder()
    try:
        federation.run([recorder], done)
    finally:
        federation.close()
    return recorder.records


def difference(one: Message, other: Message) -> str:
    """Return the first difference of two messages, bit by bit, in words; '' if there is none."""
    for name in sorted(one.tensors.keys() ^ other.tensors.keys()):
        return f"'{name}' is in one of them only"
    for name, tensor in one.tensors.items():
        if not torch.equal(tensor, other.tensors[name]):
            return f"'{name}' differs"
    return "" if one.meta == other.meta else "the metadata differ"


def copy_of(message: Message) -> Message:
    """Return a copy of a message, serialised and read again."""
    return Message.from_bytes(message.to_bytes())


def numbers(record: RoundRecord) -> tuple[Any, ...]:
    """Return the numbers of a round except wall times, as text, so that NaN equals NaN, and its clients."""
    served = record.metrics["served"] if record.metrics else None
    values = (record.train_loss, record.bytes_up, record.bytes_down, served and served.loss, served and served.f1)
    return (*map(str, values), tuple(record.selected), tuple(record.rejected.items()))


def require_all_counted(records: list[RoundRecord]) -> None:
    """Require that no update was dropped."""
    for record in records:
        for id, reason in record.rejected.items():
            require(False, f"round {record.round}: the honest update of client {id} was dropped ({reason})")


def require_finite(state: Mapping[str, Tensor]) -> None:
    """Require that no tensor holds NaN or infinity."""
    for name, tensor in state.items():
        require(tensor.isfinite().all(), f"'{name}' holds NaN or infinity: look for a division by zero or a logarithm")


def require_finite_metrics(record: RoundRecord) -> None:
    """Require finite metrics of the served models."""
    served = record.metrics["served"]
    for name in ("accuracy", "f1", "recall", "auc", "loss"):
        require(math.isfinite(getattr(served, name)), f"the served models' {name} is not finite")


class Heard(NamedTuple):
    """Contents of messages: (name, numbers) of each tensor, and of each entry of the metadata that holds numbers."""

    up: list[tuple[str, Tensor]]
    down: list[tuple[str, Tensor]]


def listen(federation: Federation) -> Heard:
    """Record a copy of the contents of all messages from now on."""
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
        if values := list(_floats(value)):
            yield name, torch.tensor(values, dtype=torch.float64)


def _floats(value: Any) -> Iterator[float]:
    """Yield all numbers in an entry of the metadata, at any depth."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _floats(item)
    elif isinstance(value, (int, float)):
        yield float(value)
