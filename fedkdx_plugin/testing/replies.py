"""Checks that the round goes on and the server stays finite, however a reply was damaged on its way."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fedkdx_plugin.engine.backends.base import Trained
from fedkdx_plugin.engine.record import RoundRecord
from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.engine.transport import Transport
from fedkdx_plugin.testing.case import AlgorithmCase, copy_of, difference
from fedkdx_plugin.testing.made import make_data, same_state
from fedkdx_plugin.testing.running import Checks, require
from registry.interface import Message, NonFinite, Round
from registry.messages import LEAST_VARIANCE, VARIANCE

CHECKS = Checks()
VICTIM, CLIENTS, ROUNDS, MUTATIONS = 2, 4, 3, 60
LAST = Round(ROUNDS, ROUNDS)
VARIANCES = "call `registry.messages.check_variances` in `check_reply`"
ADVICE = "raise BadMessage in `check_reply` for all that an honest client does not send (see registry.messages)"
NUMBERS: tuple[Any, ...] = (
    -1,
    0,
    1,
    2,
    True,
    None,
    1e-320,
    1e38,
    -1e300,
    10**400,
    float("inf"),
    float("nan"),
    "7",
    [],
    {},
    [[1, 2]],
)
NO_SAMPLES = (0, -1, True, 1.5, float("nan"), None, "7", [1])

Damage = Callable[[bytes], bytes]


@CHECKS
def check_refused_reply(case: AlgorithmCase) -> None:
    """Require that a refused reply changes no client state, and that honest replies are not refused."""
    if case.algorithm.pools_data:
        return  # there are no replies
    (honest, heard), (refused, record) = _whole_round(case, None), _whole_round(case, lambda data: b"")
    require(not heard.rejected, f"honest replies are refused: {heard.rejected}")
    require(
        list(record.rejected) == [VICTIM],
        f"the empty reply of client {VICTIM} alone must be refused, not {record.rejected}",
    )
    for id in range(CLIENTS):
        one, other = honest.workspace.clients[id], refused.workspace.clients[id]
        same = same_state(honest.workspace.kept[id], refused.workspace.kept[id])
        require(
            same and same_state(one.memory, other.memory), f"a refused reply changes the client state of client {id}"
        )


@CHECKS
def check_looking_at_replies(case: AlgorithmCase) -> None:
    """Require that `check_reply` changes neither the server nor the reply."""
    if case.algorithm.pools_data:
        return
    exchange = _Exchange(case)
    server, reply = exchange.federation.server, copy_of(exchange.honest[VICTIM])
    before = copy_of(server.save())
    server.check_reply(VICTIM, reply)
    wrong = difference(before, copy_of(server.save()))
    require(not wrong, f"`check_reply` changes the server ({wrong}): change it in `aggregate` alone")
    wrong = difference(exchange.honest[VICTIM], reply)
    require(not wrong, f"`check_reply` changes the reply ({wrong}): change nothing there")


@CHECKS
def check_wrong_replies(case: AlgorithmCase) -> None:
    """Require that a reply with a missing, foreign, misshapen or mistyped tensor, NaN or absurd samples is refused."""
    if case.algorithm.pools_data:
        return
    exchange = _Exchange(case)
    for what, tensors, meta in wrong_replies(exchange.honest[VICTIM]):
        rejected, _ = exchange(_replaced_by(written(tensors, meta)), what)
        require(VICTIM in rejected, f"a reply with {what} is accepted: {ADVICE}")


@CHECKS
def check_variances_of_batch_norm(case: AlgorithmCase) -> None:
    """Require that no reply gives the server a negative running variance, which makes every prediction NaN."""
    if case.algorithm.pools_data:
        return
    exchange = _Exchange(case)
    honest = exchange.honest[VICTIM]
    for name in (name for name in honest.tensors if name.endswith(VARIANCE)):
        for value in (-1.0, 1e6):  # as a variance, and as a gradient of one
            tensors = dict(honest.tensors) | {name: torch.full_like(honest.tensors[name], value)}
            exchange(_replaced_by(written(tensors, dict(honest.meta))), f"{value:g} in '{name}'")
            for own, tensor in exchange.federation.server.networks().items():
                negative = own.endswith(VARIANCE) and bool((tensor < LEAST_VARIANCE).any())
                require(not negative, f"a reply with {value:g} in '{name}' makes '{own}' negative: {VARIANCES}")


@CHECKS
def check_mutated_replies(case: AlgorithmCase) -> None:
    """Require that replies mutated at random are refused, as if they had not arrived, or leave the server finite."""
    if case.algorithm.pools_data:
        return
    exchange, rng = _Exchange(case), random.Random(0)
    for number in range(MUTATIONS):
        exchange(lambda data: mutated(data, rng), f"random mutation {number}")


class _Exchange:
    """End of the last round, repeated with a different damage to the victim's reply each time.

    Attributes:
        honest: client -> reply that it sent.
        without: the server's state if the victim's reply does not arrive.
    """

    def __init__(self, case: AlgorithmCase) -> None:
        self.federation = one = _before_the_last(case)
        self.start = one.server.save().to_bytes()
        messages = {id: one.transport.send_down(one.server.message(id, LAST)) for id in range(CLIENTS)}
        self.results: dict[int, Trained | NonFinite] = one.backend.train(messages, LAST)
        self.honest = {id: trained.reply for id, trained in self.results.items() if isinstance(trained, Trained)}
        require(len(self.honest) == CLIENTS, "the updates of honest clients are not finite")
        _, self.without = self._once(lambda data: b"", "nothing in it")

    def __call__(self, damage: Damage, what: str) -> tuple[dict[int, str], Message]:
        """Return client -> reason of those refused, and the server's state afterwards, which must be finite."""
        rejected, after = self._once(damage, what)
        require(set(rejected) <= {VICTIM}, f"a reply with {what} makes the server refuse others: {rejected}")
        if rejected:
            reason = rejected[VICTIM]
            require(
                reason.isprintable() and len(reason) < 250,
                f"{what}: the reason must be one line below 250 characters, not {reason!r}",
            )
            wrong = difference(self.without, after)
            require(not wrong, f"a reply with {what} is refused, but changes the server ({wrong})")
        for name, tensor in after.tensors.items():
            require(
                tensor.isfinite().all(), f"a reply with {what} makes the server's '{name}' infinite or NaN: {ADVICE}"
            )
        return rejected, after

    def _once(self, damage: Damage, what: str) -> tuple[dict[int, str], Message]:
        """Collect and aggregate the replies once, from the same state of the server."""
        server = self.federation.server
        server.restore(Message.from_bytes(self.start))
        _spoil(self.federation, damage)
        try:
            replies, rejected = self.federation._collect(self.results, LAST)
            server.aggregate(replies, LAST)
            after = copy_of(server.save())
            for id in range(CLIENTS):
                server.message(id, LAST).to_bytes()
        except Exception as error:
            text = f"a reply with {what} raises {type(error).__name__} ({' '.join(str(error).split())[:200]}): {ADVICE}"
            raise AssertionError(text) from error
        return rejected, after


