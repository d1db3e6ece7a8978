"""A site that lies is refused by name, whatever it sends; the others go on, and end as if it had not been asked."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from baselines.fedavg import FedAvg
from baselines.fedftl import FedFTL
from fedkdx_plugin.algorithm.fedkdx import FedKDX
from fedkdx_plugin.engine.outliers import Outliers, norm
from fedkdx_plugin.engine.schedule import Schedule
from fedkdx_plugin.flower.protocol import PROTOCOL, Announcement, Answer, Request
from registry import catalog
from registry.interface import BadMessage, Message
from tests.conftest import Recorder, make_federation, same_state
from tests.flower.fakes import make_coordinator, make_link

LIAR = 1
# one of each kind of reply; the others' are of one of these kinds, and take minutes more
KINDS = (
    *("FedAvg", "FedFomo", "FedMTL", "FedMAT", "FedFTL", "FedDistill", "FedKD", "FedKDX", "Local"),
    *("SCAFFOLD", "FedNova", "IFCA", "FedProto", "FedPAC", "GPFL"),
)
NAMES = [
    pytest.param(name, marks=() if name in KINDS else pytest.mark.slow)
    for name in catalog.BUILT_IN["algorithms"]
    if name not in ("Centralised", "FedKDX+", "FedKD+")
]
SCHEDULE = Schedule(2, 1.0)


def rewritten(change: Callable[[dict[str, torch.Tensor], dict[str, Any]], None]) -> Callable[[bytes], bytes]:
    """Return what a liar does to the bytes of its honest answer."""

    def spoil(data: bytes) -> bytes:
        message = Message.from_bytes(data)
        tensors, meta = dict(message.tensors), json.loads(json.dumps(dict(message.meta)))
        change(tensors, meta)
        if any(not isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
            raise AssertionError("tensors alone travel")
        text = json.dumps(meta)  # NaN, which an honest message refuses to write, and all that JSON can say
        blank = Message(tensors).to_bytes()
        length = int.from_bytes(blank[:8], "little")
        header = json.loads(blank[8 : 8 + length])
        header["__metadata__"] = {"meta": text}
        whole = json.dumps(header).encode()
        return len(whole).to_bytes(8, "little") + whole + blank[8 + length :]

    return spoil


def meta(**values: object) -> Callable[[bytes], bytes]:
    return rewritten(lambda tensors, own: own.update(values))


def of_reply(**values: object) -> Callable[[bytes], bytes]:
    return rewritten(lambda tensors, own: own["reply"].update(values) if own["reply"] else None)


def filled(value: float) -> Callable[[bytes], bytes]:
    def change(tensors: dict[str, torch.Tensor], own: dict[str, Any]) -> None:
        for name, tensor in tensors.items():
            if name.startswith("reply/") and tensor.is_floating_point():
                tensors[name] = torch.full_like(tensor, value)

    return rewritten(change)


def added(name: str) -> Callable[[bytes], bytes]:
    return rewritten(lambda tensors, own: tensors.update({f"reply/{name}": torch.ones(2)}))


LIES = {
    "NaN in the metadata": of_reply(rate=float("nan")),
    "a rate of 2**64": of_reply(rate=2**64),
    "a rate of 2**62": of_reply(rate=2**62),
    "10**18 samples": of_reply(samples=10**18),
    "other samples than announced": of_reply(samples=41),
    "a private tensor": added("teacher.head.weight"),
    "another private tensor": added("model.head.weight"),
    "nonfinite is a list": meta(nonfinite=[]),
    "nonfinite is None": meta(nonfinite=None),
    "nonfinite is huge": meta(nonfinite={"served": 10**400}),
    "the reply is a list": meta(reply=[1]),
    "no protocol": meta(protocol=None),
    "NaN": filled(float("nan")),
    "no message": lambda data: b"x" * 100,
    "half a message": lambda data: data[: len(data) // 2],
    "metrics of more windows": rewritten(
        lambda tensors, own: tensors.update({n: t + 1 for n, t in tensors.items() if n.startswith("metrics/")})
    ),
}


def ends_well(algorithm, folder, place, spoil) -> tuple[Recorder, Any]:
    link = make_link(algorithm, folder, place)
    if spoil:
        link.spoil[LIAR] = spoil
    coordinator, _ = make_coordinator(algorithm, folder, link, SCHEDULE)
    recorder = Recorder()
    coordinator.run([recorder])
    assert all(tensor.isfinite().all() for tensor in coordinator.save().tensors.values())
    return recorder, coordinator


@pytest.mark.parametrize("name", NAMES)
def test_one_liar_never_ends_a_federation(name, shard_folder, tmp_path):
    """Each lie in a federation of its own; who lied is named, and nobody else is refused."""
    algorithm = catalog.load("algorithms", name)
    for number, (what, spoil) in enumerate(LIES.items()):
        recorder, _ = ends_well(algorithm, shard_folder, tmp_path / str(number), spoil)
        for record in recorder.records:
            blamed = record.rejected | record.lost
            assert blamed.keys() <= {LIAR}, (what, blamed)
            assert all(reason.isprintable() and len(reason) < 400 for reason in blamed.values())


@pytest.mark.parametrize("what", [what for what in LIES if what != "metrics of more windows"])
def test_every_lie_of_a_fedavg_site_is_refused_and_leaves_no_trace(what, shard_folder, tmp_path):
    recorder, lied = ends_well(FedAvg, shard_folder, tmp_path / "lie", LIES[what])
    _, silent = ends_well(FedAvg, shard_folder, tmp_path / "silence", lambda data: None)
    if what in ("a rate of 2**62",):  # a number that FedAvg has no use for, and JSON and tensors hold
        assert not recorder.records[0].rejected
        return
    for record in recorder.records:
        assert list(record.rejected | record.lost) == [LIAR], what
    assert same_state(lied.server.save().tensors, silent.server.save().tensors)


@pytest.mark.parametrize("algorithm", [FedAvg, FedFTL, FedKDX])
def test_tensors_of_3e38_do_not_poison_the_rounds_to_come(algorithm, shard_folder, tmp_path):
    recorder, _ = ends_well(algorithm, shard_folder, tmp_path, filled(3e38))
    for record in recorder.records:
        assert list(record.rejected | record.lost) == [LIAR]


def test_an_update_far_out_of_line_is_set_aside_by_name(shard_folder, tmp_path):
    """Norms 2000 times the others' are, 500 times are not: the margin is wide."""
    for factor, refused in ((2e4, True), (2.0, False)):
        scale = rewritten(
            lambda tensors, own, f=factor: tensors.update(
                {n: t * f for n, t in tensors.items() if n.startswith("reply/") and t.is_floating_point()}
            )
        )
        recorder, _ = ends_well(FedAvg, shard_folder, tmp_path / str(factor), scale)
        assert [bool(record.rejected) for record in recorder.records] == [refused, refused]
        if refused:
            assert "times the usual" in recorder.records[0].rejected[LIAR]


