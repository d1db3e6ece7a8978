"""Figures of attacks, against scikit-learn and against counting."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from fedkdx_plugin.privacy.audit import rates


def made(n: int, seed: int, ties: bool):
    rng = np.random.default_rng(seed)
    member = rng.random(n) < 0.4
    scores = rng.normal(size=n) + 0.7 * member
    return (scores.round(1) if ties else scores), member


@pytest.mark.parametrize("ties", [False, True])
def test_the_area_is_that_of_scikit_learn(ties):
    scores, member = made(300, 0, ties)
    assert rates.area(rates.curve(scores, member)) == pytest.approx(roc_auc_score(member, scores), abs=1e-12)


@pytest.mark.parametrize("ties", [False, True])
def test_advantage_and_few_false_positives_are_those_of_every_threshold(ties):
    scores, member = made(250, 1, ties)
    found = rates.curve(scores, member)
    every = [((scores >= t)[member].mean(), (scores >= t)[~member].mean()) for t in [*scores, math.inf]]
    assert rates.advantage(found) == pytest.approx(max(true - false for true, false in every), abs=1e-12)
    for few in (0.0, 0.01, 0.1):
        assert rates.at(found, few) == pytest.approx(max(true for true, false in every if false <= few), abs=1e-12)


def test_a_weight_counts_a_window_so_many_times():
    scores, member = made(60, 2, True)
    weights = np.random.default_rng(3).integers(0, 4, 60)
    whole = rates.curve(np.repeat(scores, weights), np.repeat(member, weights))
    weighted = rates.curve(scores, member, weights)
    assert rates.area(weighted) == pytest.approx(rates.area(whole), abs=1e-12)
    assert rates.advantage(weighted) == pytest.approx(rates.advantage(whole), abs=1e-12)


def test_scores_that_say_nothing_are_within_the_bounds_of_chance():
    rng = np.random.default_rng(4)
    member = np.arange(2000) < 900
    found = rates.area(rates.curve(rng.normal(size=2000), member))
    assert abs(found - 0.5) < 5 * math.sqrt(2001 / (12 * 900 * 1100))  # of the Mann-Whitney statistic


def test_an_interval_holds_the_value_and_is_wider_for_few_clients():
    scores, member = made(400, 5, False)
    many, few = (rates.figures(scores, member, np.arange(400) % k, np.random.default_rng(0))["auc"] for k in (100, 4))
    assert many.low < many.value < many.high
    shifted = scores + 2.0 * (np.arange(400) % 4 == 0) * member  # one client is found far more easily
    apart = rates.figures(shifted, member, np.arange(400) % 4, np.random.default_rng(0))["auc"]
    assert apart.high - apart.low > few.high - few.low


def test_a_rate_that_too_few_windows_cannot_tell_is_no_number():
    scores, member = made(300, 6, False)
    found = rates.figures(scores, member, np.arange(300) % 5, np.random.default_rng(0))
    assert not math.isnan(found["tpr_0.01"].value)
    assert math.isnan(found["tpr_0.001"].value)


def test_the_mean_weighs_values_and_draws_clients():
    values, clients = np.array([1.0, 1.0, 1.0, 0.0]), np.array([0, 0, 0, 1])
    found = rates.mean(values, clients, np.random.default_rng(0))
    assert found.value == 0.75
    assert (found.low, found.high) == (0.0, 1.0)  # each of both clients is drawn twice now and then


def test_guesses_that_are_all_wrong_or_all_right_leave_room_for_chance():
    clients = np.repeat(np.arange(10), 2)
    none = rates.mean(np.zeros(20), clients, np.random.default_rng(0))
    assert (none.value, none.low) == (0, 0)
    assert (1 - none.high) ** 10 == pytest.approx(0.025)  # no client's is right in 2.5 % of all cases
    every = rates.mean(np.ones(20), clients, np.random.default_rng(0))
    assert (every.value, every.high) == (1, 1)
    assert every.low**10 == pytest.approx(0.025)


def test_a_thinned_curve_lies_on_the_curve():
    scores, member = made(3000, 7, False)
    whole = rates.curve(scores, member)
    thin = rates.thinned(whole)
    assert len(thin.false) <= rates.POINTS + 2
    points = set(zip(whole.false.tolist(), whole.true.tolist(), strict=True))
    assert points.issuperset(zip(thin.false.tolist(), thin.true.tolist(), strict=True))
    assert (thin.false[0], thin.true[0], thin.false[-1], thin.true[-1]) == (0, 0, 1, 1)
