"""FedAMP: attention and cloud models in float64, clients that are alike, what new clients are sent."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from baselines.fedamp import FedAMP, FedAMPParams
from baselines.local import Local
from registry.interface import Message, Round
from tests.baselines.checks import goes_on_identically
from tests.conftest import make_data, make_federation, make_task, same_state

NAMES = {"model.head.bias": (4,), "model.fc.bias": (16,), "model.bn.running_var": (8,)}


def server(count: int, **params) -> tuple[FedAMP, list[dict[str, np.ndarray]]]:
    """Return a server that has heard `count` clients, and their models."""
    rng = np.random.default_rng(0)
    models = [{name: 1 + rng.normal(size=shape) for name, shape in NAMES.items()} for _ in range(count)]
    initial = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in NAMES.items()}
    one = FedAMP(make_task(), FedAMPParams(**params), initial)
    replies = [Message({n: torch.from_numpy(own) for n, own in model.items()}, {"samples": 3}) for model in models]
    one.aggregate(dict(enumerate(replies)), Round(1, 2))
    return one, models


def test_cloud_models_are_the_papers():
    one, models = server(4, self_weight=0.3, sigma=7.0)
    flat = [np.concatenate([model[name].ravel() for name in NAMES if "running" not in name]) for model in models]
    for i in range(4):
        cosines = [flat[i] @ other / np.linalg.norm(flat[i]) / np.linalg.norm(other) for other in flat]
        raw = [0.0 if j == i else np.exp(7.0 * cosine) for j, cosine in enumerate(cosines)]
        shares = [0.3 if j == i else 0.7 * value / sum(raw) for j, value in enumerate(raw)]
        assert list(one.attention(i).values()) == pytest.approx(shares, rel=1e-12)
        sent = one.message(i, Round(2, 2)).tensors
        for name in NAMES:
            right = sum(share * model[name] for share, model in zip(shares, models, strict=True))
            np.testing.assert_allclose(sent[name], right, rtol=1e-12)


def test_without_scale_all_others_count_alike_and_alone_a_client_has_its_own():
    one, _ = server(4, self_weight=0.4, sigma=0.0)
    assert one.attention(2) == pytest.approx({0: 0.2, 1: 0.2, 2: 0.4, 3: 0.2})
    one, models = server(1)
    np.testing.assert_array_equal(one.message(0, Round(2, 2)).tensors["model.fc.bias"], models[0]["model.fc.bias"])
    assert not one.message(5, Round(2, 2)).tensors  # new


def test_with_its_own_model_alone_and_no_pull_it_is_local():
    alone, one = (
        make_federation(Local, join_ratio=1),
        make_federation(FedAMP, join_ratio=1, params={"self_weight": 1.0, "mu": 0.0}),
    )
    alone.run()
    one.run()
    assert all(same_state(*pair) for pair in zip(alone.workspace.kept, one.workspace.kept, strict=True))


def test_clients_of_a_kind_find_each_other():
    """Of two groups with opposite labels, each has the larger share for its own."""
    data = make_data(sizes=(60, 60, 60, 60))
    for id in (1, 3):
        data.train_y[id] = 3 - data.train_y[id]
    federation = make_federation(FedAMP, data, rounds=6, join_ratio=1)
    federation.run()
    for id in range(4):
        shares = federation.server.attention(id)
        assert shares[(id + 2) % 4] > max(shares[(id + 1) % 4], shares[(id + 3) % 4])


def test_a_saved_server_goes_on_identically():
    assert goes_on_identically(lambda: make_federation(FedAMP, rounds=4))
