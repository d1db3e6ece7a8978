"""kNN-Per: FedAvg's model mixed with the nearest of a client's own windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from baselines.fedavg import FedAvg
from baselines.knnper import CAPACITY, KNNPer, Remembering, best_share, neighbours, remembered
from registry.interface import Batch, Round
from tests.baselines.checks import awkward_data, overheard, run, travels
from tests.conftest import SHAPE, TinyNet, make_federation, same_state


def by_loops(h, keys, labels, without=None):
    """Compute the paper's formula, key by key."""
    distance = [(np.linalg.norm(h - key), i) for i, key in enumerate(keys) if i != without]
    near = sorted(distance)[:10]
    p = np.zeros(labels.shape[1])
    for d, i in near:
        p += np.exp(-d) * labels[i]
    return p / sum(np.exp(-d) for d, _ in near)


@pytest.mark.parametrize("count", [30, 4])
@pytest.mark.parametrize("leave_out", [False, True])
def test_the_nearest_vote_as_in_the_paper(count, leave_out):
    rng = np.random.default_rng(0)
    keys, labels = np.zeros((40, 5)), np.zeros((40, 3))
    keys[:count], labels[np.arange(count), rng.integers(3, size=count)] = rng.normal(size=(count, 5)), 1
    h = keys[:count] if leave_out else rng.normal(size=(20, 5))
    found = neighbours(*(torch.from_numpy(part) for part in (h, keys, labels)), leave_out)
    for n, row in enumerate(h):
        expected = by_loops(row, keys[:count], labels[:count], n if leave_out else None)
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


def test_the_server_is_fedavgs_and_memories_are_of_the_model_received(double):
    plain, made = (make_federation(algorithm, rounds=2, join_ratio=1) for algorithm in (FedAvg, KNNPer))
    heard = overheard(made)
    for t in (1, 2):
        start = dict(made.server.weights)
        for federation in (plain, made):
            federation.round(Round(t, 2))
    assert same_state(dict(plain.server.weights), dict(made.server.weights))
    net = TinyNet(SHAPE, 4)
    net.load_state_dict({n.removeprefix("model."): t for n, t in start.items()}, strict=False)
    net.eval()
    shares = set()
    for id, kept in enumerate(made.workspace.kept):
        x, y = made.data.train_x[id], made.data.train_y[id]
        order = y.argsort(stable=True)
        h = net.features(x[order]).detach()
        torch.testing.assert_close(kept["personal.keys"][: len(y)], h)
        assert kept["personal.labels"].sum() == len(y) and not kept["personal.keys"][len(y) :].any()
        assert not travels(kept["personal.keys"], heard)
        # what it predicts, by the formula
        share = float(kept["personal.share"])
        shares.add(share)
        served = made.workspace.enter(id)
        assert served.serves() == "personal"
        test = made.data.test_x[:3]
        found = served.nets["personal"].eval()(test).logits.exp()
        one_hot = np.eye(4)[y[order]]
        for n, row in enumerate(net(test).features.detach().numpy()):
            p = net(test).logits.softmax(1)[n].detach().numpy()
            expected = share * by_loops(row, h.numpy(), one_hot) + (1 - share) * p
            np.testing.assert_allclose(found[n].detach(), expected, atol=1e-5)
    assert max(shares) > 0


def test_a_memory_is_bounded_and_every_class_has_its_part():
    data = Batch(torch.arange(3 * CAPACITY).float(), torch.arange(3 * CAPACITY) % 3)
    kept = remembered(data)
    assert len(kept.y) == CAPACITY and all(abs(int((kept.y == c).sum()) - CAPACITY / 3) < 2 for c in range(3))
    few = Batch(torch.arange(5.0), torch.tensor([1, 0, 1, 0, 2]))
    assert remembered(few).x.tolist() == [1, 3, 0, 2, 4]


def test_awkward_clients():
    """One of a single window has nothing to choose a share by."""
    made = make_federation(KNNPer, awkward_data(), rounds=3, join_ratio=1)
    run(made)
    assert made.workspace.kept[0]["personal.share"] == 0
