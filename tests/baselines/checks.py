"""What every federated algorithm must survive, for the tests of baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.faults import Damage
from fedkdx_plugin.engine.rounds import Federation
from registry.interface import Message, Round
from tests.conftest import Recorder, make_data, same_state


def awkward_data() -> DeviceData:
    """Four clients: one with a single window, one with a single class, one that lacks a class, one with all."""
    data = make_data(sizes=(1, 12, 30, 40))
    data.train_y[1].zero_()
    data.train_y[2].clamp_(max=2)
    return data


def run(federation: Federation, selected: Sequence[Sequence[int]] = ()) -> list:
    """Run all rounds, with these clients where given, and return the records; nobody may be dropped."""
    if selected:
        federation._select = lambda round: list(selected[round.index - 1])
    recorder = Recorder()
    federation.run([recorder])
    assert not any(record.rejected for record in recorder.records)
    return recorder.records


def overheard(federation: Federation) -> list[Tensor]:
    """All tensors that travel from now on, both ways."""
    seen: list[Tensor] = []
    up, down = federation.transport.send_up, federation.transport.send_down

    def send_up(client: int, message: Message, damage: Damage | None = None) -> Message:
        seen.extend(message.tensors.values())
        return up(client, message, damage)

    def send_down(message: Message) -> Message:
        seen.extend(message.tensors.values())
        return down(message)

    federation.transport.send_up, federation.transport.send_down = send_up, send_down
    return seen


def travels(one: Tensor, seen: Sequence[Tensor]) -> bool:
    """Whether a tensor was in a message, by value."""
    return any(one.shape == other.shape and torch.equal(one, other) for other in seen)


def goes_on_identically(make: Callable[[], Federation], rounds: int = 4) -> bool:
    """Whether a server that is saved and restored half way does in the end what an unbroken one does, bit for bit."""
    unbroken, broken = make(), make()
    for index in range(1, rounds + 1):
        unbroken.round(Round(index, rounds))
        if index == rounds // 2 + 1:
            old = broken.server
            shared = {n: t for n, t in broken.workspace.initial.items() if n not in broken.workspace.private}
            broken.server = type(old)(old.task, old.params, shared)
            broken.server.restore(Message.from_bytes(old.save().to_bytes()))
        broken.round(Round(index, rounds))
    one, other = unbroken.save(), broken.save()
    return same_state(dict(one.tensors), dict(other.tensors)) and one.meta == other.meta
