"""What a receiver makes sure of."""

from __future__ import annotations

import pytest
import torch

from registry.messages import first_nonfinite

TYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 17, 59])
def test_the_first_tensor_with_nan_or_infinity_is_named(dtype, bad, place):
    fine = {"a": torch.randn(3, 4), "none": torch.empty(0, 5), "whole": torch.tensor([7]), "one": torch.tensor(1.0)}
    values = torch.randn(60)
    values[place] = bad
    assert first_nonfinite(fine | {"b": values.to(dtype), "c": values}) == "b"
    assert first_nonfinite(fine | {"b": values.nan_to_num(0, 0, 0).to(dtype)}) is None


def test_what_is_large_but_finite_passes():
    limit = torch.finfo(torch.float32).max
    wide = torch.tensor([1e300], dtype=torch.float64)
    assert first_nonfinite({"w": torch.tensor([limit, limit, -limit]), "wide": wide}) is None
    assert first_nonfinite({}) is None
    assert first_nonfinite({"whole": torch.tensor([1]), "empty": torch.empty(0)}) is None


def test_a_tensor_that_is_not_contiguous():
    values = torch.randn(6, 8)
    values[3, 5] = float("nan")
    assert first_nonfinite({"w": values.T}) == "w"
    assert first_nonfinite({"w": values.T[:5]}) is None
