"""Protected rounds as a server sees them: noised replies, or their mean alone; and noise that shadow runs have."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch

from baselines.fedavg import FedAvg
from fedkdx_plugin.privacy.audit.view import see
from fedkdx_plugin.privacy.options import CLIENT, DISTRIBUTED, Privacy
from registry.interface import Round
from tests.fedkdx_plugin.privacy.cases import NoNoise, private
from tests.fedkdx_plugin.privacy.test_secure_runs import SIZES, federation


def test_of_secure_sums_only_the_mean_is_seen():
    with closing(federation(secure=True)) as one:
        (mean,) = see(one, Round(1, 2))
    with closing(federation(secure=False)) as one:
        singles = see(one, Round(1, 2))
    clients = tuple(range(len(SIZES)))
    assert mean.clients == clients
    assert [update.clients for update in singles] == [(client,) for client in clients]
    total = sum(SIZES)
    for name, change in mean.change.items():
        expected = sum(update.change[name] * size / total for update, size in zip(singles, SIZES, strict=True))
        torch.testing.assert_close(change, expected, rtol=1e-3, atol=1e-4)  # fixed point


@pytest.mark.parametrize("noise", ["central", DISTRIBUTED])
def test_noise_by_the_clients_is_in_what_is_seen_and_that_of_the_server_is_not(noise):
    """Whole updates are far longer than C, so that clipping and noise cannot be missed."""
    changes = []
    for quiet in (False, True):
        with closing(private(FedAvg, Privacy(CLIENT, 8.0, 1e-2, 1e-3, noise))) as one:
            if quiet:
                one.protection.source = NoNoise()
            updates = see(one, Round(1, 4))
            assert [update.clients for update in updates] == [(client,) for client in range(5)]
            changes.append([torch.cat([t.reshape(-1) for t in update.change.values()]) for update in updates])
    for noisy, plain in zip(*changes, strict=True):
        if noise == "central":
            torch.testing.assert_close(noisy, plain)
            assert plain.norm() > 0.01
        else:
            assert plain.norm() <= 1e-3 * (1 + 1e-2)
            assert (noisy - plain).norm() > 2 * plain.norm()
