"""What a receiver makes sure of."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from registry.messages import Message, first_nonfinite

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 17, 59])
def test_the_first_tensor_with_nan_or_infinity_is_named(dtype, bad, place):
    fine = {"a": torch.randn(3, 4), "none": torch.empty(0, 5), "whole": torch.tensor([7]), "one": torch.tensor(1.0)}
    values = torch.randn(60)
    values[place] = bad
    assert first_nonfinite(fine | {"b": values.to(dtype), "c": values}) == "b"
    assert first_nonfinite(fine | {"b": values.nan_to_num(0, 0, 0).to(dtype)}) is None


def test_what_is_large_but_finite_passes():
    limit = torch.finfo(torch.float32).max
    wide = torch.tensor([1e300], dtype=torch.float64)
    assert first_nonfinite({"w": torch.tensor([limit, limit, -limit]), "wide": wide}) is None
    assert first_nonfinite({}) is None
    assert first_nonfinite({"whole": torch.tensor([1]), "empty": torch.empty(0)}) is None


def test_a_tensor_that_is_not_contiguous():
    values = torch.randn(6, 8)
    values[3, 5] = float("nan")
    assert first_nonfinite({"w": values.T}) == "w"
    assert first_nonfinite({"w": values.T[:5]}) is None


KINDS = [*TYPES, torch.int8, torch.int64, torch.bool]
TENSORS = some.dictionaries(
    some.text(some.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda name: name != "__metadata__"),
    some.tuples(some.sampled_from(KINDS), some.lists(some.integers(0, 12), max_size=3)),
    max_size=6,
)
META = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats(allow_nan=False, allow_infinity=False) | some.text(),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(some.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(TENSORS, some.dictionaries(some.text(max_size=8), META, max_size=4))
def test_the_size_of_a_message_is_that_of_its_bytes_and_its_copy_is_what_is_read(kinds, meta):
    tensors = {name: torch.ones(shape).to(kind) for name, (kind, shape) in kinds.items()}
    message = Message(tensors, meta)
    data = message.to_bytes()
    assert message.size() == len(data)
    read, copied = Message.from_bytes(data), message.copy("cpu")
    assert json.dumps(read.meta) == json.dumps(copied.meta)
    assert list(read.tensors) == list(copied.tensors)
    for name, tensor in read.tensors.items():
        own = copied.tensors[name]
        assert own.dtype == tensor.dtype and own.shape == tensor.shape and bool((own == tensor).all())
        assert not own.numel() or own.data_ptr() != tensors[name].data_ptr()


@pytest.mark.parametrize("meta", [{"rate": float("nan")}, {"rate": float("inf")}])
def test_what_json_cannot_say_cannot_be_copied_either(meta):
    for make in (Message({}, meta).to_bytes, Message({}, meta).size, lambda: Message({}, meta).copy("cpu")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            make()
