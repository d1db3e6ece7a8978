"""The codec over the whole range of float32: error, bytes, energy and rates, against float64 or exact sums."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from fedkdx_plugin.algorithm.compression import compress, compress_like, decompress
from fedkdx_plugin.algorithm.fedkdx import FedKDX
from fedkdx_plugin.algorithm.measures import energy_kept
from fedkdx_plugin.algorithm.student import LEAST_RATE, MOST_RATE
from registry.interface import BadMessage, Message, Round
from tests.conftest import make_federation

FLOAT = torch.finfo(torch.float32)
SHAPES = [(24, 30), (30, 24), (8, 100), (40, 3, 1, 5), (2, 3), (1, 400), (60, 60)]
VALUES = some.floats(allow_nan=False, allow_infinity=False, width=32)


def made(shape, seed, exponent, decay, dtype=torch.float32):
    """Make a matrix whose singular values fall as 1/j^decay and whose largest entry is about 2^exponent."""
    rng = torch.Generator().manual_seed(seed)
    rows, columns = shape[0], math.prod(shape[1:])
    left, right = (torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=rng)).Q for n in (rows, columns))
    rank = min(rows, columns)
    whole = left[:, :rank] * torch.arange(1, rank + 1, dtype=torch.float64) ** -decay @ right[:rank]
    whole = (whole / whole.abs().max()).clamp(-1, 1)
    largest = torch.finfo(dtype).max
    return (whole * 2.0**exponent).clamp(-largest, largest).to(dtype).reshape(shape)


def wide(shape, seed):
    """Make a matrix each of whose values has its own exponent, from the smallest to the largest of float32."""
    rng = torch.Generator().manual_seed(seed)
    exponents = torch.rand(shape, dtype=torch.float64, generator=rng) * 277 - 149
    signs = torch.randn(shape, dtype=torch.float64, generator=rng).sign()
    return (signs * 2.0**exponents).clamp(-FLOAT.max, FLOAT.max).float()


def quantising_adds(payload, name):
    """Return a bound in the Frobenius norm on what half a step in each entry of U and V does, a sum of rank-1 parts."""
    left, sizes, right = (payload[f"{name}.{end}"].double() for end in "USV")
    off = 0.5 * math.sqrt(len(left)), 0.5 * math.sqrt(right.shape[1])
    norms = torch.linalg.vector_norm(left, dim=0), torch.linalg.vector_norm(right, dim=1)
    return float((sizes * (off[0] * norms[1] + off[1] * norms[0] + off[0] * off[1])).sum())


def check_error(tensor, epsilon, quantise):
    """Check the bound of `compress` in float64; return whether factors were sent."""
    payload = compress({"w": tensor}, epsilon, quantise).payload
    restored = decompress(payload, {"w": tensor.shape})["w"]
    assert restored.dtype == tensor.dtype and bool(restored.isfinite().all())
    if "w" in payload:
        assert torch.equal(restored, tensor)
        return False
    norm = torch.linalg.vector_norm(tensor.double())
    error = torch.linalg.vector_norm(restored.double() - tensor.double())
    rounding = 8 * torch.finfo(tensor.dtype).eps  # of U, Σ and V, and of the sums of their product
    bound = math.sqrt(1 - epsilon) + rounding
    # what is added to the factors is at right angles to nothing in particular, hence the sum
    more = 1.1 * quantising_adds(payload, "w") if quantise else 0.0
    assert float(error) <= bound * float(norm) + more
    return True


@settings(max_examples=300, deadline=None)
@given(
    some.sampled_from(SHAPES),
    some.integers(0, 99),
    some.floats(-149, 128),
    some.sampled_from([0.3, 1.0, 3.0]),
    some.sampled_from([0.0, 0.5, 0.9, 0.98, 0.9999]),
    some.booleans(),
)
def test_whatever_is_finite_comes_back_finite_and_within_its_error(shape, seed, exponent, decay, epsilon, quantise):
    check_error(made(shape, seed, exponent, decay), epsilon, quantise)


@settings(max_examples=200, deadline=None)
@given(some.sampled_from(SHAPES), some.integers(0, 999), some.sampled_from([0.0, 0.9, 0.9999]), some.booleans())
def test_values_of_all_sizes_in_one_matrix(shape, seed, epsilon, quantise):
    check_error(wide(shape, seed), epsilon, quantise)


@pytest.mark.parametrize("quantise", [False, True])
def test_factors_are_sent_from_1e_26_to_1e37_and_what_is_beyond_goes_whole(quantise):
    sent = {
        value: check_error(made((24, 30), 1, math.log2(value), 2.0), 0.9, quantise)
        for value in (1e-45, 1e-38, 1e-32, 1e-26, 1.0, 1e37, 3.4e38)
    }
    assert [value for value, factors in sent.items() if factors] == [1e-26, 1.0, 1e37]


@pytest.mark.parametrize("value", [3.4e38, -3.4e38, 1e-38, 1e-45])
def test_eight_bits_near_the_ends_of_the_range(value):
    """All entries alike: quantised, they overflowed above and vanished below."""
    full = torch.full((20, 30), value)
    restored = decompress(compress({"w": full}, 0.9, True).payload, {"w": full.shape})["w"]
    torch.testing.assert_close(restored, full, rtol=0.01, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("quantise", [False, True])
def test_other_types_at_their_own_ends(dtype, quantise):
    limits = torch.finfo(dtype)
    smallest, largest = (math.frexp(value)[1] for value in (limits.smallest_normal, limits.max))
    for exponent in (smallest, smallest // 2, 0, largest // 2, largest - 1):
        check_error(made((24, 30), 2, exponent, 2.0, dtype), 0.9, quantise)


def test_a_spectrum_of_nan_goes_whole_with_eight_bits_too(monkeypatch):
    from fedkdx_plugin.algorithm import compression

    nan = torch.full((1, 24), math.nan), torch.full((1, 24, 24), math.nan)
    monkeypatch.setattr(compression, "METHODS", [lambda matrices: nan])
    tensor = made((24, 30), 0, 0, 2.0)
    assert torch.equal(compress({"w": tensor}, 0.9, True).payload["w"], tensor)


NAMES = some.from_regex(r"[a-z]{1,9}(\.[a-z0-9_]{1,12}){0,4}(\.(weight|U|S|V|dense))?", fullmatch=True)
SIZES = some.tuples(some.integers(1, 40), some.integers(1, 12), some.integers(1, 5)) | some.tuples(
    *[some.integers(1, 40)] * 2
)


@settings(max_examples=300, deadline=None)
@given(
    some.dictionaries(NAMES, SIZES, min_size=1, max_size=6),
    some.sampled_from([torch.float16, torch.float32, torch.float64]),
    some.sampled_from([0.5, 0.9]),
    some.booleans(),
    some.sampled_from(["", "12345678/"]),
)
def test_a_compressed_message_is_never_larger(shapes, dtype, epsilon, quantise, label):
    tensors = {name: made(shape, 3, 6, 2.0, dtype) for name, shape in shapes.items()}
    payloads = compress(tensors, epsilon, quantise).payload, compress(tensors, 1.0).payload
    small, whole = (Message({label + name: t for name, t in own.items()}) for own in payloads)
    assert len(small.to_bytes()) <= len(whole.to_bytes())


def test_a_matrix_of_48_values_is_sent_as_it_is():
    """192 bytes; as factors of rank 1 and 8 bits 18, and 130 more in the header."""
    tensor = torch.outer(torch.arange(1.0, 7), torch.arange(1.0, 9))
    assert list(compress({"student.w": tensor}, 0.9, True).payload) == ["student.w"]


def exact(values):
    return sum(Fraction(value) ** 2 for value in values)


@settings(max_examples=300, deadline=None)
@given(
    some.lists(VALUES, max_size=6),
    some.lists(VALUES, max_size=6),
    some.sampled_from([torch.float32, torch.float64]),
    some.sampled_from([0, -1074, -700, 700, 895]),
)
def test_the_energy_kept_is_that_of_exact_sums(kept, lost, dtype, exponent):
    """In float64 far beyond the range in which squares are numbers, too."""
    factor = 2.0**exponent if dtype == torch.float64 else 1.0
    sent, rest = ([value * factor for value in values] for values in (kept, lost))
    tensors = {"a": torch.tensor(sent, dtype=dtype), "b": torch.tensor(rest, dtype=dtype)}
    whole = exact(tensors["a"].tolist()) + exact(tensors["b"].tolist())
    found = float(energy_kept({"a": tensors["a"]}, tensors))
    expected = float(exact(tensors["a"].tolist()) / whole) if whole else 1.0
    assert 0 <= found <= 1 and found == pytest.approx(expected, rel=1e-12, abs=1e-290)


@pytest.mark.parametrize("quantise", [False, True])
@pytest.mark.parametrize("exponent", [-149, -126, -90, 0, 100, 127.99])
def test_the_energy_kept_of_factors(exponent, quantise):
    tensors = {"w": made((24, 30), 4, exponent, 1.0), "zero": torch.zeros(24, 30), "b": torch.zeros(3)}
    payload = compress(tensors, 0.9, quantise).payload
    restored = decompress(payload, {name: t.shape for name, t in tensors.items()})["w"].double()
    expected = float(restored.square().sum() / tensors["w"].double().square().sum())
    assert float(energy_kept(payload, tensors)) == pytest.approx(min(expected, 1), rel=0.01 if quantise else 1e-6)
    assert float(energy_kept({}, {"zero": tensors["zero"]})) == 1 == float(energy_kept({}, {}))


def replies(start, rates, change):
    """Make a reply for each rate, all asking for the same change."""
    return {
        id: Message(
            {name: torch.full_like(t, change / rate) for name, t in start.items()}, {"samples": 5, "rate": rate}
        )
        for id, rate in enumerate(rates)
    }


@pytest.mark.parametrize("rates", [[0.01] * 4, [MOST_RATE, 0.01, 0.01, 0.01], [LEAST_RATE * 2**40, 0.01, 1.0, 100.0]])
@pytest.mark.parametrize("change", [-1e-3, -1e-7])  # below 0, for the sake of running variances
def test_no_rate_that_is_accepted_takes_digits_from_the_round(rates, change):
    server = make_federation(FedKDX, params={"epsilon_start": 1.0, "epsilon_end": 1.0}).server
    server.weights = {name: torch.zeros_like(t) for name, t in server.weights.items()}
    sent = replies(server.weights, rates, change)
    for id, reply in sent.items():
        server.check_reply(id, reply)
    server.aggregate(sent, Round(1, 2))
    for tensor in server.weights.values():
        torch.testing.assert_close(tensor.double(), torch.full_like(tensor, -change).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rate", [1e38, 2.0**65, LEAST_RATE / 2, 0, -1.0, True, "0.1", None, 10**400])
def test_rates_that_no_client_can_have_are_refused(rate):
    """At 1e38, a change of 0.001 by all four becomes a gradient of 4e-41, which has four digits less."""
    server = make_federation(FedKDX).server
    reply = Message({name: torch.zeros_like(t) for name, t in server.weights.items()}, {"samples": 5, "rate": rate})
    with pytest.raises(BadMessage, match=r"'rate' must be a number from 1\.18e-38 to 1\.84e\+19, not "):
        server.check_reply(0, reply)


def test_a_payload_like_another_has_its_size():
    one, other = ({"w": made((24, 30), seed, 0, 2.0), "b": torch.ones(3)} for seed in (1, 2))
    payload = compress(one, 0.9, True).payload
    assert Message(compress_like(payload, other)).size() == Message(payload).size()
