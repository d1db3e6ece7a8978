"""Scaling does what its name says, to constant channels too."""

import numpy as np
import pytest

from dataset_utils.scaling import fit

RNG = np.random.default_rng(0)
X = (RNG.normal(size=(50, 3, 1, 20)) * [[[1.0]], [[20.0]], [[0.0]]] + [[[0.0]], [[500.0]], [[9.81]]]).astype(np.float32)


def test_zscore():
    scaled = fit(X, "zscore")(X)
    assert scaled.shape == X.shape and scaled.dtype == np.float32
    rounding = 2.0**-24 * np.abs(scaled).max()  # of each value, once; sums of them are made in float64
    np.testing.assert_allclose(scaled.mean(axis=(0, 2, 3), dtype=np.float64), 0, atol=rounding)
    np.testing.assert_allclose(scaled.std(axis=(0, 2, 3), dtype=np.float64), [1, 1, 0], atol=rounding)


def test_minmax():
    scaled = fit(X, "minmax")(X)
    np.testing.assert_allclose(scaled.min(axis=(0, 2, 3)), 0, atol=1e-6)
    np.testing.assert_allclose(scaled.max(axis=(0, 2, 3)), [1, 1, 0], atol=1e-6)


def test_none():
    assert fit(X, "none") is None


@pytest.mark.parametrize("how", ["zscore", "minmax"])
def test_a_channel_constant_in_training_is_only_shifted(how):
    scaling = fit(X, how)
    assert scaling.scale[2] == 1
    np.testing.assert_allclose(scaling(X + np.float32(0.25))[:, 2], 0.25, atol=1e-6)
