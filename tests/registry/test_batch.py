"""Batches: what they unpack to, means and cross-entropies over their real rows, weights of classes."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F

from registry.batch import balanced
from registry.interface import Batch

WEIGHTS = torch.tensor([0.5, 2.0, 0.0, 1.25], dtype=torch.float64)


def made(mask=None, weights=WEIGHTS, rows=9):
    """Make a batch of random windows, whose labels are not of the class with weight 0, and logits for it."""
    rng = torch.Generator().manual_seed(0)
    x, logits = (torch.randn(rows, 4, dtype=torch.float64, generator=rng) for _ in range(2))
    return Batch(x, torch.tensor([0, 1, 3, 3, 0, 1, 3, 0, 1])[:rows], mask, weights), 3 * logits


def by_formula(logits, y, weights):
    """Σ w_y (−log softmax_y) / Σ w_y, in NumPy."""
    z = logits.detach().numpy()
    losses = np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), y]
    w = weights.numpy()[y]
    return (w * losses).sum() / w.sum()


def test_a_batch_unpacks_as_windows_labels_and_mask():
    mask = torch.arange(9) < 7
    batch, _ = made(mask)
    x, y, found = batch
    assert (x, y, found) == (batch.x, batch.y, mask) == tuple(batch)
    assert batch[0] is x and batch[:2] == (x, y) and Batch(*batch).weights is None
    copied = pickle.loads(pickle.dumps(copy.copy(batch)))
    assert all(torch.equal(getattr(copied, name), getattr(batch, name)) for name in ("x", "y", "mask", "weights"))


def test_rows_and_parts_keep_mask_and_weights():
    batch, _ = made(torch.arange(9) < 7)
    some = batch.rows(torch.tensor([8, 0]))
    assert torch.equal(some.x, batch.x[[8, 0]]) and some.y.tolist() == [1, 0] and some.mask.tolist() == [False, True]
    assert some.weights is WEIGHTS
    parts = batch.split(4)
    assert [len(part.y) for part in parts] == [4, 4, 1] and all(part.weights is WEIGHTS for part in parts)
    assert torch.equal(torch.cat([part.x for part in parts]), batch.x)
    assert made(rows=3)[0].rows(slice(2)).mask is None


@pytest.mark.parametrize("real", [9, 6, 1])
def test_weighted_cross_entropy_is_its_formula_and_pytorchs(real):
    batch, logits = made(torch.arange(9) < real)
    expected = by_formula(logits[:real], batch.y[:real], WEIGHTS)
    found = batch.cross_entropy(logits)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    torch.testing.assert_close(found, F.cross_entropy(logits[:real], batch.y[:real], weight=WEIGHTS))
    np.testing.assert_allclose(batch.mean(batch.cross_entropies(logits)), expected, rtol=1e-12)
    whole = batch.rows(slice(real))
    np.testing.assert_allclose(Batch(*whole[:2], weights=WEIGHTS).cross_entropy(logits[:real]), expected, rtol=1e-12)


def test_equal_weights_change_nothing_and_no_scale_of_them_does():
    _, logits = made()
    plain, alike, scaled = (made(weights=w)[0] for w in (None, torch.full((4,), 3.0), 7 * WEIGHTS))
    torch.testing.assert_close(alike.cross_entropy(logits), plain.cross_entropy(logits), rtol=1e-12, atol=0)
    torch.testing.assert_close(scaled.cross_entropy(logits), made()[0].cross_entropy(logits), rtol=1e-12, atol=0)


def test_without_weights_the_bits_are_pytorchs():
    batch, logits = made(weights=None)
    assert torch.equal(batch.cross_entropy(logits), F.cross_entropy(logits, batch.y))
    assert torch.equal(batch.cross_entropies(logits), F.cross_entropy(logits, batch.y, reduction="none"))


def test_padding_rows_of_any_value_have_no_part_and_no_gradient():
    batch, logits = made(torch.arange(9) < 6)
    expected = batch.cross_entropy(logits)
    logits[6:] *= 100
    logits.requires_grad_()
    loss = batch.cross_entropy(logits)
    loss.backward()
    assert torch.equal(loss, expected)
    assert (logits.grad[6:] == 0).all() and (logits.grad[:6] != 0).any()
    empty, _ = made(torch.zeros(9, dtype=torch.bool))
    assert float(empty.cross_entropy(made()[1])) == 0


def test_transformations_of_functions_carry_the_weights():
    """Under `grad`, `vmap` and both, with the batch as an argument, also to functions that unpack it."""
    batch, logits = made(torch.arange(9) < 7)
    expected = batch.cross_entropy(logits)

    def loss(logits, batch):
        x, _, mask = batch
        assert x.shape == (9, 4) and mask is not None
        return batch.cross_entropy(logits)

    slope, value = torch.func.grad_and_value(loss)(logits, batch)
    torch.testing.assert_close(value, expected)
    leaf = logits.clone().requires_grad_()
    batch.cross_entropy(leaf).backward()
    torch.testing.assert_close(slope, leaf.grad)
    other = WEIGHTS.flip(0) + 1
    both = Batch(*(torch.stack([part, part]) for part in batch), torch.stack([WEIGHTS, other]))
    slopes = torch.func.vmap(torch.func.grad(loss))(torch.stack([logits, logits]), both)
    torch.testing.assert_close(slopes[0], slope)
    torch.testing.assert_close(slopes[1], torch.func.grad(loss)(logits, Batch(*batch, other)))
    assert not torch.allclose(*slopes)


@pytest.mark.parametrize("y", [[0, 0, 0, 2, 2, 3], [1], [0, 1, 2, 3], [3, 3, 3]])
def test_balanced_weights_are_scikit_learns_and_0_for_classes_that_are_absent(y):
    labels, like = torch.tensor(y), torch.empty(0, dtype=torch.float64)
    present = np.unique(y)
    expected = np.zeros(4)
    expected[present] = compute_class_weight("balanced", classes=present, y=np.array(y))
    np.testing.assert_allclose(balanced(labels, 4, like), expected, rtol=1e-12)
    assert balanced(labels, 4, like.float()).dtype == torch.float32


def test_balanced_weights_give_each_class_the_same_part_of_the_whole():
    labels = torch.tensor([0] * 7 + [1] * 2 + [3])
    weights = balanced(labels, 4, torch.empty(0, dtype=torch.float64))
    totals = torch.zeros(4, dtype=torch.float64).index_add(0, labels, weights[labels])
    torch.testing.assert_close(totals[[0, 1, 3]], torch.full((3,), 10 / 3, dtype=torch.float64), rtol=1e-12, atol=0)
    assert float(weights[2]) == 0
