"""Secure aggregation between sites without a network: the bits of one process, sites that die, lie or ask for it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fedkdx_plugin.engine.schedule import Schedule
from fedkdx_plugin.flower import worker
from fedkdx_plugin.flower.options import SiteOptions, shared_settings
from fedkdx_plugin.flower.protocol import Answer, Request
from fedkdx_plugin.flower.secure import SecureSite, Step, StepAnswer
from fedkdx_plugin.flower.site import SiteSetup
from fedkdx_plugin.privacy.secure_aggregation.messages import MASK, SHARE, STEPS, UNMASK
from registry import catalog
from registry.errors import UserError
from registry.interface import BadMessage, Message, Round
from tests.conftest import Recorder, same_state
from tests.flower.fakes import FakeLink, make_coordinator, make_link, make_local
from tests.flower.test_coordinator import assert_same_records

SECURE = Schedule(2, 1.0, secure=True)
FEDAVG = catalog.load("algorithms", "FedAvg")


class SecureLink(FakeLink):
    """Sites whose workers stay, as between two messages of a round they must.

    Attributes:
        dies: client -> the step, or 'train', at whose request its worker ends, in every round.
        spoil_step: (client, step) -> what becomes of its answer's bytes.
        said: what the sites' operators see.
    """

    def __init__(self, link: FakeLink) -> None:
        super().__init__(link.setups, link.make)
        self.said: list[str] = []
        self.workers = {id: SecureSite(self.said.append) for id in self.setups}
        self.dies: dict[int, str] = {}
        self.spoil_step = {}

    def exchange(self, requests, seconds):
        answers = {}
        for id, data in reversed(requests.items()):
            message = Message.from_bytes(data)
            kind = message.meta["step"] if Step.is_one(message) else "train"
            if self.dies.get(id) == kind:
                self.workers[id] = SecureSite(self.said.append)  # started anew, and asked once more
                if kind == "train":
                    continue
            self.requests.append((id, data))
            if Step.is_one(message):
                sent = self.workers[id].take(Step.from_message(message)).to_message().to_bytes()
            else:
                request = Request.from_message(message)
                try:
                    answer = self.make(self.setups[id]).handle(request)
                except UserError as error:
                    answer = Answer(id, request.round.index, dropped=str(error))
                sent = self.workers[id].begin(request.run, answer).to_message().to_bytes()
            self.answers.append((id, sent))
            spoilt = self.spoil_step.get((id, kind), lambda data: data)(sent)
            if spoilt is not None:
                answers[id] = spoilt
        return answers


def make(folder, state, schedule=SECURE, algorithm=FEDAVG, min_updates=1):
    link = SecureLink(make_link(algorithm, folder, state))
    coordinator, story = make_coordinator(algorithm, folder, link, schedule, min_updates=min_updates)
    return link, coordinator, story


def one_round(coordinator, index):
    coordinator.meet(round := Round(index, 3, 1.0))
    return coordinator.round(round)


def run(coordinator):
    coordinator.run([recorder := Recorder()])
    return recorder.records


@pytest.mark.parametrize("name", ["FedAvg", "FedAdam", "FedPer", "FedDBE"])
def test_sites_give_the_bits_and_the_bytes_of_one_process(name, shard_folder, tmp_path):
    algorithm = catalog.load("algorithms", name)
    local = make_local(algorithm, shard_folder, SECURE)
    local.run([here := Recorder()])
    _, coordinator, _ = make(shard_folder, tmp_path, algorithm=algorithm)
    assert_same_records(run(coordinator), here.records)
    assert same_state(dict(coordinator.server.save().tensors), dict(local.server.save().tensors))


def test_no_message_holds_an_update(shard_folder, tmp_path):
    """Not even one of its values: what the sites send are keys, boxes, digests, shares and masked values."""
    link, coordinator, _ = make(shard_folder, tmp_path)
    plain = make_link(FEDAVG, shard_folder, tmp_path / "plain")
    other, _ = make_coordinator(FEDAVG, shard_folder, plain, Schedule(1, 1.0))
    run(other)
    updates = [Message.from_bytes(data).tensors for _, data in plain.answers]
    names = {name.removeprefix("reply/") for own in updates for name in own if name.startswith("reply/")}
    assert names >= coordinator.server.weights.keys()
    coordinator.run()
    for _, data in link.answers:
        sent = Message.from_bytes(data).tensors
        known = {"reply/public", "loss", "boxes", "digests", "seed", "masked", "shares"}
        assert {name for name in sent if not name.startswith(("metrics/", "confusion/"))} <= known
    assert sum(text.count("sent its update masked, to be summed with 2") for text in link.said) == 6


@pytest.mark.parametrize("step", ["train", *STEPS])
def test_a_site_that_dies_between_two_steps_is_lost_and_the_others_go_on(step, shard_folder, tmp_path):
    link, coordinator, _ = make(shard_folder, tmp_path)
    link.dies = {1: step}
    records = run(coordinator)
    assert len(records) == 2
    for record in records:
        if step == UNMASK:  # its values had arrived
            assert not record.lost and not record.rejected
            assert [note for note in record.notes if note.startswith("client 1, whose values count: this site's keys")]
        else:
            assert list(record.lost) == [1] and not record.rejected
            assert step == "train" or "worker was started anew" in record.lost[1]
        assert not math.isnan(record.train_loss)


def test_the_rest_is_as_if_a_silent_site_had_not_been_asked(shard_folder, tmp_path):
    """Training from before it fell silent does not count at the site either: it goes on from its state before."""
    algorithm = catalog.load("algorithms", "FedPer")
    gone, coordinator, _ = make(shard_folder, tmp_path / "one", algorithm=algorithm)
    gone.spoil_step = {(1, MASK): lambda data: None}
    records = run(coordinator)
    assert all(list(record.lost) == [1] and not record.rejected for record in records)
    assert coordinator.remote.states == {0: 2, 1: 0, 2: 2}
    never, other, _ = make(shard_folder, tmp_path / "two", algorithm=algorithm)
    never.away.add(1)
    run(other)
    # the same but for the places that numbers are rounded to, which depend on how many began
    for name, tensor in other.server.save().tensors.items():
        assert torch.allclose(coordinator.server.save().tensors[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("step", STEPS)
def test_too_few_sites_undo_the_round_and_the_federation_goes_on(step, shard_folder, tmp_path, capsys):
    link, coordinator, _ = make(shard_folder, tmp_path)
    alone = {(id, step): lambda data: None for id in (0, 1)}
    link.spoil_step = dict(alone)
    before = {name: tensor.clone() for name, tensor in coordinator.server.weights.items()}
    record = one_round(coordinator, 1)
    assert sorted(record.lost) == [0, 1, 2] and not record.rejected
    assert same_state(before, dict(coordinator.server.weights))
    assert coordinator.remote.states == {0: 0, 1: 0, 2: 0}
    lines = [line for line in capsys.readouterr().err.splitlines() if "undone" in line]
    assert lines == [f"FedAvg, round 1: the round is undone: 1 of 3 clients took step '{step}'; 2 are needed"]
    link.spoil_step.clear()
    again = one_round(coordinator, 2)
    assert not again.lost and not again.rejected
    assert not same_state(before, dict(coordinator.server.weights))


def test_fewer_than_min_updates_are_not_unmasked(shard_folder, tmp_path):
    link, coordinator, _ = make(shard_folder, tmp_path, min_updates=3)
    link.spoil_step = {(1, MASK): lambda data: None}
    record = one_round(coordinator, 1)
    assert sorted(record.lost) == [0, 1, 2]
    steps = [Message.from_bytes(data).meta.get("step") for _, data in link.requests]
    assert MASK in steps and UNMASK not in steps


def spoilt(change):
    """Return what changes an answer's contents."""

    def spoil(data: bytes) -> bytes:
        message = Message.from_bytes(data)
        return change(dict(message.tensors), dict(message.meta)).to_bytes()

    return spoil