def test_norms_and_what_is_usual_by_hand():
    def reply(*values: float) -> dict[str, torch.Tensor]:
        return {"a": torch.tensor(values[:1]), "b": torch.tensor(values[1:]), "n": torch.tensor([10**9])}

    assert norm(reply(3.0, 4.0)) == 5.0
    assert norm({"a": torch.full((4,), 3e38)}) == pytest.approx(6e38, rel=1e-6)  # beyond float32
    own = Outliers(10)
    assert not own.found({0: reply(1e9, 0.0)})  # alone in the first round: nothing to compare with
    assert own.usual == 1e9
    own = Outliers(10)
    replies = {0: reply(1.0, 0.0), 1: reply(2.0, 0.0), 2: reply(20.0, 0.0), 3: reply(19.9, 0.0), 4: reply(0.5, 0.0)}
    assert not own.found(replies) and own.usual == 2.0  # the median of 0.5, 1, 2, 19.9, 20
    replies[3] = reply(30.0, 0.0)
    assert list(own.found(replies)) == [3] and own.usual == 1.5  # of 0.5, 1, 2, 20
    assert list(own.found({7: reply(15.1, 0.0)})) == [7]  # one reply: the last round's usual norm counts
    assert own.usual == 1.5


def test_a_site_refused_again_and_again_is_left_out_and_told(shard_folder, tmp_path):
    link = make_link(FedAvg, shard_folder, tmp_path)
    link.spoil[LIAR] = filled(float("nan"))
    coordinator, story = make_coordinator(FedAvg, shard_folder, link, Schedule(8, 1.0))
    recorder = Recorder()
    coordinator.run([recorder])
    assert [LIAR in record.selected for record in recorder.records] == [True] * 5 + [False] * 3
    (told,) = [event for event in story.of("refused") if "left out" in event.detail]
    assert told.client == LIAR and "refused 5 times in a row, last: client 1: " in told.detail
    assert "left out" in link.refused[LIAR]


