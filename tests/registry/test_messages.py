"""What a receiver makes sure of."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from registry.messages import BadMessage, Message, check_samples, check_variances, first_nonfinite
from registry.text import is_shown_as_it_is

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
    some.text(some.characters(codec="utf-8"), min_size=1, max_size=12).filter(
        lambda name: is_shown_as_it_is(name) and name != "__metadata__"
    ),
    some.tuples(some.sampled_from(KINDS), some.lists(some.integers(0, 12), max_size=3)),
    max_size=6,
)
META = some.recursive(
    some.none()
    | some.booleans()
    | some.integers(-(2**63), 2**63 - 1)
    | some.floats(allow_nan=False, allow_infinity=False)
    | some.text(),
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


def raw(header: object, data: bytes = b"") -> bytes:
    """Make the bytes of a message with this header, as text where it is one."""
    text = header if isinstance(header, str) else json.dumps(header)
    whole = text.encode()
    return len(whole).to_bytes(8, "little") + whole + data


def of_meta(text: str) -> bytes:
    return raw({"__metadata__": {"meta": text}})


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
WRONG = {
    "nothing": (b"", "header"),
    "a length alone": (b"\xff" * 8, "ends within its header"),
    "a long header": ((1 << 25).to_bytes(8, "little") + bytes(1 << 25), "at most 16777216 are allowed"),
    "no JSON": (raw("{"), "not a message"),
    "no mapping": (raw([]), "its header is no mapping"),
    "no metadata": (raw({}), "not a message"),
    "metadata that are no text": (raw({"__metadata__": {"meta": 3}}), "not a message"),
    "metadata that are a list": (of_meta("[]"), "its metadata is no mapping"),
    "NaN": (of_meta('{"rate": NaN}'), "NaN in its metadata"),
    "infinity": (of_meta('{"a": [{"b": -Infinity}]}'), "-Infinity in its metadata"),
    "a number beyond float64": (of_meta('{"rate": 1e999}'), "is not finite"),
    "a whole number beyond 64 bits": (of_meta('{"rate": 18446744073709551616}'), "more than 64 bits"),
    "a whole number of 5,000 digits": (of_meta('{"rate": 1' + "0" * 5000 + "}"), "not a message"),
    "deep metadata": (of_meta('{"a": ' + "[" * 40 + "]" * 40 + "}"), "more than 32 deep"),
    "very deep metadata": (of_meta("[" * 100_000 + "]" * 100_000), "not a message"),
    "an endless empty tensor": (
        raw({"__metadata__": {"meta": "{}"}, "w": EMPTY | {"shape": [0, 2**62, 2**62]}}),
        "tensor 'w' has the shape",
    ),
    "a negative dimension": (raw({"__metadata__": {"meta": "{}"}, "w": EMPTY | {"shape": [-1]}}), "has the shape"),
    "a dimension in letters": (
        raw({"__metadata__": {"meta": "{}"}, "w": EMPTY | {"shape": ["a"]}}),
        "the shape",
    ),
    "a tensor larger than the data": (
        raw({"__metadata__": {"meta": "{}"}, "w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}),
        "has the shape",
    ),
    "a tensor of an unknown type": (
        raw({"__metadata__": {"meta": "{}"}, "w": EMPTY | {"dtype": "F31"}}),
        "not a message",
    ),
    "a name that forges a line": (raw({"__metadata__": {"meta": "{}"}, "a\nerror: b": EMPTY}), "cannot name a tensor"),
}


@pytest.mark.parametrize("what", WRONG)
def test_bytes_that_are_no_message_are_refused_in_one_line(what):
    data, says = WRONG[what]
    with pytest.raises(BadMessage, match=says) as error:
        Message.from_bytes(data)
    assert str(error.value).isprintable() and len(str(error.value)) < 300


HONEST = Message({"a": torch.randn(3, 4), "b": torch.arange(5)}, {"samples": 3, "more": [1.5, {"x": None}]}).to_bytes()


NASTY = [b"9" * 30, b"NaN", b"[", b"-1", b"1e999"]


@settings(max_examples=2000, deadline=None)
@given(some.data())
def test_any_other_bytes_are_a_message_or_refused(data):
    """Cut, overwrite and insert anywhere, mostly in the header: nothing but BadMessage passes."""
    changed = bytearray(HONEST)
    for _ in range(data.draw(some.integers(1, 4))):
        place = data.draw(some.integers(0, len(changed)))
        kind = data.draw(some.sampled_from(["set", "insert", "cut"]))
        new = data.draw(
            some.binary(min_size=1, max_size=6) | some.sampled_from([b"9" * 30, b"NaN", b"[", b"-1", b"1e999"])
        )
        changed[place : place + (0 if kind == "insert" else len(new))] = b"" if kind == "cut" else new
    try:
        read = Message.from_bytes(bytes(changed))
    except BadMessage as error:
        assert str(error).isprintable()
    else:
        assert read.size() == len(read.to_bytes())  # whatever was read can be sent on


@settings(max_examples=500, deadline=None)
@given(some.binary(max_size=200))
def test_random_bytes_are_refused(data):
    with pytest.raises(BadMessage):
        Message.from_bytes(data)


@pytest.mark.parametrize("samples", [0, -1, True, 1.0, None, "7", [1], 10**12 + 1, 2**63 - 1])
def test_samples_out_of_range_are_refused(samples):
    with pytest.raises(BadMessage, match="'samples' must be a whole number from 1 to 1000000000000"):
        check_samples(Message({}, {"samples": samples}))
    assert check_samples(Message({}, {"samples": 10**12})) == 10**12


def test_a_negative_variance_is_refused_by_its_name():
    """Its root would be NaN, and with it every prediction; what rounding leaves of 0 is not meant."""
    state = {"model.bn.running_var": torch.tensor([1.0, 0.0, -1e-8]), "model.bn.running_mean": torch.tensor([-1.0])}
    check_variances(state)
    check_variances({})
    with pytest.raises(BadMessage, match=r"'model.bn.running_var' holds a negative variance"):
        check_variances(state | {"model.bn.running_var": torch.tensor([1.0, -0.1])})