def _before_the_last(case: AlgorithmCase) -> Federation:
    """Return a federation before its last round."""
    one = case.federation(make_data(sizes=(12, 7, 20, 9)), rounds=ROUNDS, join_ratio=1, local_epochs=1)
    for index in range(1, ROUNDS):
        one.round(LAST._replace(index=index))
    return one


def _spoil(one: Federation, done: Damage | None) -> None:
    """Apply this damage to all that the victim sends from now on."""
    transport = one.transport

    def send_up(client: int, message: Message, damage: Damage | None = None) -> Message:
        # the class's own method: `transport.send_up` may be that of an earlier damage, which would win
        return Transport.send_up(transport, client, message, done if client == VICTIM else None)

    transport.send_up = send_up  # type: ignore[method-assign]


def _replaced_by(data: bytes) -> Damage:
    """Return a damage that replaces all that was sent."""
    return lambda _: data


def _whole_round(case: AlgorithmCase, damage: Damage | None) -> tuple[Federation, RoundRecord]:
    """Run the last round as `Federation.run` does, with a damaged reply."""
    one = _before_the_last(case)
    _spoil(one, damage)
    return one, one.round(LAST)


def wrong_replies(honest: Message) -> Iterator[tuple[str, dict[str, Tensor], dict[str, Any]]]:
    """Yield messages that no honest client sends: in words, tensors, metadata."""
    tensors, meta = dict(honest.tensors), dict(honest.meta)
    yield "a foreign tensor", tensors | {"foreign": torch.zeros(3)}, meta
    for name, tensor in tensors.items():
        others = {other: value for other, value in tensors.items() if other != name}
        yield f"no tensor '{name}'", others, meta
        yield f"a dimension too many in '{name}'", others | {name: tensor.unsqueeze(0)}, meta
        yield f"'{name}' of booleans", others | {name: tensor.bool()}, meta
        if tensor.is_floating_point() and tensor.numel():
            yield f"NaN in '{name}'", others | {name: torch.full_like(tensor, torch.nan)}, meta
    if "samples" in meta:
        yield "no 'samples'", tensors, {key: value for key, value in meta.items() if key != "samples"}
        for samples in NO_SAMPLES:
            yield f"samples = {samples!r}", tensors, meta | {"samples": samples}


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Change the bytes of a message, one of its tensors or one entry of its metadata at random."""
    if rng.random() < 0.25:
        return _changed_bytes(data, rng)
    message = Message.from_bytes(data)
    tensors, meta = dict(message.tensors), dict(message.meta)
    if rng.random() < 0.6:
        tensors = _changed_tensors(tensors, rng)
    else:
        meta = _changed_meta(meta, rng)
    return written(tensors, meta)


def written(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> bytes:
    """Serialise a message as `Message.to_bytes` does, but with any metadata."""
    data = Message({name: tensor.clone() for name, tensor in tensors.items()}, {"meta": 0}).to_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["meta"] = json.dumps(meta)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def _changed_tensors(tensors: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    """Change or remove one tensor, or add one."""
    name = rng.choice(sorted(tensors)) if tensors else None
    if name is None or rng.random() < 0.2:
        return tensors | {
            rng.choice(["", "foreign", "a\nb\x1b[2J", f"{name}.U", "student.head.weight"]): torch.ones(2, 2)
        }
    tensor = tensors.pop(name)
    types = [torch.float64, torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.int32, torch.int16]
    cut = tensor.reshape(-1)[: rng.randrange(tensor.numel() + 1)]
    new = rng.choice(
        [
            None,
            tensor.to(rng.choice(types)),
            tensor.unsqueeze(rng.choice([0, -1])),
            tensor.reshape(-1),
            tensor.mT.contiguous() if tensor.ndim > 1 else torch.tensor(3.0),
            cut.clone(),
            torch.cat([tensor, tensor]) if tensor.ndim else tensor[None],
            *_other_values(tensor, rng),
        ]
    )
    return tensors if new is None else tensors | {rng.choice([name] * 5 + [f"{name}x"]): new}


def _other_values(tensor: Tensor, rng: random.Random) -> list[Tensor]:
    """Return tensors of the same shape and type with values that honest clients never or hardly ever send."""
    if not tensor.is_floating_point():
        return [torch.full_like(tensor, value) for value in (0, 1, 100)]
    first = torch.arange(tensor.numel()).reshape(tensor.shape) == 0
    return [
        torch.where(first, rng.choice([torch.inf, -torch.inf]), tensor),
        torch.full_like(tensor, torch.nan),
        torch.full_like(tensor, rng.choice([1e30, -1e30, 1e-40])),
        torch.randn_like(tensor),
    ]


def _changed_meta(meta: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """Change or remove one entry, or add one."""
    key = rng.choice([*meta, "more"])
    meta = {name: value for name, value in meta.items() if name != key}
    if rng.random() < 0.8:
        meta[key] = rng.choice([*NUMBERS, [[1, rng.choice(NUMBERS)]], [[rng.choice(NUMBERS), 0.5]]])
    return meta


def _changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """Cut bytes off, overwrite some, or return another message altogether."""
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