def test_a_round_whose_aggregate_is_not_finite_is_undone(monkeypatch):
    federation = make_federation(FedAvg, rounds=3, join_ratio=1)
    original = FedAvg.aggregate

    def overflowing(self, replies, round):
        original(self, replies, round)
        if round.index == 2:
            self.weights["model.fc.bias"] = self.weights["model.fc.bias"] + torch.inf

    monkeypatch.setattr(FedAvg, "aggregate", overflowing)
    recorder = Recorder()
    federation.run([recorder])
    assert [len(record.rejected) for record in recorder.records] == [0, 4, 0]
    assert "left NaN or infinity in 'model.fc.bias'" in recorder.records[1].rejected[0]
    assert recorder.records[1].metrics["served"].loss == recorder.records[0].metrics["served"].loss
    assert all(tensor.isfinite().all() for tensor in federation.server.weights.values())


def announced(**values: object) -> Message:
    own = {"client": 1, "samples": 5, "tests": 2, "shape": [2, 1, 7], "classes": ["a", "b"], "data": "made"}
    own |= {"evaluated_on": "test", "scale": "none", "versions": {"fedkdx": "1"}, "protocol": PROTOCOL}
    return Message({}, own | values)


@pytest.mark.parametrize(
    "values",
    [
        {"client": -1},
        {"client": 10**6},
        {"samples": 0},
        {"samples": 2**62},
        {"samples": True},
        {"samples": 1.0},
        {"tests": -1},
        {"shape": [2, 2, 7]},
        {"shape": [2, 1, 2**40]},
        {"shape": [0, 1, 7]},
        {"shape": [2, 1]},
        {"classes": ["a"]},
        {"classes": ["a", "a"]},
        {"classes": ["a", "b\nerror: c"]},
        {"classes": [f"c{i}" for i in range(10**4)]},
        {"classes": "ab"},
        {"classes": [1, 2]},
        {"data": "../../x"},
        {"data": None},
        {"evaluated_on": "train"},
        {"scale": "mine"},
        {"versions": {"fedkdx": ["1"]}},
        {"versions": {f"p{i}": "1" for i in range(1000)}},
        {"versions": None},
    ],
)
def test_an_announcement_out_of_its_bounds_is_refused(values):
    assert Announcement.from_message(announced()).samples == 5
    with pytest.raises(BadMessage) as error:
        Announcement.from_message(announced(**values))
    assert str(error.value).isprintable() and len(str(error.value)) < 400


PLAIN = some.none() | some.booleans() | some.integers(-(2**63), 2**63 - 1) | some.floats(allow_nan=False)
JSON = some.recursive(
    PLAIN | some.text(max_size=5),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
READERS: dict[str, tuple[Callable[[Message], object], dict[str, object]]] = {
    "announcement": (Announcement.from_message, dict(announced().meta)),
    "answer": (
        lambda message: Answer.from_message(message, 1, 2, 2),
        {
            "protocol": PROTOCOL,
            "client": 1,
            "round": 2,
            "dropped": "",
            "reply": {"samples": 3},
            "nonfinite": {"served": 0},
        },
    ),
    "request": (
        Request.from_message,
        {"protocol": PROTOCOL, "run": "r", "client": 1, "round": [1, 2, 0.5], "state": 0, "durable": 0, "train": {}}
        | {"measure": True, "after": 0, "same": []},
    ),
}
TENSORS = {
    "loss": torch.tensor(1.0, dtype=torch.float64),
    "metrics/served": torch.tensor([2.0] + [0.5] * 6 + [0.1] * 15, dtype=torch.float64),
    "confusion/served": torch.tensor([[1, 0], [0, 1]]),
}


@pytest.mark.parametrize("what", READERS)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=some.data())
def test_nothing_but_bad_message_passes(what, data):
    """Values of any kind in place of one or two, a key or a tensor gone, a tensor of another form."""
    read, honest = READERS[what]
    meta, tensors = dict(honest), dict(TENSORS) if what == "answer" else {}
    for key in data.draw(some.lists(some.sampled_from(sorted(meta)), min_size=1, max_size=2, unique=True)):
        if data.draw(some.booleans()):
            meta[key] = data.draw(JSON)
        else:
            del meta[key]
    if tensors and data.draw(some.booleans()):
        name = data.draw(some.sampled_from(sorted(tensors)))
        form = some.sampled_from([torch.zeros(0), torch.zeros(3, 2), torch.tensor([torch.nan] * 22), torch.tensor(7)])
        tensors[name] = data.draw(form)
    try:
        read(Message(tensors, meta))
    except BadMessage as error:
        assert str(error).isprintable()
