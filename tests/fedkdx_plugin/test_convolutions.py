"""Compiled convolutions, each value within what its own roundings can come to."""

from __future__ import annotations

import ctypes
import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv1d, pad

from fedkdx_plugin.native import library
from tests.bounds import assert_within, gamma

compiled = pytest.mark.skipif(library.operations() is None, reason="no C compiler here")

# F(3, 3) at 0, 1, -1, 2 and infinity: results = A (G taps * B samples)
A = torch.tensor([[1, 1, 1, 1, 0], [0, 1, -1, 2, 0], [0, 1, 1, 4, 1]]).double()
G = torch.tensor([[3, 0, 0], [-3, -3, -3], [-1, 1, -1], [1, 2, 4], [0, 0, 6]]).double() / 6
B = torch.tensor([[2, -1, -2, 1, 0], [0, -2, -1, 1, 0], [0, 2, -3, 1, 0], [0, -1, 0, 1, 0], [0, 2, -1, -2, 1]]).double()
TRANSFORMS = 12  # roundings beside those of the sum of products: at most 3 to 5 in each transform, and the product's

Given = tuple[Tensor, Tensor, Tensor, Tensor]  # x (n, time, inputs), weight (filters, taps, inputs), bias, g as results


def given(n: int, time: int, inputs: int, filters: int, taps: int, seed: int = 0) -> Given:
    rng = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(n, t, c, generator=rng) for t, c in ((time, inputs), (time - taps + 1, filters)))
    weight, bias = torch.randn(filters, taps, inputs, generator=rng), torch.randn(filters, generator=rng)
    return x, weight / math.sqrt(taps * inputs), bias, g


def compiled_ones(winograd: bool, x: Tensor, weight: Tensor, bias: Tensor, g: Tensor) -> list[Tensor]:
    """Results, and gradients by x and weight."""
    (n, time, inputs), (filters, taps, _) = x.shape, weight.shape
    ours, sizes, kernel = library.operations(), (n, time, inputs), (taps, filters)
    out, by_x, by_weight = (torch.full_like(like, torch.nan) for like in (g, x, weight))
    if winograd:
        scratch = torch.empty(_call(ours.winograd_scratch, n, time, inputs, taps, filters))
        forth, back = ours.winograd_convolve, ours.winograd_convolve_backward
    else:
        scratch, g = torch.empty(taps * inputs * filters), pad(g, (0, 0, taps - 1, taps - 1))
        forth, back = ours.convolve, ours.convolve_backward
    _call(forth, x, *sizes, weight, bias, *kernel, scratch, out)
    _call(back, x, g, *sizes, weight, *kernel, scratch, by_x, by_weight)
    return [out, by_x, by_weight]


def _call(function: ctypes._CFuncPtr, *arguments: Tensor | int) -> int:
    function.restype = ctypes.c_ssize_t
    return function(
        *(ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else ctypes.c_ssize_t(a) for a in arguments)
    )


