"""Any message in place of one of secure aggregation's: no error but BadMessage, and no sum but the right one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from fedkdx_plugin.flower.secure import Step, StepAnswer
from fedkdx_plugin.privacy.secure_aggregation.messages import MASK, SHARE, STEPS, UNMASK
from registry.messages import BadMessage, Message
from tests.conftest import same_state
from tests.fedkdx_plugin.privacy.room import Room, make_replies

JSON = some.recursive(
    some.none() | some.booleans() | some.integers(-2, 2**62) | some.floats(allow_nan=False, allow_infinity=False)
    | some.text(max_size=5) | some.lists(some.integers(0, 12), max_size=5),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)  # fmt: skip
TENSORS = some.sampled_from(
    [
        torch.zeros(0),
        torch.zeros(4, 33, dtype=torch.uint8),
        torch.full((2, 32), 7, dtype=torch.uint8),
        torch.zeros(10, dtype=torch.int64),
        torch.ones(10),
        torch.tensor(True),
    ]
)
NAMES = ("public", "boxes", "digests", "seed", "masked", "shares", "layout", "clients", "unreadable", "other")
ONCE = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def changed(draw: Any, message: Message) -> Message:
    """Return a message with a tensor or an entry of its metadata replaced, added or taken away."""
    tensors, meta = dict(message.tensors), dict(message.meta)
    name = draw(some.sampled_from(sorted({*tensors, *meta}) or NAMES) | some.sampled_from(NAMES))
    what = draw(some.sampled_from(["value", "tensor", "gone", "bytes"]))
    if what == "value":
        meta[name] = draw(JSON)
    elif what == "tensor":
        tensors[name] = draw(TENSORS)
    elif what == "gone":
        tensors.pop(name, None), meta.pop(name, None)
    elif name in tensors and tensors[name].numel():
        tensors[name] = tensors[name].clone()
        place = draw(some.integers(0, tensors[name].numel() - 1))
        tensors[name].view(-1)[place] ^= 1
    return Message(tensors, meta)


@ONCE
@given(data=some.data())
def test_whatever_a_client_sends_there_is_no_wrong_sum(data):
    """It is named, or no sum is had, or its values count as it sent them: those of all others are never changed."""
    room = Room(make_replies(4, size=2))
    step = data.draw(some.sampled_from(["keys", SHARE, UNMASK, MASK]))
    if step == "keys":
        room.offers[6] = changed(data.draw, room.offers[6])
    else:
        room.spoil[6, step] = lambda message: changed(data.draw, message)
    outcome = room.run()
    assert (outcome.mean is None) == bool(outcome.undone)
    sent = room.answers.get((6, MASK))
    honest = sent is None or step != MASK or 6 not in outcome.clients
    if outcome.mean and honest:
        assert same_state(dict(outcome.mean.reply.tensors), room.exact(outcome.clients))


@pytest.mark.parametrize("step", STEPS)
@ONCE
@given(data=some.data())
def test_whatever_a_server_asks_for_a_client_answers_or_refuses(step, data):
    room = Room(make_replies(3, size=2))
    ask, done = room.ask, []

    def otherwise(asked, requests):
        if asked == step:
            try:
                room.parties[0].answer(step, changed(data.draw, requests[0]))
            except BadMessage as error:
                assert str(error).isprintable()
            done.append(step)
            requests = {id: request for id, request in requests.items() if id != 0}
        return ask(asked, requests)

    room.ask = otherwise
    room.run()
    assert done == [step]


@ONCE
@given(data=some.data())
def test_whatever_is_no_step_is_none(data):
    step = Step("run", 1, 2, MASK, Message({"boxes": torch.ones(2, 3, dtype=torch.uint8)}, {"clients": [1, 2]}))
    answer = StepAnswer(1, 2, MASK, Message({"masked": torch.zeros(3, dtype=torch.int64)}, {"unreadable": []}))
    for message, read in (
        (step.to_message(), Step.from_message),
        (answer.to_message(), lambda found: StepAnswer.from_message(found, step)),
    ):
        meta = dict(message.meta)
        key = data.draw(some.sampled_from(sorted(meta)))
        if data.draw(some.booleans()):
            meta[key] = data.draw(JSON)
        else:
            del meta[key]
        try:
            read(Message(message.tensors, meta))
        except BadMessage as error:
            assert str(error).isprintable()
