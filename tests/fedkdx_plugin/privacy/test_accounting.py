"""The accountants against closed forms, exact integrals and published values, and the noise that a budget takes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from fedkdx_plugin.privacy import accounting
from fedkdx_plugin.privacy.accounting import FIXED, POISSON, Sampling, noise_multiplier, spent
from registry.errors import UserError

EVERYBODY = Sampling(10, 10, FIXED)


def delta_of(epsilon: float, shift: float, deviation: float) -> float:
    """Return δ of a Gaussian mechanism whose neighbours differ by `shift` (Balle and Wang 2018, theorem 8)."""
    one, two = shift / (2 * deviation), epsilon * deviation / shift
    return norm.cdf(one - two) - math.exp(epsilon) * norm.cdf(-one - two)


def hockey_stick(epsilon: float, one, other) -> float:
    """Return ∫ max(one - e^ε other, 0), the smallest δ that goes with ε for two densities on the line."""

    def gap(x: float) -> float:
        return max(one(x) - math.exp(epsilon) * other(x), 0.0)

    return sum(quad(gap, low, low + 1, limit=200)[0] for low in range(-20, 20))


@pytest.mark.parametrize(("noise", "sums"), [(1.0, 1), (5.0, 40), (20.0, 500)])
def test_without_sampling_it_is_the_analytic_gaussian_mechanism(noise, sums):
    """Of a sum of 10 clients clipped to 1, replacing one moves it by 2, and noise of a deviation of 2z is added."""
    epsilon = spent(noise, 1e-5, sums, EVERYBODY)
    assert delta_of(epsilon, 2 * math.sqrt(sums), 2 * noise) == pytest.approx(1e-5, rel=1e-4)


@pytest.mark.parametrize(("rate", "noise"), [(0.1, 1.0), (0.4, 2.0), (0.01, 0.7)])
def test_one_poisson_sample_is_as_its_exact_divergence(rate, noise):
    found = spent(noise, 1e-4, 1, Sampling(1000, rate * 1000, POISSON))

    def without(x: float) -> float:
        return norm.pdf(x, 0, noise)

    def with_one(x: float) -> float:
        return (1 - rate) * norm.pdf(x, 0, noise) + rate * norm.pdf(x, 1, noise)

    exact = max(hockey_stick(found, with_one, without), hockey_stick(found, without, with_one))
    assert 0.99e-4 < exact <= 1.0001e-4  # an upper bound on ε, and a tight one


def test_published_values_of_many_poisson_samples():
    """Abadi et al. 2016: q = 0.01, σ = 4, 10,000 steps is ε = 1.26 by moments; loss distributions are below that.

    So are they for the tutorial of TensorFlow Privacy (60 epochs of MNIST, σ = 1.1, ε = 2.92 by Rényi divergences).
    """
    assert 1.26 * 0.7 < spent(4.0, 1e-5, 10_000, Sampling(60_000, 600, POISSON)) < 1.26
    assert 2.92 * 0.7 < spent(1.1, 1e-5, 14_063, Sampling(60_000, 256, POISSON)) < 2.92


def test_samples_without_replacement_are_as_theorem_27_says():
    """At order 2 the bound is log(1 + q² min(4 (e^r - 1), 2 e^r)), with r = 1/z² the divergence without sampling."""
    for noise, selected in ((1.0, 3), (3.0, 12)):
        orders, divergences = accounting._renyi(noise, Sampling(30, selected, FIXED))
        rate, r = selected / 30, 1 / noise**2
        two = math.log1p(rate**2 * min(4 * math.expm1(r), 2 * math.exp(r)))
        assert divergences[list(orders).index(2)] == pytest.approx(two, rel=1e-9)
        generic = 1 + 3 * rate**2 * min(4 * math.expm1(r), 2 * math.exp(r)) + rate**3 * 2 * math.exp(2 * 1.5 * r)
        assert two < divergences[list(orders).index(3)] <= math.log(generic) / 2


def test_fixed_sampling_counts_a_replacement_as_twice_the_bound():
    """One of two clients is drawn, with updates (1, 0) or (-1, 0): the worst case of replacing one, integrated exactly.

    With the sensitivity of adding or removing one, which is the known mistake, the promise would not hold.
    """
    deviation, delta = 2.0, 1e-3

    def drawn(update: float):
        return lambda x: (norm.pdf(x, update, deviation) + norm.pdf(x, 0, deviation)) / 2

    right = spent(deviation / 2, delta, 1, Sampling(2, 1, FIXED))
    assert hockey_stick(right, drawn(1.0), drawn(-1.0)) < delta
    everybody = Sampling(2, 2, FIXED)
    assert delta_of(spent(deviation / 2, delta, 1, everybody), 2, deviation) == pytest.approx(delta, rel=1e-4)
    assert delta_of(spent(deviation, delta, 1, everybody), 2, deviation) > 10 * delta


@pytest.mark.parametrize("kind", [FIXED, POISSON])
def test_more_of_anything_costs_more(kind):
    def cost(noise=2.0, sums=20, selected=12):
        return spent(noise, 1e-4, sums, Sampling(30, selected, kind))

    assert spent(2.0, 1e-4, 0, Sampling(30, 12, kind)) == 0
    assert cost(noise=3.0) < cost() < cost(sums=21) and cost(selected=6) < cost() < cost(selected=30)
    costs = [cost(selected=selected) for selected in (1, 6, 12, 24, 28, 29, 30)]
    assert costs == sorted(costs)  # also where the bound with sampling is above that without


@pytest.mark.parametrize("sampling", [Sampling(30, 12, FIXED), Sampling(30, 12, POISSON), EVERYBODY])
@pytest.mark.parametrize("epsilon", [0.5, 8.0])
def test_the_noise_is_the_least_that_a_budget_allows(sampling, epsilon):
    noise = noise_multiplier(epsilon, 1e-4, 40, sampling)
    assert spent(noise, 1e-4, 40, sampling) <= epsilon < spent(noise * 0.999, 1e-4, 40, sampling)


def test_fewer_members_of_a_poisson_sample_take_less_noise_than_of_a_fixed_one():
    fixed, poisson = (
        noise_multiplier(8.0, 1e-4, 40, s) * s.sensitivity for s in (Sampling(30, 12, FIXED), Sampling(30, 12, POISSON))
    )
    assert poisson < fixed / 3


def test_a_budget_may_be_too_small():
    with pytest.raises(UserError, match="too small for one round"):
        noise_multiplier(1e-9, 1e-5, 3, Sampling(30, 12, FIXED))
    with pytest.raises(UserError, match="too small for 100000000 rounds"):
        noise_multiplier(1e-3, 1e-5, 10**8, EVERYBODY)


def test_noise_that_drowns_everything_is_refused():
    """By hand, for ε ≈ 0: δ = 2 Φ(1/(2z)) - 1 ≈ 0.3989/z, so that δ = 1e-3 takes z√T⁻¹ = 399 for T rounds.

    All six clients together contribute 6C a round; noise of 399 · 2C is 133 times that, whatever T is. With 100 clients
    it is 8 times, which is not refused. What is left out of δ, ε/2, is 5e-4 of it, and 399 is rounded by 1.5e-4 of it.
    """
    for sums in (1, 2, 50):
        with pytest.raises(UserError, match="the noise would be 133 times all that the run's members can contribute"):
            noise_multiplier(1e-6, 1e-3, sums, Sampling(6, 6, FIXED))
    assert noise_multiplier(1e-6, 1e-3, 4, Sampling(100, 100, FIXED)) == pytest.approx(2 * 399, rel=7e-4)
    accounting.check_useful(1.0, 1e-3, 60.0, 6.0)  # ten times is the limit
    with pytest.raises(UserError, match=r"--epsilon 1 --delta 0\.001: too small, the noise would be 10 times"):
        accounting.check_useful(1.0, 1e-3, 60.1, 6.0)


def test_a_generous_budget_still_has_noise():
    assert noise_multiplier(1e4, 1e-5, 3, Sampling(30, 12, FIXED)) == accounting.LEAST_NOISE
    assert np.isfinite(spent(accounting.LEAST_NOISE, 1e-5, 3, Sampling(30, 12, FIXED)))
