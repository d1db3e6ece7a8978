"""Means of clients against float64 references written from their definitions, and what holds of any of them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from registry.aggregation import (
    RULES,
    UNWEIGHTED,
    Average,
    Averaging,
    capped,
    distances,
    geometric_weights,
    sample_weights,
    weighted_sum,
)
from registry.errors import UserError
from registry.messages import Message

SHAPES = {"conv": (4, 3, 1, 5), "bias": (4,), "scalar": ()}
ROBUST = [rule for rule in RULES if rule != "mean"]


def made(count, seed=0, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    return [{name: scale * torch.randn(shape, generator=rng) for name, shape in SHAPES.items()} for _ in range(count)]


def flat(state):
    return np.concatenate([tensor.double().numpy().ravel() for tensor in state.values()])


def shares_of(count):
    weights = np.arange(1, count + 1, dtype=float)
    return (weights / weights.sum()).tolist()


def take(rule, states, shares=None, bad=0.2, most=1.0, scales=None):
    average = Average(Averaging(rule, bad, most))
    result = average(states, shares or shares_of(len(states)), scales)
    assert average.used and result.keys() == states[0].keys()
    assert all(tensor.shape == SHAPES[name] and tensor.dtype == torch.float32 for name, tensor in result.items())
    return flat(result), average.take_notes()


def reference(rule, points, shares, bad):
    """Return the mean of (n, d) float64 points by a rule, and nothing of how the project computes it."""
    n = len(points)
    if rule == "mean":
        return np.average(points, axis=0, weights=shares)
    if rule == "median":
        return np.median(points, axis=0)
    if rule == "trimmed":
        return np.sort(points, axis=0)[bad : n - bad].mean(0)
    if rule == "geometric":

        def cost(v):
            return float(np.sum(shares * np.linalg.norm(points - v, axis=1)))

        return minimize(
            cost,
            np.average(points, axis=0, weights=shares),
            method="L-BFGS-B",
            options={"ftol": 1e-15, "gtol": 1e-9, "maxfun": 10**6},
        ).x
    scores = []
    for i in range(n):
        others = sorted(((points[i] - points[j]) ** 2).sum() for j in range(n) if j != i)
        scores.append(sum(others[: n - bad - 2]))
    best = np.argsort(scores, kind="stable")[: 1 if rule == "krum" else n - bad]
    return points[best].mean(0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("count", "bad"), [(5, 1), (10, 2), (11, 3)])
def test_each_mean_is_that_of_its_definition(rule, count, bad):
    states = made(count)
    found, notes = take(rule, states, bad=bad / count)
    expected = reference(rule, np.stack([flat(s) for s in states]), np.array(shares_of(count)), bad)
    np.testing.assert_allclose(found, expected, atol=1e-4 if rule == "geometric" else 1e-6)
    assert not notes


def test_the_geometric_median_is_a_minimum():
    """No point near it has a smaller sum of weighted distances; by hand: of a triangle with equal sides, its centre."""
    points, shares = np.stack([flat(s) for s in made(9)]), np.array(shares_of(9))
    weights = geometric_weights(distances(made(9)), shares_of(9))
    best = np.asarray(weights) @ points
    cost = lambda v: float(np.sum(shares * np.linalg.norm(points - v, axis=1)))  # noqa: E731
    rng = np.random.default_rng(0)
    assert all(
        cost(best) <= cost(best + step * rng.normal(size=best.shape)) for step in (1e-3, 1e-2) for _ in range(20)
    )
    triangle = [{"x": torch.tensor([np.cos(a), np.sin(a)])} for a in (0, 2 * np.pi / 3, 4 * np.pi / 3)]
    assert np.allclose(geometric_weights(distances(triangle), [1 / 3] * 3), 1 / 3)


def test_weiszfeld_stays_at_a_client_that_has_most_of_the_weight():
    weights = geometric_weights(distances(made(4)), [0.7, 0.1, 0.1, 0.1])
    assert weights[0] > 0.999


def test_half_of_the_weight_in_one_place_is_the_geometric_median():
    (state, other) = made(2)
    bad = {name: torch.full(shape, 1e30) for name, shape in SHAPES.items()}
    found, _ = take("geometric", [state, bad, state, other], [0.3, 0.2, 0.3, 0.2])
    np.testing.assert_allclose(found, flat(state), rtol=1e-6)
    found, _ = take("geometric", [state, state, state, other], [0.1, 0.1, 0.1, 0.7])  # three clients, little weight
    np.testing.assert_allclose(found, flat(other), rtol=1e-6)


def test_a_state_moved_nearer_leaves_the_geometric_median_where_it_is():
    states, shares = made(7), shares_of(7)
    far = {name: 1e9 * tensor for name, tensor in states[2].items()}
    found, _ = take("geometric", [*states[:2], far, *states[3:]], shares)
    points = np.stack([flat(s) for s in [*states[:2], states[2], *states[3:]]])
    points[2] *= 1e9
    expected = reference("geometric", points, np.array(shares), 0)
    cost = [float(np.sum(shares * np.linalg.norm(points - v, axis=1))) for v in (found, expected)]
    honest = np.delete(points, 2, axis=0)
    assert (cost[0] - cost[1]) / np.linalg.norm(honest, axis=1).mean() < 1e-6


def test_distances_are_of_whole_states():
    states = made(6, scale=100.0)
    points = np.stack([flat(s) for s in states])
    expected = ((points[:, None] - points[None]) ** 2).sum(2)
    np.testing.assert_allclose(distances(states).numpy(), expected, rtol=1e-12, atol=1e-9)


def test_krum_and_median_by_hand():
    """0, 1, 2, 3 and 100 with one bad: the score of 1 is 1 + 1 = 2, as that of 2; the smaller id wins."""
    states = [{"scalar": torch.tensor(float(v))} for v in (0, 1, 2, 3, 100)]

    def value(rule):
        return float(Average(Averaging(rule))(states, [0.2] * 5)["scalar"])

    assert value("krum") == 1.0
    assert value("multi-krum") == 1.5  # of 0, 1, 2, 3
    assert value("median") == 2.0
    assert value("trimmed") == 2.0  # of 1, 2, 3
    assert value("mean") == pytest.approx(21.2)
    assert value("geometric") == pytest.approx(2.0, abs=1e-3)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 12])
def test_of_equal_clients_it_is_any_of_them(rule, count):
    (state,) = made(1)
    found, _ = take(rule, [state] * count)
    np.testing.assert_allclose(found, flat(state), rtol=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_the_order_of_clients_does_not_matter(rule):
    states, shares = made(7), shares_of(7)
    expected, _ = take(rule, states, shares)
    for order in itertools.islice(itertools.permutations(range(7)), 1, 5000, 700):
        found, _ = take(rule, [states[i] for i in order], [shares[i] for i in order])
        np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("rule", ["median", "trimmed", "krum", "multi-krum"])
@pytest.mark.parametrize("sent", [1e30, -1e30, 3.0])
def test_one_arbitrary_client_does_not_leave_the_range_of_the_honest(rule, sent):
    honest = made(6)
    bad = {name: torch.full(shape, sent) for name, shape in SHAPES.items()}
    points = np.stack([flat(s) for s in honest])
    for place in range(7):
        states = [*honest[:place], bad, *honest[place:]]
        found, _ = take(rule, states)
        assert (found >= points.min(0) - 1e-6).all() and (found <= points.max(0) + 1e-6).all()
    moved, _ = take("mean", [*honest, bad])
    assert (moved > points.max(0)).any() or (moved < points.min(0)).any()


@pytest.mark.parametrize("sent", [1e6, 1e9, 1e30, 1e38])
def test_one_arbitrary_client_moves_the_geometric_median_by_less_than_the_honest_spread(sent):
    honest = made(6)
    bad = {name: torch.full(shape, sent) for name, shape in SHAPES.items()}
    points = np.stack([flat(s) for s in honest])
    found, _ = take("geometric", [*honest, bad], [1 / 7] * 7)
    radius = np.linalg.norm(points - points.mean(0), axis=1).max()
    # Lopuhaä and Rousseeuw 1991: below one half of bad weight α it stays within 2 (1 - α) / (1 - 2 α) radii
    assert np.linalg.norm(found - points.mean(0)) <= 2 * (6 / 7) / (1 - 2 / 7) * radius


@pytest.mark.parametrize("rule", RULES)
def test_states_are_scaled_before(rule):
    states, scales = made(6), [0.5, 2.0, 1.0, 0.1, 1.5, 1.0]
    found, _ = take(rule, states, scales=scales)
    by_hand = [{name: scale * t for name, t in state.items()} for state, scale in zip(states, scales, strict=True)]
    expected, _ = take(rule, by_hand)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_plain_mean_is_the_weighted_sum_bit_for_bit():
    states, shares = made(5), shares_of(5)
    average, expected = Average(Averaging())(states, shares), weighted_sum(states, shares)
    assert all(torch.equal(average[name], expected[name]) for name in SHAPES)


@pytest.mark.parametrize("rule", UNWEIGHTED)
def test_unweighted_means_do_not_look_at_samples(rule):
    one, _ = take(rule, made(7), shares_of(7))
    other, _ = take(rule, made(7), shares_of(7)[::-1])
    assert np.array_equal(one, other)


def test_samples_count_in_the_geometric_median():
    one, _ = take("geometric", made(7), shares_of(7))
    other, _ = take("geometric", made(7), shares_of(7)[::-1])
    assert not np.allclose(one, other)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("rule", RULES)
def test_memory_layout_changes_no_bit(rule, memory_format):
    states = made(7)
    other = [{n: t.contiguous(memory_format=memory_format) if t.ndim == 4 else t for n, t in s.items()} for s in states]
    one, two = (Average(Averaging(rule))(s, shares_of(7)) for s in (states, other))
    assert all(torch.equal(one[name], two[name]) for name in SHAPES)


@pytest.mark.parametrize(
    ("shares", "most", "expected"),
    [
        ([0.5, 0.3, 0.2], 1.0, [0.5, 0.3, 0.2]),
        ([0.5, 0.3, 0.2], 0.4, [0.4, 0.36, 0.24]),
        ([0.7, 0.2, 0.1], 0.4, [0.4, 0.4, 0.2]),  # 0.2 becomes exactly the cap
        ([0.8, 0.15, 0.05], 0.4, [0.4, 0.4, 0.2]),  # 0.45 would be above it: the second pass
        ([0.8, 0.15, 0.05], 0.2, [1 / 3, 1 / 3, 1 / 3]),
        ([1.0], 0.1, [1.0]),
    ],
)
def test_shares_are_capped(shares, most, expected):
    np.testing.assert_allclose(capped(shares, most), expected, rtol=1e-12)


def test_capped_shares_add_up_to_one_in_their_order_and_none_is_above():
    rng = np.random.default_rng(0)
    for _ in range(300):
        n, most = int(rng.integers(1, 30)), float(rng.uniform(0.01, 1))
        shares = rng.dirichlet(np.full(n, 0.2)) + 1e-9
        found = capped((shares / shares.sum()).tolist(), most)
        assert sum(found) == pytest.approx(1, abs=1e-12)
        assert max(found) <= max(most, 1 / n) * (1 + 1e-12) and min(found) >= 0
        assert (np.diff(np.asarray(found)[np.argsort(shares)]) >= -1e-12).all()


@pytest.mark.parametrize("rule", ["mean", "geometric"])
def test_a_cap_bounds_the_weight_in_the_mean(rule):
    states = made(5)
    shares = [0.9, 0.025, 0.025, 0.025, 0.025]
    found, _ = take(rule, states, shares, most=0.4)
    expected = reference(rule, np.stack([flat(s) for s in states]), np.array([0.4, 0.15, 0.15, 0.15, 0.15]), 0)
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("rule", ROBUST)
@pytest.mark.parametrize("count", [1, 2])
def test_too_few_replies_are_said_once_and_their_mean_is_taken(rule, count):
    average = Average(Averaging(rule))
    for _ in range(2):
        found = average(made(count), shares_of(count))
        expected = weighted_sum(made(count), shares_of(count))
        assert all(torch.equal(found[name], expected[name]) for name in SHAPES)
    assert average.take_notes() == [
        f"--aggregate {rule}: {count} replies are too few to tell a bad one; their mean is taken (said once)"
    ]
    assert not average.take_notes()


@pytest.mark.parametrize("rule", ["krum", "multi-krum"])
def test_krum_takes_the_median_of_too_few_and_says_so(rule):
    found, (note,) = take(rule, made(4))
    np.testing.assert_allclose(found, np.median(np.stack([flat(s) for s in made(4)]), axis=0), atol=1e-6)
    assert note == (
        f"--aggregate {rule}: with 1 assumed bad, 5 replies are needed; a round with 4 takes the median (said once)"
    )


def test_a_trim_that_would_leave_nothing_is_said():
    found, (note,) = take("trimmed", made(5), bad=0.45)
    np.testing.assert_allclose(found, np.median(np.stack([flat(s) for s in made(5)]), axis=0), atol=1e-6)
    assert "of 5 replies, 2 on each side are left out instead of 3" in note


def test_a_cap_below_equal_shares_is_said():
    found, (note,) = take("mean", made(4), most=0.1)
    np.testing.assert_allclose(found, np.stack([flat(s) for s in made(4)]).mean(0), atol=1e-6)
    assert note == "--max-share 0.1: 4 replies cannot all stay below; each gets 1/4 (said once)"


def test_options_are_refused_in_one_line():
    with pytest.raises(UserError, match="--aggregate krum: Alone does not average what its clients send"):
        Averaging("krum").check({"Alone": False})
    with pytest.raises(UserError, match=r"--max-share 0\.5: Alone does not average"):
        Averaging(max_share=0.5).check({"Alone": False})
    for rule in UNWEIGHTED:
        with pytest.raises(UserError, match=f"--max-share: --aggregate {rule} gives every reply the same weight"):
            Averaging(rule, max_share=0.5).check({"Any": True})
    Averaging().check({"Alone": False})
    Averaging("geometric", max_share=0.5).check({"Any": True})


def test_clients_without_tensors_have_an_empty_mean():
    replies = {0: Message({}, {"samples": 3}), 1: Message({}, {"samples": 1})}
    assert Average(Averaging())([{}, {}], sample_weights(replies)) == {}
