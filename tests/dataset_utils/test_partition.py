"""Every partition is complete, is what its name says, ends, and says so when it cannot be."""

import numpy as np
import pytest

from dataset_utils.partition import apportion, fill, partition
from dataset_utils.spec import ShardSpec
from registry.errors import UserError

LABELS = np.repeat(np.arange(5), [500, 900, 300, 200, 100])
SUBJECTS = np.random.default_rng(0).permutation(np.arange(2000) % 10)
TEST = np.arange(0, 2000, 5)
TRAIN = np.setdiff1d(np.arange(2000), TEST)


def divide(how, clients=10, **changes):
    spec = ShardSpec("x", clients=clients, partition=how, **changes)
    return partition(spec, LABELS, SUBJECTS, TRAIN, TEST)


def histogram(pools):
    return np.array([np.bincount(LABELS[pool], minlength=5) for pool in pools])


@pytest.mark.parametrize("clients", [2, 10, 100])
@pytest.mark.parametrize("how", ["iid", "dirichlet", "pathological"])
@pytest.mark.parametrize("seed", range(3))
def test_every_window_lands_exactly_once_and_the_minimum_holds(how, clients, seed):
    made = divide(how, clients, seed=seed, classes_per_client=3)
    np.testing.assert_array_equal(np.sort(np.concatenate(made.train)), TRAIN)
    np.testing.assert_array_equal(np.sort(np.concatenate(made.test)), TEST)
    assert len(made.train) == len(made.test) == clients
    assert min(map(len, made.train)) >= 10 and min(map(len, made.test)) >= 1
    assert all((np.diff(pool) > 0).all() for pool in made.train + made.test)


def test_a_client_a_subject():
    made = divide("subject", clients=None)
    assert len(made.train) == 10
    for k in range(10):
        assert set(SUBJECTS[made.train[k]]) == set(SUBJECTS[made.test[k]]) == {k}
    np.testing.assert_array_equal(np.sort(np.concatenate(made.train + made.test)), np.arange(2000))


def test_fewer_clients_than_subjects_are_the_first():
    made, whole = divide("subject", clients=4), divide("subject", clients=None)
    assert len(made.train) == 4
    np.testing.assert_array_equal(made.train[3], whole.train[3])


def test_clients_default_to_the_number_of_subjects():
    assert len(divide("iid", clients=None).train) == 10


@pytest.mark.parametrize("clients", [7, 10, 33])
def test_iid_is_balanced(clients):
    made = divide("iid", clients)
    for pools in (made.train, made.test):
        assert (np.ptp(histogram(pools), axis=0) <= 1).all()
    assert np.ptp(histogram(made.train).sum(axis=1)) <= 1
    assert made.moved == (0, 0)


def test_dirichlet_is_more_uneven_the_smaller_alpha_is():
    def unevenness(alpha):  # mean distance of a client's class shares from the overall ones
        tables = [histogram(divide("dirichlet", 10, alpha=alpha, seed=s, min_samples=1).train) for s in range(5)]
        shares = [t / t.sum(axis=1, keepdims=True) for t in tables]
        return np.mean([np.abs(s - np.bincount(LABELS) / 2000).sum(axis=1).mean() for s in shares])

    values = [unevenness(alpha) for alpha in (0.05, 0.5, 5, 1e6)]
    assert values == sorted(values, reverse=True)
    assert values[0] > 1.0 and values[-1] < 0.05


def test_dirichlet_shares_have_the_mean_and_variance_of_the_distribution():
    alpha, clients = 0.5, 4
    shares = np.concatenate(
        [
            (histogram(divide("dirichlet", clients, alpha=alpha, seed=s, min_samples=1).train)[:, 1] / 720)
            for s in range(300)
        ]
    )
    assert abs(shares.mean() - 1 / clients) < 1e-9
    variance = (clients - 1) / (clients**2 * (clients * alpha + 1))  # of Dir(alpha), each component
    assert abs(shares.var() - variance) < 0.15 * variance


def test_test_windows_follow_the_training_proportions():
    made = divide("dirichlet", 10, seed=2)
    train, test = histogram(made.train), histogram(made.test)
    assert (np.abs(test - train / 4) <= 1).all()
    assert (train[test > 0] > 0).all()


