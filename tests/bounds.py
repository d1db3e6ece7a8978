"""How far a result in floating point may be from the exact one.

Two ways to say it. `gamma` bounds what a known number of roundings comes to, whatever they are. Where results go
through many operations and some of these cancel, `allowances` asks what roundings come to here: the same in float64,
with a random error at each operation (Parker 1997, Monte Carlo Arithmetic).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}  # what one rounding may be off by, of the value
DRAWS = 3  # of random errors
FACTOR = 4  # times the largest of those draws: the largest of one more may be larger, and of other operations too


def gamma(roundings: int, dtype: torch.dtype = torch.float32) -> float:
    """Bound the relative error of a term that is rounded so often (Higham 2002, lemma 3.1).

    A sum of n products, in any order, has n roundings a term: it is off by at most gamma(n) Σ|a_i b_i|.
    """
    return roundings * UNIT[dtype] / (1 - roundings * UNIT[dtype])


def assert_within(found: Tensor, exact: Tensor, allowed: Tensor | float) -> None:
    """Compare in float64, value by value; a NaN is never within."""
    assert found.shape == exact.shape
    off = (found.double() - exact.double()).abs()
    worst = (off / allowed).max() if off.numel() else 0
    assert bool((off <= allowed).all()), f"off by up to {off.max():.3g}, {worst:.3g} times of what is allowed"


class _Rounded(torch.autograd.Function):
    """Add or subtract, at random, a relative error: one on the way forward, another on the way back."""

    @staticmethod
    def forward(ctx, x: Tensor, forth: float, back: float, rng: torch.Generator) -> Tensor:
        ctx.back, ctx.rng = back, rng
        return x + forth * x * _signs(x, rng)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        return g + ctx.back * g * _signs(g, ctx.rng), None, None, None


def _signs(like: Tensor, rng: torch.Generator) -> Tensor:
    return 2 * torch.randint(2, like.shape, generator=rng) - 1


def random_errors(rng: torch.Generator | None) -> Callable[..., Tensor]:
    """Make what puts a tensor off, forward and on the way back, as far as after sums of so many terms in float32."""
    unit = 0.0 if rng is None else UNIT[torch.float32]

    def off(x: Tensor, forth: int = 1, back: int = 1) -> Tensor:
        return _Rounded.apply(x, unit * math.sqrt(forth), unit * math.sqrt(back), rng or torch.Generator())

    return off


def rounded(net: nn.Module, rng: torch.Generator | None) -> nn.Module:
    """Copy a network in float64, so that its operations are as far off as in float32, at random.

    Known are convolutions, linear layers, and batch norm in training, which is taken apart, as its backward cancels.
    A sum of n terms has n roundings, whose errors come to about √n of one; it is made of terms that were rounded, and
    so the operands of an operation are off as much as its result.

    Args:
        net: not changed.
        rng: None: no errors.
    """
    off = random_errors(rng)

    def products(layer: nn.Conv2d | nn.Linear) -> Callable[[Tensor], Tensor]:
        convolution = isinstance(layer, nn.Conv2d)
        operation = torch.nn.functional.conv2d if convolution else torch.nn.functional.linear
        inputs, outputs = layer.weight[0].numel(), layer.weight.numel() // layer.weight.shape[1]

        def forward(x: Tensor) -> Tensor:
            rows = x.numel() // x.shape[1]  # windows, times samples of each
            operands = off(x, inputs, outputs), off(layer.weight, inputs, rows), off(layer.bias, 1, rows)
            return off(operation(*operands), inputs)

        return forward

    def norm(layer: nn.BatchNorm2d) -> Callable[[Tensor], Tensor]:
        def forward(x: Tensor) -> Tensor:
            rows = x.numel() // x.shape[1]
            mean = off(off(x).mean((0, 2, 3), keepdim=True))
            centred = off(off(x) - off(mean))
            variance = off(off(centred).square().mean((0, 2, 3), keepdim=True))
            unbiased = variance * rows / (rows - 1)
            layer.running_mean.lerp_(mean.detach().flatten(), layer.momentum)
            layer.running_var.lerp_(unbiased.detach().flatten(), layer.momentum)
            layer.num_batches_tracked += 1
            scale, shift = (off(p.view(1, -1, 1, 1), 1, rows) for p in (layer.weight, layer.bias))
            return off(off(off(centred) * off((variance + layer.eps).rsqrt())) * scale + shift)

        return forward

    net = copy.deepcopy(net)
    for layer in net.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.forward = products(layer)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.forward = norm(layer)
    return net


def allowances(net: nn.Module, run: Callable[[nn.Module], list[Tensor]]) -> list[float]:
    """Return the largest error allowed in float32 for each tensor that `run` makes with a network in float64."""
    return largest_of_draws(run(copy.deepcopy(net)), lambda rng: run(rounded(net, rng)))


def largest_of_draws(exact: list[Tensor], run: Callable[[torch.Generator | None], list[Tensor]]) -> list[float]:
    """Return such bounds for `run`, which makes random errors by a generator, and none for None."""
    for one, other in zip(run(None), exact, strict=True):  # else all that follows would allow too much
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    rng = torch.Generator().manual_seed(0)
    draws = [run(rng) for _ in range(DRAWS)]
    return [FACTOR * max(_largest(one - other) for one in drawn) for other, *drawn in zip(exact, *draws, strict=True)]


def _largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def is_clear(net: nn.Module, run: Callable[[nn.Module], object]) -> bool:
    """Whether rounding cannot change which values ReLU and pooling let through, where a gradient jumps.

    It can where a value is as close to zero, or to its neighbour, as that value moves by random errors.
    """
    exact, rng = _decisions(copy.deepcopy(net), run), torch.Generator().manual_seed(0)
    for _ in range(DRAWS):
        for one, other in zip(_decisions(rounded(net, rng), run), exact, strict=True):
            moved = _largest((one - other).nan_to_num(0, 0, 0))
            if float(other.abs().min()) <= moved:
                return False
    return True


def _decisions(net: nn.Module, run: Callable[[nn.Module], object]) -> list[Tensor]:
    """Return the input of each ReLU, and the differences of each pair in pooling; infinity for two zeros."""
    seen: list[Tensor] = []

    def relu(_: nn.Module, given: tuple[Tensor], __: Tensor) -> None:
        seen.append(given[0].detach())

    def pool(_: nn.Module, given: tuple[Tensor], __: Tensor) -> None:
        one, other = given[0].detach().unfold(3, 2, 2).unbind(-1)
        seen.append(torch.where(torch.maximum(one, other) > 0, one - other, torch.inf))

    for layer in net.modules():
        if isinstance(layer, nn.ReLU):
            layer.register_forward_hook(relu)
        elif isinstance(layer, nn.MaxPool2d):
            layer.register_forward_hook(pool)
    with torch.no_grad():
        run(net)
    return seen
