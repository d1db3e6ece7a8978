"""What a request says is what was asked; one that cannot be is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dataset_utils.scaling import Statistics
from fedkdx_plugin.flower.protocol import Announcement, Request
from registry.interface import BadMessage, Message, Round


def request() -> Request:
    train = Message({"model.w": torch.arange(3.0)}, {"epsilon": 0.9})
    shared = {"model.w": torch.arange(3.0)}
    return Request("one", 4, Round(3, 20, 0.4), state=2, durable=1, train=train, shared=shared, after=2)


def there_and_back(sent: Request) -> Request:
    return Request.from_message(Message.from_bytes(sent.to_message().to_bytes()))


def test_a_request_arrives_as_it_was_sent():
    sent, got = request(), there_and_back(request())
    assert (got.run, got.client, got.round, got.state, got.durable) == ("one", 4, Round(3, 20, 0.4), 2, 1)
    assert got.after == 2
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
    with pytest.raises(BadMessage, match="speaks protocol 1, this version 7"):
        Request.from_message(Message(message.tensors, dict(message.meta) | {"protocol": 1}))


def announcement() -> Announcement:
    """Of 5 windows of 7 samples in 2 channels."""
    own = Statistics(np.array([35, 35]), np.array([0.5, -2.0]), np.array([1.0, 0.0]))
    versions = {"fedkdx": "1"}
    return Announcement(3, 5, 2, (2, 1, 7), ("a", "b"), "made", "test", "federated", versions, own)


def test_statistics_arrive_as_they_were_announced():
    got = Announcement.from_message(Message.from_bytes(announcement().to_message().to_bytes()))
    assert got == announcement()
    for one, other in zip(got.statistics, announcement().statistics, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("count", [35, 34], "other than 35 samples"),
        ("count", [35], "other than 2 channels"),
        ("count", [35.0, 35.0], "other than 35 samples"),
        ("mean", [0.5, float("nan")], "a mean that is no number"),
        ("mean", [0.5, 1e39], "a mean that is no number, or larger"),
        ("mean", [[0.5, 0.5], [0.5, 0.5]], "no numbers"),
        ("variance", [1.0, -1e-9], "negative"),
        ("variance", [1.0, float("inf")], "larger than samples can give"),
        ("variance", None, "without 'variance'"),
    ],
)
def test_statistics_that_cannot_be_are_refused(name, value, text):
    message = announcement().to_message()
    tensors = dict(message.tensors)
    del tensors[f"statistics/{name}"]
    if value is not None:
        tensors[f"statistics/{name}"] = torch.tensor(value)
    with pytest.raises(BadMessage, match=text):
        Announcement.from_message(Message(tensors, message.meta))


def test_a_site_that_is_scaled_otherwise_is_told_so():
    message = announcement().to_message()
    with pytest.raises(BadMessage, match="windows scaled 'client' with statistics"):
        Announcement.from_message(Message(message.tensors, dict(message.meta) | {"scale": "client"}))
    with pytest.raises(BadMessage, match="windows scaled 'federated' without statistics"):
        Announcement.from_message(Message({}, message.meta))
    other = Announcement.from_message(Message({}, dict(message.meta) | {"scale": "client"}))
    assert other.differs(announcement()) == "windows scaled (--scale) client, but the federation has federated"


def test_a_request_brings_the_scaling():
    sent = replace(request(), scaling=announcement().statistics)
    got = there_and_back(sent)
    np.testing.assert_array_equal(got.scaling.mean, [0.5, -2.0])
    assert there_and_back(request()).scaling is None


@pytest.mark.parametrize("name", ["..", "a/b", "", "a\x1bb/"])
def test_a_data_sets_name_that_is_none_is_refused(name):
    message = announcement().to_message()
    with pytest.raises(BadMessage, match="its data cannot be called"):
        Announcement.from_message(Message(message.tensors, dict(message.meta) | {"data": name}))
