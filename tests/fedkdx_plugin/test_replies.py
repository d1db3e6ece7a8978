"""Whatever a client's reply has become on its way, the round goes on, and only that client's part in it changes."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable

import pytest
import torch

from registry import catalog
from registry.interface import Message, Round
from tests.conftest import make_data, make_federation, same_state
from tests.test_example import EXAMPLE

NAMES = [name for name in catalog.BUILT_IN["algorithms"] if name != "Centralised"]
VICTIM, ROUNDS, MUTATIONS = 2, 3, 100
LAST = Round(ROUNDS, ROUNDS)


def load(name: str):
    return catalog.load("algorithms", name)


@pytest.fixture(params=[*NAMES, "FedMedian"])
def algorithm(request, monkeypatch):
    """Every built-in algorithm, and the example of a third party."""
    if request.param in NAMES:
        return load(request.param)
    monkeypatch.syspath_prepend(EXAMPLE)
    from fedkdx_median.algorithm import FedMedian

    request.addfinalizer(lambda: [sys.modules.pop(name) for name in list(sys.modules) if "fedkdx_median" in name])
    return FedMedian


def before_the_last(algorithm):
    """Return a federation before its last round."""
    one = make_federation(algorithm, make_data(sizes=(12, 7, 20, 9)), rounds=ROUNDS, join_ratio=1, local_epochs=1)
    for index in range(1, ROUNDS):
        one.round(LAST._replace(index=index))
    return one


def spoil(one, damage: Callable[[bytes], bytes] | None) -> None:
    """From now on this happens to what the victim sends."""
    send_up = type(one.transport).send_up
    one.transport.send_up = lambda id, reply, _: send_up(one.transport, id, reply, damage if id == VICTIM else None)


def whole_round(algorithm, damage: Callable[[bytes], bytes] | None):
    """Run the last round with a damaged reply, as users run it; return federation and record."""
    one = before_the_last(algorithm)
    spoil(one, damage)
    return one, one.round(LAST)


NUMBERS = (-1, 0, 1, 2, True, None, 1e-320, 1e38, -1e300, 10**400, float("inf"), float("nan"), "7", [], {}, [[1, 2]])


def changed_tensors(tensors: dict, rng: random.Random) -> dict:
    """One tensor is something else; one name comes or goes."""
    name = rng.choice(sorted(tensors)) if tensors else None
    if name is None or rng.random() < 0.2:
        return tensors | {
            rng.choice(["", "foreign", "a\nb\x1b[2J", f"{name}.U", "student.head.weight"]): torch.ones(2, 2)
        }
    tensor = tensors.pop(name)
    types = [torch.float64, torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64, torch.uint16]
    cut = tensor.reshape(-1)[: rng.randrange(tensor.numel() + 1)]
    infinite = torch.where(
        torch.arange(tensor.numel()).reshape(tensor.shape) == 0, rng.choice([torch.inf, -torch.inf]), tensor
    )
    new = rng.choice(
        [
            None,
            tensor.to(rng.choice(types)),
            tensor.unsqueeze(rng.choice([0, -1])),
            tensor.reshape(-1),
            tensor.mT.contiguous() if tensor.ndim > 1 else torch.tensor(3.0),
            cut.clone(),
            torch.cat([tensor, tensor]) if tensor.ndim else tensor[None],
            infinite,
            torch.full_like(tensor, torch.nan),
            torch.full_like(tensor, rng.choice([1e30, -1e30, 1e-40])),
            torch.randn_like(tensor),
        ]
    )
    return tensors if new is None else tensors | {rng.choice([name] * 5 + [f"{name}x"]): new}


def changed_meta(meta: dict, rng: random.Random) -> dict:
    """One entry is something else, or gone."""
    key = rng.choice([*meta, "more"])
    meta = {name: value for name, value in meta.items() if name != key}
    if rng.random() < 0.8:
        meta[key] = rng.choice([*NUMBERS, [[1, rng.choice(NUMBERS)]], [[rng.choice(NUMBERS), 0.5]]])
    return meta


def written(tensors: dict, meta: dict) -> bytes:
    """As `Message.to_bytes`, but whatever the metadata are."""
    data = Message({name: tensor.clone() for name, tensor in tensors.items()}, {"meta": 0}).to_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["meta"] = json.dumps(meta)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut off, overwritten, or another message altogether."""
    length = int.from_bytes(data[:8], "little")
    place = rng.randrange(rng.choice([8, 8 + length, len(data)]))
    return rng.choice(
        [
            data[:place],
            data[:place] + rng.randbytes(1) + data[place + 1 :],
            data[:place] + rng.randbytes(8) + data[place + 8 :],
            rng.randbytes(len(data)),
            data + b"\0",
            Message().to_bytes(),
            written({}, {"samples": [[[]]] * 9}),
            data.replace(b'"meta":"{', b'"meta":"' + b"[" * 20000, 1),
        ]
    )


def mutated(data: bytes, rng: random.Random) -> bytes:
    if rng.random() < 0.25:
        return changed_bytes(data, rng)
    message = Message.from_bytes(data)
    tensors, meta = dict(message.tensors), dict(message.meta)
    if rng.random() < 0.6:
        tensors = changed_tensors(tensors, rng)
    else:
        meta = changed_meta(meta, rng)
    return written(tensors, meta)


def test_a_refused_reply_changes_nothing_but_the_round_of_its_sender(algorithm):
    """The others' state is what it is in an honest round; the sender has worked, and keeps what it keeps."""
    honest, _ = whole_round(algorithm, None)
    refused, record = whole_round(algorithm, lambda data: b"")
    assert list(record.rejected) == [VICTIM] and not record.lost
    assert record.bytes_up == honest.transport.up
    for one, other in zip(refused.workspace.kept, honest.workspace.kept, strict=True):
        assert same_state(one, other)
    for one, other in zip(refused.workspace.clients, honest.workspace.clients, strict=True):
        assert same_state(one.memory, other.memory) and one.trained == other.trained == ROUNDS


def test_whatever_a_reply_has_become_the_server_goes_on(algorithm):
    """Mutated at random, a reply is refused, as if it had not come, or taken; the others' arrive as they were sent."""
    one = before_the_last(algorithm)
    start = one.server.save().to_bytes()
    results = one.backend.train({id: one.transport.send_down(one.server.message(id, LAST)) for id in range(4)}, LAST)

    def exchange(damage):
        one.server.restore(Message.from_bytes(start))
        spoil(one, damage)
        replies, rejected = one._collect(results, LAST)
        one.server.aggregate(replies, LAST)
        return replies, rejected, Message.from_bytes(one.server.save().to_bytes())

    honest, _, _ = exchange(None)
    _, _, without = exchange(lambda data: b"")
    rng, refused = random.Random(0), 0
    for _ in range(MUTATIONS):
        replies, rejected, after = exchange(lambda data: mutated(data, rng))
        assert set(rejected) <= {VICTIM} and set(replies) == set(range(4)) - set(rejected)
        for id in set(replies) - {VICTIM}:
            assert same_state(replies[id].tensors, honest[id].tensors) and replies[id].meta == honest[id].meta
        if rejected:
            refused += 1
            assert rejected[VICTIM].startswith(f"client {VICTIM}: ")
            assert rejected[VICTIM].isprintable() and len(rejected[VICTIM]) < 250
            assert same_state(after.tensors, without.tensors) and after.meta == without.meta
        assert all(tensor.isfinite().all() for tensor in after.tensors.values())
        assert all(one.server.message(id, LAST).to_bytes() for id in range(4))
    assert MUTATIONS / 4 < refused < MUTATIONS
