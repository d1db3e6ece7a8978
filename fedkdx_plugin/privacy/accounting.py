"""Accounting of differential privacy: the noise that a budget takes, and the budget that noise has spent.

All noise here is Gaussian, added to a sum of vectors, each clipped to norm C. A noise multiplier z is always the
standard deviation of the noise divided by the L2 sensitivity of that sum, Δ. What Δ is depends on what 'neighbouring'
means, and that depends on how the members of a sum are drawn:

- Poisson: each member takes part by itself with probability q. Neighbours differ in one member that is there or not, so
  Δ = C. Accounted by privacy loss distributions (Koskela et al. 2020, arXiv:1906.03049; Doroshenko et al. 2022,
  arXiv:2207.04380).
- Fixed: m of n members are drawn without replacement. Neighbours differ in one member that is replaced by another, so
  Δ = 2C. Accounted by Rényi differential privacy (Wang et al. 2019, arXiv:1808.00087, theorem 27).

The library's accountants are not of one mind about it: under 'replace one', that for Rényi divergences takes z as
relative to Δ, that for loss distributions as relative to C. Only the former is used here for that relation.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy.optimize import brentq

from registry.errors import UserError

FIXED, POISSON = "fixed", "poisson"
SAMPLINGS = (FIXED, POISSON)
MOST_NOISE = 1e4  # noise multiplier up to which is computed
DROWNED = 10.0  # noise beyond so many times what all members can contribute lets nobody learn even one sign
LEAST_NOISE = 0.2  # that is computed with, which is more than a budget takes whose ε means nothing any more
PRECISION = 1e-4  # of a noise multiplier, relative
INTERVAL = 1e-3  # of the discretised privacy loss, which is rounded up
TINY = 1e-30  # stands for 0 where a logarithm is taken
ORDERS = (*range(2, 33), 40, 48, 64, 96, 128)  # of Rényi divergences; the bound for fixed sampling is for whole ones


@dataclass(frozen=True)
class Sampling:
    """Draw of the members of one sum from all members; members are clients, or examples of a client.

    Attributes:
        members: number n of members; public where the sampling is fixed.
        selected: number m of members that a sum has, in the mean where the sampling is Poisson.
        kind: one of `SAMPLINGS`.
    """

    members: int
    selected: float
    kind: str = FIXED

    @property
    def rate(self) -> float:
        """Return q = m/n."""
        return self.selected / self.members

    @property
    def sensitivity(self) -> int:
        """Return Δ/C: 2 where neighbours replace a member, 1 where they add or remove one."""
        return 2 if self.kind == FIXED else 1

    @property
    def relation(self) -> str:
        """Return in words what the guarantee is about."""
        return "replacing one" if self.kind == FIXED else "adding or removing one"


def spent(noise: float, delta: float, sums: int, sampling: Sampling) -> float:
    """Return ε of (ε, δ)-differential privacy after so many sums.

    Args:
        noise: noise multiplier z, standard deviation over Δ, the same in each sum.
        delta: δ.
        sums: number of sums, one after the other; what the later ones are of may depend on the earlier ones.
        sampling: how the members of each were drawn.
    """
    if not sums:
        return 0.0
    whole = gaussian(noise / sums**0.5, delta)
    if sampling.selected >= sampling.members:
        return whole
    # sampling never costs privacy, but the bound for fixed sampling is loose where nearly all take part
    return min(whole, _sampled(noise, delta, sums, sampling))


@lru_cache(1024)
def noise_multiplier(epsilon: float, delta: float, sums: int, sampling: Sampling) -> float:
    """Return the smallest noise multiplier z with which so many sums stay within (ε, δ).

    Raises:
        UserError: the budget is so small that no useful noise meets it (see `check_useful`).
    """
    if spent(MOST_NOISE, delta, 1, sampling) > epsilon:
        raise UserError(
            f"--epsilon {epsilon:g} --delta {delta:g}: too small for one round, even with noise of {MOST_NOISE:,.0f} "
            "times what a member can contribute; raise --epsilon"
        )
    if spent(MOST_NOISE, delta, sums, sampling) > epsilon:
        raise UserError(
            f"--epsilon {epsilon:g} --delta {delta:g}: too small for {sums} rounds, even with noise of "
            f"{MOST_NOISE:,.0f} times what a member can contribute; take fewer rounds or raise --epsilon"
        )

    def excess(noise: float) -> float:
        return math.log(min(max(spent(noise, delta, sums, sampling), TINY), 1 / TINY) / epsilon)

    noise = least(excess)
    check_useful(epsilon, delta, noise * sampling.sensitivity * sums**0.5, sampling.selected * sums)
    return noise


def check_useful(epsilon: float, delta: float, deviation: float, contributed: float) -> None:
    """Raise UserError where the noise of a run drowns all that could be learned in it.

    The best that members can do for one value is to contribute their whole bound to it, all of them with the same sign
    in every sum. With noise of ten times that total, its sign is right with a probability of Φ(1/10) = 54 %.

    Args:
        epsilon, delta: the budget, for the message.
        deviation: standard deviation of one value of all noise of the run together, in units of a member's bound C.
        contributed: what all members can contribute to that value in the run, in units of C.
    """
    if deviation > DROWNED * contributed:
        raise UserError(
            f"--epsilon {epsilon:g} --delta {delta:g}: too small, the noise would be {deviation / contributed:,.0f} "
            f"times all that the run's members can contribute together, and more than {DROWNED:g} times lets nothing "
            "be learned; raise --epsilon"
        )


def least(excess: Callable[[float], float]) -> float:
    """Return the smallest noise multiplier between `LEAST_NOISE` and `MOST_NOISE` that suffices, up to `PRECISION`.

    Args:
        excess: decreasing function of the noise multiplier, at most 0 where that suffices, as at `MOST_NOISE`.
    """
    low = high = 1.0
    while high < MOST_NOISE and excess(high) > 0:
        low, high = high, min(4 * high, MOST_NOISE)
    while low > LEAST_NOISE and excess(low) <= 0:
        low, high = max(low / 2, LEAST_NOISE), low
    if excess(low) <= 0:
        return low
    found = brentq(lambda logarithm: excess(math.exp(logarithm)), math.log(low), math.log(high), xtol=PRECISION / 4)
    noise = math.exp(found)
    while excess(noise) > 0:  # the root is met from either side
        noise *= 1 + PRECISION / 2
    return noise


def gaussian(noise: float, delta: float) -> float:
    """Return ε of a single Gaussian mechanism, without sampling (Balle and Wang 2018, arXiv:1805.06530, theorem 8).

    T of them with noise z are one with z/√T, exactly.
    """
    from dp_accounting import gaussian_mechanism

    return float(gaussian_mechanism.get_epsilon_gaussian(noise, delta))


@lru_cache(4096)
def _sampled(noise: float, delta: float, sums: int, sampling: Sampling) -> float:
    """Return ε with amplification by sampling."""
    if sampling.kind == FIXED:
        orders, divergences = _renyi(noise, sampling)
        with _library() as library:
            return float(library.rdp.compute_epsilon(orders, divergences * sums, delta)[0])
    with _library() as library:
        event = library.PoissonSampledDpEvent(sampling.rate, library.GaussianDpEvent(noise))
        accountant = library.pld.PLDAccountant(value_discretization_interval=INTERVAL)
        return float(accountant.compose(event, sums).get_epsilon(delta))


@lru_cache(64)
def _renyi(noise: float, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Return orders and the Rényi divergence of each, of one sum whose members were drawn without replacement."""
    with _library() as library:
        event = library.SampledWithoutReplacementDpEvent(
            sampling.members, int(sampling.selected), library.GaussianDpEvent(noise)
        )
        accountant = library.rdp.RdpAccountant(ORDERS, library.NeighboringRelation.REPLACE_ONE)
        accountant.compose(event)
        return np.array(accountant.orders), np.array(accountant.rdp)


def require() -> None:
    """Raise UserError unless the accountants' library is installed."""
    try:
        import dp_accounting  # noqa: F401
    except ImportError:
        raise UserError("--dp: needs the package dp-accounting: pip install 'fedkdx[privacy]'") from None


@contextmanager
def _library() -> Iterator[Any]:
    """Give dp_accounting; it warns of every order that it leaves out, which costs tightness alone."""
    import dp_accounting
    import dp_accounting.pld
    import dp_accounting.rdp

    log = logging.getLogger("absl")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield dp_accounting
    finally:
        log.setLevel(before)