LIES = {
    "bytes that are no message": (MASK, lambda data: b"\xff" * 100, "lost"),
    "an answer to another step": (
        MASK,
        spoilt(lambda tensors, meta: Message(tensors, meta | {"step": SHARE})),
        "lost",
    ),
    "an answer of another round": (SHARE, spoilt(lambda tensors, meta: Message(tensors, meta | {"round": 99})), "lost"),
    "another client's": (SHARE, spoilt(lambda tensors, meta: Message(tensors, meta | {"client": 0})), "lost"),
    "nothing": (MASK, spoilt(lambda tensors, meta: Message({}, meta | {"content": None})), "lost"),
    "values too few": (
        MASK,
        spoilt(lambda tensors, meta: Message({"masked": tensors["masked"][1:]}, meta)),
        "rejected",
    ),
    "a reply in the plain": (
        "train",
        spoilt(lambda tensors, meta: Message(tensors | {"reply/model.w": torch.ones(3)}, meta)),
        "rejected",
    ),
    "no keys": (
        "train",
        spoilt(lambda tensors, meta: Message({n: t for n, t in tensors.items() if n != "reply/public"}, meta)),
        "rejected",
    ),
    "a layout beyond all bounds": (
        "train",
        spoilt(
            lambda tensors, meta: Message(tensors, meta | {"reply": {"layout": [["w", [2**28, 2**28], "float32"]]}})
        ),
        "rejected",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_site_is_named_and_the_others_go_on(lie, shard_folder, tmp_path):
    step, change, how = LIES[lie]
    link, coordinator, _ = make(shard_folder, tmp_path)
    link.spoil_step = {(1, step): change}
    for record in run(coordinator):
        assert list(getattr(record, how)) == [1], (record.lost, record.rejected)
        assert not math.isnan(record.train_loss)


def test_samples_that_do_not_add_up_undo_the_round(shard_folder, tmp_path, capsys):
    """The sum does not tell which of them lies."""
    link, coordinator, _ = make(shard_folder, tmp_path)

    def more(tensors, meta):
        masked = tensors["masked"].clone()
        masked[-2] += 1000
        return Message({"masked": masked}, meta)

    link.spoil_step = {(1, MASK): spoilt(more)}
    record = one_round(coordinator, 1)
    assert sorted(record.lost) == [0, 1, 2]
    assert "of 1108 samples, but the sites announced 108" in capsys.readouterr().err


def test_a_step_of_no_run_or_round_that_began_is_refused():
    site = SecureSite()
    answer = site.take(Step("run", 1, 1, SHARE, Message()))
    assert answer.content is None and "keys of that round are gone" in answer.dropped
    site.begin("run", Answer(1, 1, Message({"w": torch.ones(2)}, {"samples": 3}), 0.5))
    for step in (
        Step("other", 1, 1, SHARE, Message()),
        Step("run", 1, 2, SHARE, Message()),
        Step("run", 2, 1, SHARE, Message()),
    ):
        assert "are gone" in site.take(step).dropped
    assert "no list of clients" in site.take(Step("run", 1, 1, SHARE, Message())).dropped
    assert "are gone" in site.take(Step("run", 1, 1, SHARE, Message())).dropped  # refused once, it is over


def test_what_cannot_be_summed_is_not_sent():
    answer = SecureSite().begin("run", Answer(1, 1, Message({"w": torch.ones(2)}, {"samples": 3, "steps": 1}), 0.5))
    assert (
        answer.reply is None
        and answer.dropped == "client 1: its metadata samples, steps cannot be summed; 'samples' alone can"
    )


def test_steps_arrive_as_they_were_sent():
    step = Step("run", 1, 2, MASK, Message({"boxes": torch.ones(2, 3, dtype=torch.uint8)}, {"clients": [1, 2]}))
    back = Step.from_message(Message.from_bytes(step.to_message().to_bytes()))
    assert (back.run, back.client, back.round, back.step) == ("run", 1, 2, MASK)
    assert back.content.meta == step.content.meta and torch.equal(
        back.content.tensors["boxes"], step.content.tensors["boxes"]
    )
    answer = StepAnswer(1, 2, MASK, dropped="why not")
    assert StepAnswer.from_message(Message.from_bytes(answer.to_message().to_bytes()), step) == answer


@pytest.mark.parametrize(
    "change",
    [
        {"step": "sum"}, {"step": ["mask"]}, {"run": "../x"}, {"client": -1}, {"client": "1"}, {"round": 1.5},
        {"content": None}, {"content": 7}, {"protocol": 1},
    ],
)  # fmt: skip
def test_hostile_steps_are_no_steps(change):
    message = Step("run", 1, 2, MASK, Message({}, {"clients": [1]})).to_message()
    with pytest.raises(BadMessage):
        Step.from_message(Message({}, dict(message.meta) | change))


def settings(**options) -> dict[str, str]:
    values = {"data": "SPAR", "algorithm": ["FedAvg"], "model": "cnn"} | options
    return {"run": "one", "settings": shared_settings(values), "clients": 3}


@pytest.mark.parametrize(("wanted", "asked"), [(False, False), (False, True), (True, True), (True, False)])
def test_a_site_that_masks_alone_answers_no_other_request(wanted, asked, shard_folder, tmp_path, capsys):
    setup = SiteSetup(1, shard_folder, 1, tmp_path, torch.device("cpu"), wanted)
    setup.write(tmp_path / "site.json")
    assert SiteSetup.read(tmp_path / "site.json").secure == wanted
    site = worker.Worker(setup)
    request = Request("one", 1, Round(1, 2), train=Message({}, {})).to_message().to_bytes()
    answer = Message.from_bytes(site.work(request, settings(secure_aggregation=asked)))
    masked_alone = "masked updates alone" in answer.meta["dropped"]
    assert masked_alone == (wanted and not asked)


def test_join_takes_the_flag():
    given = {"server": "host:1", "client": 0, "data": "d", "state": "s"}
    assert not SiteOptions(**given).secure_aggregation
    assert replace(SiteOptions(**given), secure_aggregation=True).secure_aggregation
