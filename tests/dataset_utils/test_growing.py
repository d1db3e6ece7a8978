"""Rows appended are the rows that come out, however often memory grows."""

import numpy as np
import pytest

from dataset_utils.growing import Growing


@pytest.mark.parametrize("width", [(), (3,), (2, 0)])
@pytest.mark.parametrize("first", [0, 1, 7, 1000])
def test_rows_come_out_as_they_were_added(width, first):
    rng = np.random.default_rng(0)
    blocks = [rng.normal(size=(n, *width)) for n in (0, 1, 5, 300, 2, 0, 90)]
    grown = Growing(first, width, np.float64)
    for block in blocks:
        grown.add(block)
    np.testing.assert_array_equal(grown.whole(), np.concatenate(blocks))