@pytest.mark.parametrize("alpha", [0.1, 1e-3, 1e-8])
def test_a_hundred_uneven_clients_are_filled_up_at_once(alpha):
    made = divide("dirichlet", 100, alpha=alpha, min_samples=5)
    assert min(map(len, made.train)) >= 5 and min(map(len, made.test)) >= 1
    assert made.moved[0] > 0


def test_filling_up_takes_from_the_largest_what_is_wanted_most():
    counts = np.array([[50, 10], [0, 1], [20, 0]])
    filled = fill(counts, np.array([[9.0, 9], [0.1, 3], [9, 9]]), 6)
    np.testing.assert_array_equal(filled, [[50, 5], [0, 6], [20, 0]])
    np.testing.assert_array_equal(counts[1], [0, 1])  # the argument is left alone
    assert fill(np.array([[50, 0], [0, 1]]), np.array([[1.0, 0], [0, 1]]), 2) is None


def test_apportioning_is_exact_and_nearest():
    shares = np.array([[0.5, 1 / 3], [0.3, 1 / 3], [0.2, 1 / 3]])
    np.testing.assert_array_equal(apportion(np.array([10, 9]), shares), [[5, 3], [3, 3], [2, 3]])
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(50), size=3).T
    amount = np.array([1, 77, 1000])
    counts = apportion(amount, shares)
    np.testing.assert_array_equal(counts.sum(axis=0), amount)
    assert (np.abs(counts - amount * shares) < 1).all()


@pytest.mark.parametrize(("clients", "k"), [(10, 2), (100, 1), (7, 5), (20, 3)])
def test_pathological_clients_hold_k_classes(clients, k):
    made = divide("pathological", clients, classes_per_client=k, min_samples=1)
    train, test = histogram(made.train), histogram(made.test)
    np.testing.assert_array_equal((train > 0).sum(axis=1), k)
    assert (train[test > 0] > 0).all()


@pytest.mark.parametrize("how", ["iid", "dirichlet", "pathological"])
def test_the_seed_decides(how):
    first, again, other = (divide(how, seed=seed) for seed in (0, 0, 1))
    assert all(map(np.array_equal, first.train + first.test, again.train + again.test))
    assert not all(map(np.array_equal, first.train, other.train))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"how": "subject", "clients": 11}, "-nc 11: there are only 10 subjects"),
        ({"how": "subject", "clients": 3, "min_samples": 999}, "subject 0 has only .* lower --min-samples"),
        ({"how": "iid", "clients": 161}, "161 clients need 1610 training windows .* there are 1600; lower -nc"),
        ({"how": "dirichlet", "clients": 5000}, "5000 clients need"),
        ({"how": "iid", "clients": 401, "min_samples": 1}, "401 clients need as many test windows, .* 400"),
        ({"how": "pathological", "clients": 2}, "cannot hold all 5 classes"),
        ({"how": "pathological", "classes_per_client": 6}, "there are only 5 classes"),
        ({"how": "pathological", "clients": 177, "classes_per_client": 1, "min_samples": 9}, "of its 1 classes"),
    ],
)
def test_what_cannot_be_is_said(arguments, text):
    with pytest.raises(UserError, match=text):
        divide(**arguments)


def test_a_subject_with_too_few_windows_is_named():
    spec, names = ShardSpec("x", partition="subject", min_samples=10**4), [f"p{k}" for k in range(10)]
    with pytest.raises(UserError, match=r"subject p0 has only \d+ training windows; lower --min-samples \(now 10000\)"):
        partition(spec, LABELS, SUBJECTS, TRAIN, TEST, names)
    with pytest.raises(UserError, match="subject p4 has no test window; raise --test-fraction, leave the subject out"):
        partition(ShardSpec("x", partition="subject"), LABELS, SUBJECTS, TRAIN, TEST[SUBJECTS[TEST] != 4], names)


def test_a_client_without_a_test_window_of_its_classes_is_said():
    spec = ShardSpec("x", clients=10, partition="pathological", classes_per_client=1)
    with pytest.raises(UserError, match="a test window of a class it trains on; raise --test-fraction"):
        partition(spec, LABELS, SUBJECTS, TRAIN, TEST[LABELS[TEST] == 1])
