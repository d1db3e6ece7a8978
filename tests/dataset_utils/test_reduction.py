"""Thinned and held-out training windows: the right share, the right windows, nothing leaked."""

import dataclasses

import numpy as np
import pytest

from dataset_utils import generate, shards
from dataset_utils.reduction import hold_out, thin
from dataset_utils.spec import ShardSpec
from dataset_utils.split import split
from registry import catalog
from registry.errors import UserError
from tests.dataset_utils import synthetic
from tests.dataset_utils.test_split import random_windows


def by_subject(w, pool):
    return [pool[w.subject[pool] == s] for s in range(len(w.subjects))]


@pytest.mark.parametrize("how", ["shuffled", "blocked"])
@pytest.mark.parametrize("fraction", [0.001, 0.25, 1.0])
def test_thinning_keeps_the_share_of_every_class_of_every_client(how, fraction):
    w = random_windows(4)
    train = by_subject(w, np.arange(len(w.y)))
    for own, kept in zip(train, thin(w, train, fraction, how, seed=2), strict=True):
        assert (np.diff(kept) > 0).all() and set(kept) <= set(own)
        there, left = (np.bincount(w.y[part], minlength=4) for part in (own, kept))
        wanted = [max(1, round(n * fraction)) if n else 0 for n in there.tolist()]
        assert left.tolist() == wanted


def test_blocked_thinning_keeps_one_run_and_shuffled_does_not():
    w = synthetic.windows(per_class=40, subjects=1)
    train = [np.arange(len(w.y))]
    runs = {}
    for how in ("shuffled", "blocked"):
        (kept,) = thin(w, train, 0.25, how, seed=0)
        places = [np.flatnonzero(np.isin(np.flatnonzero(w.y == c), kept)) for c in range(3)]
        runs[how] = all((np.diff(place) == 1).all() for place in places)
    assert runs == {"shuffled": False, "blocked": True}


@pytest.mark.parametrize("seed", range(6))
def test_blocked_validation_shares_no_sample_with_anybodys_training_and_keeps_the_gap(seed):
    w = random_windows(seed)
    _, tested, _ = done = split(w, 0.2, "blocked", seed)
    rest = done.train
    rng = np.random.default_rng(seed)
    mixed = [np.sort(part) for part in np.array_split(rng.permutation(rest), 2)]  # clients that share stretches
    parts = hold_out(w, mixed, tested, "blocked", seed)
    train, held = (np.concatenate([getattr(own, name) for own in parts]) for name in ("train", "test"))
    assert len(held)
    for i in held:
        same = train[w.stretch[train] == w.stretch[i]]
        assert (abs(w.start[same] - w.start[i]) >= 2 * w.x.shape[-1]).all()


@pytest.mark.parametrize("how", ["shuffled", "blocked"])
def test_validation_windows_come_from_the_clients_own_training_windows(how):
    w = synthetic.windows(per_class=50)
    divided = split(w, 0.2, how, seed=0)
    train = by_subject(w, divided.train)
    for own, part in zip(train, hold_out(w, train, divided.test, how, seed=0), strict=True):
        np.testing.assert_array_equal(np.sort(np.concatenate(part)), own)
        for c in range(3):
            held, wanted = (w.y[part.test] == c).sum(), round(0.2 * (w.y[own] == c).sum())
            assert held == wanted or (how == "blocked" and 1 <= held <= 2 * wanted)  # whole pieces, where they fit


@pytest.fixture
def make(tmp_path, monkeypatch):
    original = catalog.load
    monkeypatch.setattr(
        catalog, "load", lambda kind, name: synthetic.Synthetic if name == "Synthetic" else original(kind, name)
    )

    def prepare(**changes):
        spec = dataclasses.replace(ShardSpec("Synthetic"), **changes)
        return shards.load(generate.prepare(spec, tmp_path, None, False, lambda line: None))

    return prepare


def rows(x):
    return {window.tobytes() for window in x}


@pytest.mark.parametrize("how", ["shuffled", "blocked"])
def test_shards_of_a_share(make, how):
    whole, part = (make(split=how, scale="none", train_fraction=f) for f in (1.0, 0.1))
    for k in range(3):
        np.testing.assert_array_equal(part.test[k].x, whole.test[k].x)
        assert rows(part.train[k].x) < rows(whole.train[k].x)
        assert len(part.train[k].y) == pytest.approx(0.1 * len(whole.train[k].y), abs=2)
    assert part.manifest["spec"]["train_fraction"] == 0.1 and part.evaluated_on == "test"
    assert "train0.1" in part.folder.name
    scaled = make(split=how, train_fraction=0.1, scale="client")
    for shard in scaled.train:  # fitted on what is kept
        rounding = 2.0**-24 * np.abs(shard.x).max()  # of each value
        np.testing.assert_allclose(shard.x.mean(axis=(0, 2, 3), dtype=np.float64), 0, atol=rounding)


@pytest.mark.parametrize("how", ["shuffled", "blocked"])
def test_shards_for_validation_hold_no_test_window(make, how):
    # without gravity, whose filter rings for 7 s: little would be left of recordings of 90 s
    usual, tuning = (make(split=how, scale="none", gravity=0.0, evaluate_on=name) for name in ("test", "validation"))
    for k in range(3):
        train, held, test = (rows(shard.x) for shard in (tuning.train[k], tuning.test[k], usual.test[k]))
        assert train | held <= rows(usual.train[k].x) and not train & held
        assert not test & (train | held)
        # blocked: whole pieces of what is left
        assert len(held) == pytest.approx(0.2 * len(usual.train[k].y), abs=2 if how == "shuffled" else 10)
    assert tuning.evaluated_on == "validation" and "validation" in tuning.folder.name
    assert "validation windows" in generate.summary(tuning.folder) and "test windows" in generate.summary(usual.folder)


def test_validation_is_held_out_before_thinning_and_is_the_same_with_it(make):
    whole, part = (make(scale="none", evaluate_on="validation", train_fraction=f) for f in (1.0, 0.1))
    for k in range(3):
        np.testing.assert_array_equal(part.test[k].x, whole.test[k].x)
        assert rows(part.train[k].x) < rows(whole.train[k].x)


def test_too_little_to_hold_out_is_one_line(make):
    with pytest.raises(UserError, match="--evaluate-on validation: client 0 has too few"):
        make(window="750 samples", overlap=0.0, min_samples=1, evaluate_on="validation")
