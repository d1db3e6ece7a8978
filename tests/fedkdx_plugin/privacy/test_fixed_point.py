"""Fixed-point sums: the stated error, no overflow, what is clipped is counted, and layouts from outside."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedkdx_plugin.privacy.secure_aggregation.fixed_point import (
    MOST_CLIENTS,
    MOST_WEIGHT,
    RANGE,
    Layout,
    fraction_bits,
    largest_error,
)
from registry.messages import BadMessage, Message

LAYOUT = Layout((("a", (3, 2), "float64"), ("b", (), "float64")))


def replies(clients: int, scale: float = 1.0) -> list[Message]:
    rng = torch.Generator().manual_seed(clients)
    weights = torch.randint(1, 200, (clients,), generator=rng).tolist()
    # of float32, so that float64 holds products with weights exactly and the stated bound is the whole error
    made = [{name: scale * torch.randn(shape, generator=rng) for name, shape, _ in LAYOUT.tensors} for _ in weights]
    return [
        Message({name: tensor.double() for name, tensor in own.items()}, {"samples": weight})
        for own, weight in zip(made, weights, strict=True)
    ]


def summed(messages: list[Message]):
    total = np.zeros(LAYOUT.size + 2, dtype=np.uint64)
    for message in messages:
        total += LAYOUT.encode(message.tensors, message.meta["samples"], len(messages))[0]
    return LAYOUT.decode(total, len(messages))


@pytest.mark.parametrize("clients", [1, 2, 3, 10, 100])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_mean_is_within_the_stated_error_of_float64(clients, scale):
    own = replies(clients, scale)
    mean, total = summed(own), sum(message.meta["samples"] for message in own)
    assert mean.reply.meta == {"samples": total} and mean.clipped == 0
    bound = largest_error(clients, total)
    assert bound <= 2.0 ** -(fraction_bits(clients) + 1)  # weights are at least 1
    for name, found in mean.reply.tensors.items():
        exact = sum(message.tensors[name] * message.meta["samples"] for message in own) / total
        assert found.shape == exact.shape
        assert (found - exact).abs().max() <= bound + 4e-16 * scale * 10


def test_the_stated_error_is_reached_up_to_rounding():
    """The bound is no larger than it must be: n clients, each rounded by nearly a half."""
    clients, step = 8, 2.0 ** -fraction_bits(8)
    layout = Layout((("a", (1,), "float64"),))
    value = torch.tensor([0.499 * step], dtype=torch.float64)
    total = sum(layout.encode({"a": value}, 1, clients)[0] for _ in range(clients))
    off = float((layout.decode(total, clients).reply.tensors["a"] - value).abs())
    assert 0.99 * largest_error(clients, clients) < off <= largest_error(clients, clients)


@pytest.mark.parametrize("clients", [1, 2, 3, 4, 5, 64, 65, 1000, MOST_CLIENTS])
def test_a_sum_cannot_overflow(clients):
    """All clients at the largest weight and value, which is the worst case, in whole numbers without a modulus."""
    layout = Layout((("a", (2,), "float64"),))
    for sign in (1, -1):
        value = {"a": torch.full((2,), sign * 1e300, dtype=torch.float64)}
        encoded, clipped = layout.encode(value, MOST_WEIGHT, clients)
        assert clipped == 2
        largest = clients * int(encoded.view(np.int64)[0])
        assert 2**60 < abs(largest) <= 2**62
        total = encoded * np.uint64(clients)
        assert layout.decode(total, clients).reply.tensors["a"].tolist() == [sign * RANGE] * 2
        assert layout.decode(total, clients).clipped == 2 * clients


def test_types_and_shapes_come_back():
    reply = Message(
        {"w": torch.ones(2, 3), "h": torch.ones(2, dtype=torch.float16), "n": torch.ones(0, 4)}, {"samples": 3}
    )
    layout = Layout.of(reply)
    mean = layout.decode(layout.encode(reply.tensors, 3, 1)[0], 1).reply
    for name, tensor in reply.tensors.items():
        assert mean.tensors[name].dtype == tensor.dtype and torch.equal(mean.tensors[name], tensor)


def test_what_is_no_floating_point_is_refused():
    with pytest.raises(BadMessage, match="'count' is of"):
        Layout.of(Message({"count": torch.ones(2, dtype=torch.int64)}))


@pytest.mark.parametrize("weight", [0, -1, MOST_WEIGHT + 1])
def test_weights_out_of_range_are_refused(weight):
    with pytest.raises(ValueError, match="can be summed"):
        LAYOUT.encode(replies(1)[0].tensors, weight, 1)


@pytest.mark.parametrize(
    ("counts", "reason"),
    [((0, 0), "counts"), ((2 * MOST_WEIGHT + 1, 0), "counts"), ((5, 15), "counts"), ((5, -1), "counts")],
)
def test_sums_that_no_clients_have_are_refused(counts, reason):
    total = np.array([0] * LAYOUT.size + list(counts), dtype=np.int64).view(np.uint64)
    with pytest.raises(BadMessage, match=reason):
        LAYOUT.decode(total, 2)


def test_values_that_no_clients_have_are_refused():
    total = np.array([2**62] * LAYOUT.size + [1, 0], dtype=np.int64).view(np.uint64)
    with pytest.raises(BadMessage, match="beyond"):
        LAYOUT.decode(total, 2)


def test_a_layout_arrives_as_it_was_sent():
    assert Layout.from_meta(LAYOUT.to_meta()) == LAYOUT
    assert LAYOUT.zeros().tensors["a"].shape == (3, 2) and not LAYOUT.zeros().tensors["a"].any()


@pytest.mark.parametrize(
    "meta",
    [
        None,
        7,
        [7],
        [["a", [2], "float32", 1]],
        [["a", [2], "int64"]],
        [["a", [2], ["float32"]]],
        [["a", [-1], "float32"]],
        [["a", [2.0], "float32"]],
        [["a", [True], "float32"]],
        [["a", 3, "float32"]],
        [[3, [2], "float32"]],
        [["a", [2**28, 2], "float32"]],
        [["a", [1] * 17, "float32"]],
        [["b", [1], "float32"], ["a", [1], "float32"]],
        [["a", [1], "float32"], ["a", [1], "float32"]],
    ],
)
def test_hostile_layouts_are_refused(meta):
    with pytest.raises(BadMessage, match="layout"):
        Layout.from_meta(meta)


def test_numbers_of_clients_are_bounded():
    for clients in (0, MOST_CLIENTS + 1):
        with pytest.raises(ValueError, match="can be summed"):
            fraction_bits(clients)