def exact(x: Tensor, weight: Tensor, bias: Tensor, g: Tensor) -> list[Tensor]:
    """Compute the same by PyTorch, in float64."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    out = conv1d(x.transpose(1, 2), weight.transpose(1, 2), bias.double()).transpose(1, 2)
    out.backward(g.double())
    return [out.detach(), x.grad, weight.grad]


def bounds_of_direct(x: Tensor, weight: Tensor, bias: Tensor, g: Tensor) -> list[Tensor]:
    """γ(n) Σ|a b| for sums of n products; the bias is one more term."""
    (n, after, filters), (_, taps, inputs) = g.shape, weight.shape
    sums = exact(*(part.abs() for part in (x, weight, bias, g)))
    return [gamma(k) * s for k, s in zip((taps * inputs + 1, taps * filters, n * after), sums, strict=True)]


def bounds_of_winograd(x: Tensor, weight: Tensor, bias: Tensor, g: Tensor) -> list[Tensor]:
    """γ(n + TRANSFORMS) times what its formula comes to with the absolute values of all that it adds and multiplies.

    That is the bound of Barabasz et al. 2020 (doi:10.1145/3412380), theorem 1, for several channels and groups of taps.
    """
    (n, time, inputs), (filters, taps, _), after = x.shape, weight.shape, g.shape[1]
    x, g = x.abs().double().requires_grad_(), g.abs().double()
    weight = weight.abs().double().requires_grad_()
    groups, tiles = taps // 3, -(-after // 3)
    rows = tiles + groups - 1
    samples = pad(x, (0, 0, 0, 3 * rows + 2 - time)).unfold(1, 5, 3) @ B.abs().T  # (n, rows, inputs, points)
    points = weight.view(filters, groups, 3, inputs).transpose(2, 3) @ G.abs().T  # (filters, groups, inputs, points)
    seen = samples.unfold(1, groups, 1)  # (n, tiles, inputs, points, groups)
    results = torch.einsum("ntcpg,fgcp->ntpf", seen, points)
    out = torch.einsum("rp,ntpf->ntrf", A.abs(), results).reshape(n, 3 * tiles, filters)[:, :after]
    out.backward(g)
    terms = groups * inputs, groups * filters, n * rows
    sums = out.detach() + bias.abs().double(), x.grad, weight.grad
    return [gamma(k + TRANSFORMS) * s for k, s in zip(terms, sums, strict=True)]


def test_the_transforms_are_a_convolution_exactly():
    """In fractions, for a tap and a sample at a time, as all is linear in both."""
    for tap in range(3):
        for sample in range(5):
            for result in range(3):
                terms = zip(A[result].tolist(), (6 * G[:, tap]).tolist(), B[:, sample].tolist(), strict=True)
                total = sum(Fraction(a) * round(g) / 6 * Fraction(b) for a, g, b in terms)
                assert total == (result + tap == sample)
    random = A.square() @ (G.square().sum(1) * B.square().sum(1))  # squares of random errors, where direct ones are 9
    assert float(random.mean() / 9) == pytest.approx(2)


@compiled
@pytest.mark.parametrize("taps", [1, 3, 5, 9])
@pytest.mark.parametrize(("n", "after"), [(1, 1), (2, 3), (9, 17), (17, 92)])
@pytest.mark.parametrize(("inputs", "filters"), [(16, 16), (32, 48), (256, 16)])
def test_direct_products_are_within_their_bound(taps, n, after, inputs, filters, processor):
    all_given = given(n, after + taps - 1, inputs, filters, taps)
    for found, value, bound in zip(
        compiled_ones(False, *all_given), exact(*all_given), bounds_of_direct(*all_given), strict=True
    ):
        assert_within(found, value, bound)


@compiled
@pytest.mark.parametrize("taps", [3, 6, 9, 15])
@pytest.mark.parametrize(("n", "after"), [(1, 1), (1, 2), (2, 3), (9, 16), (9, 17), (17, 93)])
@pytest.mark.parametrize(("inputs", "filters"), [(16, 16), (32, 48), (256, 16), (16, 256)])
def test_winograds_products_are_within_theirs(taps, n, after, inputs, filters, processor):
    """Whole windows at work and the rest of them, tiles that end with a window and beyond it."""
    all_given = given(n, after + taps - 1, inputs, filters, taps)
    for found, value, bound in zip(
        compiled_ones(True, *all_given), exact(*all_given), bounds_of_winograd(*all_given), strict=True
    ):
        assert_within(found, value, bound)


def off(found: list[Tensor], expected: list[Tensor]) -> Tensor:
    """How far results and gradients are off, in the norm."""
    return torch.stack([(one - other).norm() / other.norm() for one, other in zip(found, expected, strict=True)])


@compiled
@pytest.mark.parametrize("inputs", [16, 64, 256])
@pytest.mark.parametrize("taps", [3, 9, 15])
@pytest.mark.parametrize(("n", "after"), [(1, 48), (2, 24), (8, 6), (48, 1), (16, 3), (33, 92)])
def test_where_winograds_are_taken_they_lose_a_bit_at_most(inputs, taps, n, after, processor):
    """In the norm twice the error of direct products, and a tenth for what draws of 6000 values and more may differ."""
    ours = library.operations()
    assert _call(ours.winograd_takes, n, after + taps - 1, inputs, taps)
    draws = []
    for seed in range(4):
        all_given = given(n, after + taps - 1, inputs, 32, taps, seed)
        expected = exact(*all_given)
        draws.append(torch.stack([off(compiled_ones(winograd, *all_given), expected) for winograd in (True, False)]))
    winograd, direct = torch.stack(draws).square().mean(0).sqrt()
    assert (winograd <= 2.2 * direct).all(), winograd / direct


@compiled
def test_direct_products_are_taken_where_winograds_would_lose_more_or_do_not_fit():
    takes = library.operations().winograd_takes
    assert _call(takes, 2, 24 + 8, 16, 9) and not _call(takes, 1, 47 + 8, 16, 9)  # terms
    assert not _call(takes, 8, 100, 15, 9) and not _call(takes, 8, 100, 16, 8)  # inputs, taps
