"""Scaling does what its name says, to constant channels too."""

import json

import numpy as np
import pytest

from dataset_utils.scaling import Statistics, fit, pooled, statistics

RNG = np.random.default_rng(0)
X = (RNG.normal(size=(50, 3, 1, 20)) * [[[1.0]], [[20.0]], [[0.0]]] + [[[0.0]], [[500.0]], [[9.81]]]).astype(np.float32)


def test_client():
    scaled = fit(X, "client")(X)
    assert scaled.shape == X.shape and scaled.dtype == np.float32
    rounding = 2.0**-24 * np.abs(scaled).max()  # of each value, once; sums of them are made in float64
    np.testing.assert_allclose(scaled.mean(axis=(0, 2, 3), dtype=np.float64), 0, atol=rounding)
    np.testing.assert_allclose(scaled.std(axis=(0, 2, 3), dtype=np.float64), [1, 1, 0], atol=rounding)


def test_minmax():
    scaled = fit(X, "minmax")(X)
    np.testing.assert_allclose(scaled.min(axis=(0, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(scaled.max(axis=(0, 2, 3)), [1, 1, 0], atol=1e-6)


@pytest.mark.parametrize("how", ["none", "federated"])
def test_none(how):
    assert fit(X, how) is None


@pytest.mark.parametrize("how", ["client", "minmax"])
def test_a_channel_constant_in_training_is_only_shifted(how):
    scaling = fit(X, how)
    assert scaling.scale[2] == 1
    np.testing.assert_allclose(scaling(X + np.float32(0.25))[:, 2], 0.25, atol=1e-6)


@pytest.mark.parametrize("sizes", [(1, 2), (30, 1, 400, 7), (1,) * 20])
def test_pooled_statistics_are_those_of_the_pooled_windows(sizes):
    rng = np.random.default_rng(1)
    # far from 0 beside their spread, and far from each other, where naive sums of squares lose all digits
    parts = [
        (rng.normal(size=(n, 3, 1, 10)) * [[[1e-3]], [[1.0]], [[50.0]]] + 1e4 + 100 * k).astype(np.float32)
        for k, n in enumerate(sizes)
    ]
    found, whole = pooled(map(statistics, parts)), np.concatenate(parts).astype(np.float64)
    assert found.count.tolist() == [10 * sum(sizes)] * 3
    np.testing.assert_allclose(found.mean, whole.mean(axis=(0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(found.variance, whole.var(axis=(0, 2, 3)), rtol=1e-9)
    scaled = found.scaling()(whole)
    np.testing.assert_allclose(scaled.mean(axis=(0, 2, 3), dtype=float), 0, atol=1e-5)
    np.testing.assert_allclose(scaled.std(axis=(0, 2, 3), dtype=float), 1, atol=1e-5)


def test_pooling_by_hand():
    """1, 3 and 2, 4, 9: means 2 and 5, variances 1 and 26/3; together mean 19/5, variance 111/5 - (19/5)²."""
    one, two = (statistics(np.array(v, np.float32).reshape(-1, 1, 1, 1)) for v in ([1, 3], [2, 4, 9]))
    assert (one.mean[0], one.variance[0], two.mean[0], two.count[0]) == (2, 1, 5, 3)
    assert two.variance[0] == pytest.approx(26 / 3, rel=1e-15)
    both = pooled([one, two])
    assert both.mean[0] == pytest.approx(3.8, rel=1e-15) and both.variance[0] == pytest.approx(7.76, rel=1e-14)


def test_a_channel_that_is_constant_everywhere_is_only_shifted_and_one_that_differs_is_not():
    constant = np.full((5, 2, 1, 7), 9.81, np.float32)
    other = constant.copy()
    other[:, 1] = 2.0
    same, differs = pooled(map(statistics, [constant, other, constant])).scaling().scale
    assert same == 1
    assert differs == pytest.approx(np.float32(9.81 - 2) * np.sqrt(2) / 3)  # two of three parts lie 7.81 higher


def test_statistics_travel_as_json():
    found = statistics(X)
    again = Statistics.from_dict(json.loads(json.dumps(found.to_dict())), 3, 1000)
    for one, two in zip(found, again, strict=True):
        np.testing.assert_array_equal(one, two)
        assert one.dtype == two.dtype
