"""Whatever one side of secure aggregation sends: one client is named, and the others' sum is right or there is none."""

from __future__ import annotations

import re

import pytest
import torch

from fedkdx_plugin.privacy.secure_aggregation.messages import MASK, SHARE, UNMASK
from registry.messages import BadMessage, Message
from tests.conftest import same_state
from tests.fedkdx_plugin.privacy.room import Room, make_replies


def with_tensor(name, change):
    return lambda message: Message({**message.tensors, name: change(message.tensors[name])}, message.meta)


def flip(tensor: torch.Tensor) -> torch.Tensor:
    return tensor ^ 1


BAD = 6
DAMAGES = {
    "keys of another": ("keys", with_tensor("public", lambda own: own.flip(0).fill_(9)), "none|another"),
    "a key of low order": ("keys", with_tensor("public", torch.zeros_like), "its public keys are none"),
    "one key twice": ("keys", with_tensor("public", lambda own: own[:1].repeat(2, 1)), "twice the same"),
    "keys of another type": ("keys", with_tensor("public", lambda own: own.float()), "torch.float32"),
    "no keys": ("keys", lambda message: Message({}, message.meta), "'public' is missing"),
    "another layout": (
        "keys",
        lambda message: Message(message.tensors, {"layout": [["w", [7], "float32"]]}),
        "other tensors than most",
    ),
    "a layout that is none": ("keys", lambda message: Message(message.tensors, {"layout": "w"}), "layout"),
    "a box too few": (SHARE, with_tensor("boxes", lambda own: own[1:]), "'boxes' is"),
    "short boxes": (SHARE, with_tensor("boxes", lambda own: own[:, 1:]), "'boxes' is"),
    "no digest of its mask": (SHARE, lambda m: Message({n: t for n, t in m.tensors.items() if n != "seed"}), "'seed'"),
    "masked values too few": (MASK, with_tensor("masked", lambda own: own[1:]), "'masked' is"),
    "more than is asked for": (MASK, lambda m: Message({**m.tensors, "more": torch.ones(1)}, m.meta), "'more' is not"),
    "words beside its values": (MASK, lambda m: Message(m.tensors, {**m.meta, "more": 1}), "'more' is not expected"),
    "masked values of a float": (MASK, with_tensor("masked", lambda own: own.double()), "'masked' is"),
    "accuses nonsense": (MASK, lambda message: Message(message.tensors, {"unreadable": [3, 3]}), "'unreadable'"),
    "accuses a text": (MASK, lambda message: Message(message.tensors, {"unreadable": "all"}), "'unreadable'"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_client_that_sends_nonsense_is_named_and_the_others_are_summed(damage):
    step, spoil, reason = DAMAGES[damage]
    room = Room(make_replies(5))
    if step == "keys":
        room.offers[BAD] = spoil(room.offers[BAD])
    else:
        room.spoil[BAD, step] = spoil
    outcome = room.run()
    assert list(outcome.dropped) == [BAD]
    assert re.search(reason, outcome.dropped[BAD]), outcome.dropped
    assert outcome.clients == [0, 3, 9, 12]
    assert same_state(dict(outcome.mean.reply.tensors), room.exact(outcome.clients))


def test_of_two_with_the_same_key_the_second_is_refused():
    room = Room(make_replies(5))
    room.offers[9] = room.offers[3]
    outcome = room.run()
    assert outcome.dropped == {9: "its public keys are those of another, or twice the same"}
    assert outcome.clients == [0, 3, 6, 12]
    assert same_state(dict(outcome.mean.reply.tensors), room.exact(outcome.clients))


def test_a_form_that_the_algorithm_refuses_is_refused():
    def check(id: int, reply: Message) -> None:
        if id == BAD:
            raise BadMessage("tensor 'v' is missing")
        assert reply.meta == {"samples": 1} and reply.tensors["w"].shape == (6,)

    room = Room(make_replies(5))
    room.check = check
    outcome = room.run()
    assert outcome.dropped == {BAD: "tensor 'v' is missing"} and outcome.clients == [0, 3, 9, 12]


@pytest.mark.parametrize("gone", [{}, {12: MASK}])
def test_false_shares_name_their_sender_and_the_sum_is_right(gone):
    room = Room(make_replies(7))
    room.gone = dict(gone)
    room.spoil[BAD, UNMASK] = with_tensor("shares", flip)
    outcome = room.run()
    assert outcome.clients == [id for id in room.replies if id not in gone]
    (note,) = outcome.notes
    assert note.startswith(f"client {BAD}, whose values count: its share of client 0's mask is false")
    assert same_state(dict(outcome.mean.reply.tensors), room.exact(outcome.clients))


def test_shares_of_the_wrong_size_name_their_sender():
    room = Room(make_replies(5))
    room.spoil[BAD, UNMASK] = with_tensor("shares", lambda own: own[:, 1:])
    outcome = room.run()
    assert "whose values count: tensor 'shares' is" in outcome.notes[0] and outcome.mean is not None


@pytest.mark.parametrize("name", ["boxes", "digests"])
def test_a_client_that_deals_false_shares_is_accused_by_all(name):
    """Nobody has a share of its mask, so that its values cannot be unmasked: it is named, and the round has no sum."""
    room = Room(make_replies(5))
    room.spoil[BAD, SHARE] = with_tensor(name, flip)
    outcome = room.run()
    assert outcome.mean is None and list(outcome.dropped) == [BAD]
    assert outcome.undone == f"client {BAD}: the shares that it dealt do not give its mask"
    assert [note for note in outcome.notes if f"dealt to it by client {BAD}" in note]


def test_a_false_share_for_one_alone_does_no_harm():
    room = Room(make_replies(5))

    def spoil(message: Message) -> Message:
        boxes = message.tensors["boxes"].clone()
        boxes[0] ^= 1  # client 0's
        return Message({**message.tensors, "boxes": boxes}, message.meta)

    room.spoil[BAD, SHARE] = spoil
    outcome = room.run()
    assert outcome.notes == [f"client 0 cannot read the shares dealt to it by client {BAD}"]
    assert outcome.clients == list(room.replies) and not outcome.dropped
    assert same_state(dict(outcome.mean.reply.tensors), room.exact(outcome.clients))


def test_shares_of_no_polynomial_name_their_dealer(monkeypatch):
    """A client that deals shares of another seed than it masks with, each of them as its digest says."""
    room = Room(make_replies(5))
    party = room.parties[BAD]
    answer = party.answer

    def lie(step: str, request: Message) -> Message:
        result = answer(step, request)
        if step == SHARE:
            party._seed = bytes(32)
        return result

    monkeypatch.setattr(party, "answer", lie)
    monkeypatch.setattr(room, "spoil", {(BAD, SHARE): with_tensor("seed", lambda own: torch.zeros_like(own))})
    outcome = room.run()
    assert outcome.mean is None and outcome.undone.startswith(f"client {BAD}: the shares")


def test_a_sum_that_honest_clients_cannot_have_is_none():
    """Nobody can see who has added it; a client that stays within the bounds can add what it likes."""
    room = Room(make_replies(5))
    room.spoil[BAD, MASK] = with_tensor("masked", lambda own: own + 2**40)
    outcome = room.run()
    assert outcome.mean is None and outcome.undone.endswith("sent something else than its reply")


REQUESTS = {
    "a step too early": (MASK, {"clients": [0, 3, 6]}, {}, "not what comes next"),
    "a step that there is not": ("sum", {"clients": [0, 3, 6]}, {}, "not what comes next"),
    "more than is needed": (SHARE, {"clients": [0, 3], "least": 1}, {}, "'least' is not expected"),
    "no clients": (SHARE, {}, {}, "no list of clients"),
    "without this one": (SHARE, {"clients": [3, 6]}, {"public": torch.zeros(2, 2, 32, dtype=torch.uint8)}, "with it"),
    "this one alone": (SHARE, {"clients": [0]}, {"public": torch.zeros(1, 2, 32, dtype=torch.uint8)}, "at least 2"),
    "clients in disorder": (SHARE, {"clients": [3, 0]}, {}, "in their order"),
    "keys too few": (SHARE, {"clients": [0, 3]}, {"public": torch.zeros(1, 2, 32, dtype=torch.uint8)}, "'public' is"),
    "the same keys": (SHARE, {"clients": [0, 3]}, {"public": torch.zeros(2, 2, 32, dtype=torch.uint8)}, "are the same"),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_a_client_refuses_requests_that_no_honest_server_sends(case):
    step, meta, tensors, reason = REQUESTS[case]
    party = Room(make_replies(3)).parties[0]
    with pytest.raises(BadMessage, match=reason):
        party.answer(step, Message(tensors, meta))


@pytest.mark.parametrize(
    ("step", "clients", "reason"),
    [
        (MASK, [0, 3, 6, 9, 12, 15], "dealt no shares"),
        (MASK, [0, 3], "at least 4"),
        (UNMASK, [0, 3], "at least 4"),
        (UNMASK, [3, 6, 9, 12], "with it"),
        (UNMASK, [0, 3, 6, 9, 12, 15], "sent no masked values"),
    ],
)
def test_a_client_refuses_sums_of_too_few_or_of_others(step, clients, reason):
    room = Room(make_replies(5))
    refused = {}
    ask = room.ask

    def ask_otherwise(asked, requests):
        if asked == step:
            requests = requests | {0: Message(requests[0].tensors, {"clients": clients})}
        answers = ask(asked, requests)
        refused.update({id: answer for id, answer in answers.items() if isinstance(answer, str)})
        return answers

    room.ask = ask_otherwise
    outcome = room.run()
    assert list(refused) == [0] and reason in refused[0]
    assert outcome.mean is not None


def test_a_low_order_key_passed_on_to_a_client_is_refused():
    room = Room(make_replies(3))
    public = torch.zeros(2, 2, 32, dtype=torch.uint8)
    public[0] = room.offers[0].tensors["public"]
    public[1, 1, 0] = 1  # of low order, as 0 is
    with pytest.raises(BadMessage, match="client 3's public keys are none"):
        room.parties[0].answer(SHARE, Message({"public": public}, {"clients": [0, 3]}))
