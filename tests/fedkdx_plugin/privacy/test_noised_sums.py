"""Secure aggregation of replies to which the clients have added their shares of the noise."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace

import pytest
import torch

from baselines.fedavg import FedAvg
from fedkdx_plugin.engine.faults import Faults
from fedkdx_plugin.engine.rounds import Federation
from fedkdx_plugin.engine.schedule import Schedule
from fedkdx_plugin.engine.secure_sums import OwnParties
from fedkdx_plugin.engine.training import Settings
from fedkdx_plugin.flower.coordinator import Coordinator
from fedkdx_plugin.privacy.options import CLIENT, DISTRIBUTED, Privacy
from fedkdx_plugin.privacy.secure_aggregation.fixed_point import largest_error
from fedkdx_plugin.privacy.secure_aggregation.messages import MASK, UNMASK
from registry import catalog
from registry.interface import Round
from tests.conftest import make_data, make_task, same_state
from tests.fedkdx_plugin.privacy.cases import SIZES
from tests.flower.fakes import SETTINGS, make_coordinator, make_link
from tests.flower.test_secure_sites import SecureLink

SHARED = Privacy(CLIENT, 8.0, 1e-2, 0.5, DISTRIBUTED)


def federation(secure: bool, algorithm=FedAvg, **settings) -> Federation:
    settings = {"batch_size": 16, "local_epochs": 1, "learning_rate": 0.05, "privacy": SHARED} | settings
    task = replace(make_task(), norm="group")
    schedule = Schedule(1, 1.0, secure=secure)
    return Federation(
        algorithm, task, algorithm.Params(), make_data(SIZES), Settings(**settings), schedule, "sequential"
    )


@pytest.mark.parametrize("name", ["FedAvg", "FedAvgM", "FedPer"])
def test_the_server_is_left_with_the_same_noised_mean(name):
    """With equal weights, whatever the number of samples, as the noise of all must count the same."""
    algorithm = catalog.load("algorithms", name)
    ends, noise = [], []
    for secure in (False, True):
        one = federation(secure, algorithm)
        before = one.server.networks()
        with closing(one):
            record = one.round(Round(1, 1, 1.0))
        assert not record.rejected and not record.notes
        assert record.server["privacy_epsilon"] > 0
        ends.append(one.server.networks())
        noise.append(max(float((ends[-1][key] - before[key]).abs().max()) for key in before))
    assert min(noise) > 1e-2
    for key, plain in ends[0].items():
        bound = largest_error(len(SIZES), len(SIZES)) + float(plain.abs().max()) * 2**-21  # of two float32 sums
        assert torch.allclose(ends[1][key], plain, rtol=0, atol=bound)


def test_a_sum_with_too_little_noise_is_not_unmasked(monkeypatch, capsys):
    """The server must not learn it and then let it not count."""
    asked, ask = [], OwnParties.ask
    monkeypatch.setattr(OwnParties, "ask", lambda self, step, r: (asked.append(step), ask(self, step, r))[1])
    one = federation(True, faults=Faults(corrupt=0.3))
    before = {name: tensor.clone() for name, tensor in one.server.weights.items()}
    with closing(one):
        record = one.round(Round(1, 1, 1.0))
    assert record.rejected and same_state(before, dict(one.server.weights))
    assert MASK in asked and UNMASK not in asked
    assert "took step 'mask'; 5 are needed" in capsys.readouterr().err


def test_sites_put_their_masks_on_what_they_have_noised(shard_folder, tmp_path):
    algorithm = catalog.load("algorithms", "FedBN")
    settings = replace(SETTINGS, privacy=SHARED, local_epochs=1)
    link = SecureLink(make_link(algorithm, shard_folder, tmp_path, settings=settings))
    schedule = Schedule(2, 1.0, secure=True)
    coordinator, _ = make_coordinator(algorithm, shard_folder, link, schedule, settings=settings)
    assert isinstance(coordinator, Coordinator)
    before = dict(coordinator.server.weights)
    coordinator.meet(Round(1, 2))
    record = coordinator.round(Round(1, 2, 1.0))
    assert not record.lost and not record.rejected and not record.notes
    assert max(float((own - before[name]).abs().max()) for name, own in coordinator.server.weights.items()) > 1e-2
    link.spoil_step = {(1, MASK): lambda data: None}
    held = dict(coordinator.server.weights)
    record = coordinator.round(Round(2, 2, 1.0))
    assert sorted(record.lost) == [0, 1, 2] and same_state(held, dict(coordinator.server.weights))
