"""kNN-Per: FedAvg's model mixed with the nearest of a client's own windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from baselines.fedavg import FedAvg
from baselines.knnper import KNNPer
from registry.interface import Round
from tests.baselines import reference
from tests.baselines.checks import awkward_data, overheard, run, travels
from tests.conftest import SHAPE, TinyNet, make_federation, same_state


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
            expected = share * reference.neighbours(row, h.numpy(), one_hot) + (1 - share) * p
            np.testing.assert_allclose(found[n].detach(), expected, atol=1e-5)
    assert max(shares) > 0


@pytest.mark.parametrize("backend", ["sequential", "stacked"])
def test_weight_decay_leaves_the_copy_as_it_was_received(backend):
    """The features that it remembers are of this model, and would no longer fit another."""
    federation = make_federation(KNNPer, rounds=1, join_ratio=1, backend=backend, optimizer="adamw")
    sent = {name.removeprefix("model."): tensor.clone() for name, tensor in federation.server.weights.items()}
    run(federation)
    for kept in federation.workspace.kept:
        for name, tensor in sent.items():
            place = "personal." if name.startswith("head.") else "personal.base."
            assert torch.equal(kept[place + name], tensor), name


def test_awkward_clients():
    """One of a single window has nothing to choose a share by."""
    made = make_federation(KNNPer, awkward_data(), rounds=3, join_ratio=1)
    run(made)
    assert made.workspace.kept[0]["personal.share"] == 0
