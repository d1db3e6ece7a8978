"""Membership inference on known ground: what was learned by heart is found, and what was not is not."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch.nn import functional as F

from fedkdx_plugin.privacy.audit import membership, rates
from fedkdx_plugin.privacy.audit.membership import CONTROL, DRAWN, LIRA, LOSS
from fedkdx_plugin.privacy.audit.models import confidences
from fedkdx_plugin.privacy.audit.windows import choose
from fedkdx_plugin.testing.made import make_data


def auc(attack) -> float:
    return rates.area(rates.curve(attack.scores, attack.member))


def bound(attack) -> float:
    """Five standard deviations of an area by chance."""
    n, m = int(attack.member.sum()), int((~attack.member).sum())
    return 5 * math.sqrt((n + m + 1) / (12 * n * m))


def test_a_confidence_is_the_log_odds_of_the_label_and_falls_with_its_loss():
    logits, y = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 4
    p = logits.double().softmax(1)[torch.arange(50), y]
    found = confidences(logits, y)
    np.testing.assert_allclose(found, torch.log(p / (1 - p)).numpy(), rtol=1e-9)
    losses = F.cross_entropy(logits.double(), y, reduction="none").numpy()
    np.testing.assert_array_equal(np.argsort(-found, kind="stable"), np.argsort(losses, kind="stable"))
    assert np.isfinite(confidences(1e4 * logits, y)).all()  # a probability of 1


def by_heart(x: torch.Tensor, y: torch.Tensor, steps: int) -> torch.Tensor:
    """Return the weights of a linear model trained on more inputs than windows, whose labels are random."""
    weights = torch.zeros(x.shape[1], 4, requires_grad=True)
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(F.cross_entropy(x @ weights, y), weights)
        weights = (weights - 0.5 * gradient).detach().requires_grad_()
    return weights.detach()


def test_a_model_that_learned_by_heart_gives_its_windows_away_and_one_that_saw_none_does_not():
    rng = torch.Generator().manual_seed(1)
    x, y = torch.randn(200, 300, generator=rng), torch.randint(4, (200,), generator=rng)
    member, clients = np.arange(200) < 100, np.arange(200) % 10
    none = np.empty((0, 200)), np.empty((0, 200), bool)
    for steps in (200, 0):
        weights = by_heart(x[:100], y[:100], steps)
        if not steps:
            weights = torch.randn(300, 4, generator=rng)
        (attack,) = membership.attacks(confidences(x @ weights, y), member, clients, *none).values()
        if steps:
            assert auc(attack) > 0.99
        else:
            assert abs(auc(attack) - 0.5) < bound(attack)


def test_harder_windows_fool_the_threshold_and_neither_control_nor_ratio():
    """Members are easier windows, and nothing was learned of any."""
    rng = np.random.default_rng(2)
    member, clients = np.arange(1200) < 600, np.arange(1200) % 12
    difficulty = 2 * rng.normal(size=1200) + 2 * member
    runs = difficulty + rng.normal(size=(9, 1200))
    trained = np.zeros((8, 1200), bool)
    trained[::2] = rng.random((4, 1200)) < 0.5
    trained[1::2] = ~trained[::2]
    found = membership.attacks(runs[8], member, clients, runs[:8], trained)
    assert auc(found[LOSS]) > 0.7
    assert auc(found[LOSS + CONTROL]) == pytest.approx(auc(found[LOSS]), abs=0.03)
    for name in (LIRA, LOSS + DRAWN, LIRA + DRAWN):
        assert abs(auc(found[name]) - 0.5) < bound(found[name]), name


def test_a_ratio_finds_what_a_threshold_cannot_among_windows_of_different_difficulty():
    rng = np.random.default_rng(3)
    member, clients = rng.random(1000) < 0.5, np.arange(1000) % 10
    difficulty = 4 * rng.normal(size=1000)
    trained = np.zeros((4, 1000), bool)
    trained[::2] = rng.random((2, 1000)) < 0.5
    trained[1::2] = ~trained[::2]
    own = difficulty + 1.0 * member + 0.5 * rng.normal(size=1000)
    shadows = difficulty + 1.0 * trained + 0.5 * rng.normal(size=(4, 1000))
    found = membership.attacks(own, member, clients, shadows, trained)
    assert auc(found[LOSS]) < 0.65
    assert auc(found[LIRA]) > 0.85
    assert auc(found[LIRA + DRAWN]) > 0.8


def test_the_ratio_is_that_of_two_normal_densities_with_one_variance_and_one_gap():
    rng = np.random.default_rng(4)
    trained = np.array([[True, False] * 10, [False, True] * 10, [True] * 20, [False] * 20])
    shadows, own = rng.normal(size=(4, 20)), rng.normal(size=20)
    middle = (np.where(trained, shadows, 0).sum(0) / 2 + np.where(~trained, shadows, 0).sum(0) / 2) / 2
    gap, deviation = 0.8, 1.3
    logs = [norm.logpdf(own, middle + side * gap / 2, deviation) for side in (1, -1)]
    found = membership.likelihood_ratio(own, shadows, trained)
    np.testing.assert_allclose(found * gap / deviation**2, logs[0] - logs[1], atol=1e-12)


def test_windows_are_as_many_of_either_kind_in_each_class_of_each_client():
    data = make_data()
    windows = choose(data, [0, 1, 3], seed=0)
    assert set(windows.client) == {0, 1, 3}
    for client in (0, 1, 3):
        own, y = windows.of(client), windows.y(data, client).numpy()
        member = windows.member[own]
        np.testing.assert_array_equal(np.bincount(y[member]), np.bincount(y[~member]))
        x = windows.x(data, client)
        known = {row.numpy().tobytes() for row in data.train_x[client]}
        assert [row.numpy().tobytes() in known for row in x] == member.tolist()


def test_shadow_runs_have_as_many_windows_as_the_run_and_halves_that_complete_each_other():
    data = make_data(sizes=(80, 70, 65), tests=40)
    windows = choose(data, [0, 1, 2], seed=0)
    trained = windows.drawn(6, seed=0)
    np.testing.assert_array_equal(trained[::2], ~trained[1::2])
    np.testing.assert_array_equal(trained.sum(0), np.full(len(windows.client), 3))
    for row in trained:
        quarters = {
            (g, q): {*row[(windows.group == g) & (windows.quarter == q)]}
            for g, q in zip(windows.group, windows.quarter, strict=True)
        }
        assert all(len(kinds) == 1 for kinds in quarters.values())  # neighbours stay together
        made = windows.trained_on(data, row)
        for client in range(3):
            own = windows.of(client)
            assert len(made.train_y[client]) == len(data.train_y[client]) - windows.member[own].sum() + row[own].sum()
            apart = abs(len(made.train_y[client]) - len(data.train_y[client]))
            assert apart <= 2 * len(set(windows.group[own]))  # halves of odd numbers
    both = trained[:2] & windows.member
    assert 0 < both[0].sum() < windows.member.sum()  # a mixture of either kind
    assert (trained[0] & ~windows.member).any()


def test_windows_of_both_kinds_come_together_where_they_lie_apart():
    """`--client-memory host` leaves training windows in host memory: here the two kinds are on different devices."""
    data = make_data()
    windows = choose(data, (0, 1), 0)
    on_test = dataclasses.replace(data, test_x=data.test_x.to("meta"), test_y=data.test_y.to("meta"))
    assert windows.x(on_test, 0).device.type == windows.y(on_test, 0).device.type == "meta"
    on_train = dataclasses.replace(
        data, train_x=[x.to("meta") for x in data.train_x], train_y=[y.to("meta") for y in data.train_y]
    )
    made = windows.trained_on(on_train, np.ones(len(windows.member), bool))
    assert made.train_x[0].device.type == made.train_y[1].device.type == "meta"
    assert len(made.train_y[0]) == len(data.train_y[0]) + int((~windows.member[windows.of(0)]).sum())
