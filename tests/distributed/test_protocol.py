"""What a request says is what was asked; one that cannot be is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedkdx_plugin.distributed.protocol import Request
from registry.interface import BadMessage, Message, Round


def request() -> Request:
    train = Message({"model.w": torch.arange(3.0)}, {"epsilon": 0.9})
    return Request("one", 4, Round(3, 20, 0.4), state=2, durable=1, train=train, shared={"model.w": torch.arange(3.0)})


def there_and_back(sent: Request) -> Request:
    return Request.from_message(Message.from_bytes(sent.to_message().to_bytes()))


def test_a_request_arrives_as_it_was_sent():
    sent, got = request(), there_and_back(request())
    assert (got.run, got.client, got.round, got.state, got.durable) == ("one", 4, Round(3, 20, 0.4), 2, 1)
    assert got.train.meta == sent.train.meta
    assert torch.equal(got.train.tensors["model.w"], got.shared["model.w"])
    assert there_and_back(replace(sent, train=None, shared=None)) == replace(sent, train=None, shared=None)


@pytest.mark.parametrize(
    "round", [[3, 20], [3, 20, 0.0], [3, 20, 1.5], [3, 20, True], [3, 20, "all"], [3.5, 20, 0.4], [-1, 20, 0.4], 3]
)
def test_a_round_that_cannot_be_is_refused(round):
    message = request().to_message()
    with pytest.raises(BadMessage, match="not a request"):
        Request.from_message(Message(message.tensors, dict(message.meta) | {"round": round}))


def test_another_version_is_told_apart():
    message = request().to_message()
    with pytest.raises(BadMessage, match="speaks protocol 1, this version 2"):
        Request.from_message(Message(message.tensors, dict(message.meta) | {"protocol": 1}))
