"""Memory of a client's own windows: the formula of kNN-Per, key by key, and its bounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from registry.interface import Batch
from registry.memory import CAPACITY, Remembering, best_share, neighbours, remembered
from tests.baselines import reference
from tests.conftest import SHAPE, TinyNet


@pytest.mark.parametrize("count", [30, 4])
@pytest.mark.parametrize("leave_out", [False, True])
def test_the_nearest_vote_as_in_the_paper(count, leave_out):
    rng = np.random.default_rng(0)
    keys, labels = np.zeros((40, 5)), np.zeros((40, 3))
    keys[:count], labels[np.arange(count), rng.integers(3, size=count)] = rng.normal(size=(count, 5)), 1
    h = keys[:count] if leave_out else rng.normal(size=(20, 5))
    found = neighbours(*(torch.from_numpy(part) for part in (h, keys, labels)), leave_out)
    for n, row in enumerate(h):
        expected = reference.neighbours(row, keys[:count], labels[:count], n if leave_out else None)
        np.testing.assert_allclose(found[n], expected, rtol=1e-6, atol=1e-9)


def test_far_keys_still_vote_and_no_keys_do_not():
    keys, labels = torch.zeros(12, 2), torch.zeros(12, 3)
    assert not neighbours(torch.ones(2, 2), keys, labels).any()
    assert neighbours(torch.ones(0, 2), keys, labels).shape == (0, 3)  # of a client without test windows
    labels[0, 1] = 1
    assert neighbours(torch.full((2, 2), 1e4), keys, labels).tolist() == [[0, 1, 0], [0, 1, 0]]


def test_the_share_with_the_greatest_likelihood():
    right, wrong = torch.tensor([0.9, 0.9]), torch.tensor([0.1, 0.1])
    assert best_share(right, wrong) == 0 and best_share(wrong, right) == 1
    # log(0.8 s) + log(0.8 (1 - s)) is greatest at s = 1/2
    assert best_share(torch.tensor([0.0, 0.8]), torch.tensor([0.8, 0.0])).item() == pytest.approx(0.5)


def test_with_nothing_remembered_it_is_the_model():
    torch.manual_seed(0)
    base = TinyNet(SHAPE, 4).eval()
    x = torch.randn(5, *SHAPE)
    expected = base(x).logits.softmax(1)
    torch.testing.assert_close(Remembering(base).eval()(x).logits.exp(), expected)


def test_a_memory_is_bounded_and_every_class_has_its_part():
    data = Batch(torch.arange(3 * CAPACITY).float(), torch.arange(3 * CAPACITY) % 3)
    kept = remembered(data)
    assert len(kept.y) == CAPACITY and all(abs(int((kept.y == c).sum()) - CAPACITY / 3) < 2 for c in range(3))
    few = Batch(torch.arange(5.0), torch.tensor([1, 0, 1, 0, 2]))
    assert remembered(few).x.tolist() == [1, 3, 0, 2, 4]
