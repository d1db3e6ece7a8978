"""Coverage of client-level privacy: whatever one client sends, it moves those servers by their mean alone.

`fedkdx_plugin.testing.private_mean` checks it for every algorithm that says so (`Server.beyond_average`), among the
checks of algorithms; here are those that say otherwise, and rounds of nobody.
"""

from __future__ import annotations

import copy

import pytest
import torch

from baselines.fedavg import FedAvg
from fedkdx_plugin.engine.protection import uncovered
from fedkdx_plugin.testing import AlgorithmCase
from fedkdx_plugin.testing.private_mean import check_private_mean, why_not_private
from registry import catalog
from registry.errors import UserError
from registry.interface import UNSTATED, Round, beyond_average
from tests.fedkdx_plugin.privacy.cases import private

NAMES = list(catalog.BUILT_IN["algorithms"])
COVERED = [name for name in NAMES if not uncovered(catalog.load("algorithms", name))]
PARAMS = {"CFL": {"eps1": 1.0, "eps2": 0.0, "gamma": 0.0}}  # with which it splits clusters within three rounds


@pytest.mark.parametrize("name", COVERED)
def test_a_round_without_replies_is_noise_alone(name):
    federation = private(catalog.load("algorithms", name))
    federation._select = lambda round: []
    before = copy.deepcopy(dict(federation.server.networks()))
    record = federation.round(Round(1, 4))
    assert not record.selected and record.server["privacy_epsilon"] > 0
    moved = {name: t for name, t in federation.server.networks().items() if not torch.equal(t, before[name])}
    assert moved
    assert all(bool(t.isfinite().all()) for t in moved.values())


@pytest.mark.parametrize(
    "name", ["SCAFFOLD", "FedDyn", "FedNova", "FedDBE", "IFCA", "CFL", "FedPAC", "FedFTL", "FedAS"]
)
def test_what_is_refused_would_be_found_out(name):
    algorithm = catalog.load("algorithms", name)
    assert uncovered(algorithm)
    assert why_not_private(AlgorithmCase(algorithm, PARAMS.get(name, {})))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in COVERED])
def test_others_are_refused_by_name(name):
    server = catalog.load("algorithms", name)
    with pytest.raises(UserError, match=f"--dp client: not with {server.__name__}, wh(ich|ose)"):
        private(server)


def test_who_is_covered():
    """A change here is one of what can be promised: see the page on privacy."""
    assert set(NAMES) - set(COVERED) == {
        *("Local", "Centralised", "SCAFFOLD", "FedNova", "FedDyn", "IFCA", "CFL", "FedAMP", "FedAS", "FedFomo"),
        *("FedDBE", "FedPAC", "FedMTL", "FedGH", "FedProto", "FedDistill", "FedFTL"),
    }


class Mine(FedAvg):
    """Overrides `aggregate`, and says nothing."""

    def aggregate(self, replies, round):
        """Do what FedAvg does."""
        super().aggregate(replies, round)


class Derived(Mine):
    """Says nothing either."""


class Stated(Mine):
    """Says that nothing passes the mean."""

    beyond_average = ""


class Liar(FedAvg):
    """Says so, and remembers the largest number of samples, which becomes a rate."""

    beyond_average = ""
    most = 1

    def aggregate(self, replies, round):
        """Average, and move by that rate."""
        before, self.most = self.weights, max([self.most, *(reply.meta["samples"] for reply in replies.values())])
        super().aggregate(replies, round)
        self.weights = {name: own.lerp(self.weights[name], 1 / self.most) for name, own in before.items()}


def test_a_class_that_overrides_aggregate_has_to_say_it_anew():
    assert beyond_average(FedAvg) == beyond_average(Stated) == ""
    assert beyond_average(Mine) == beyond_average(Derived) == UNSTATED
    with pytest.raises(UserError, match="not with Derived, whose author has not stated what of the clients' replies"):
        private(Derived)


def test_the_check_of_ones_own_algorithm_finds_a_false_statement():
    check_private_mean(AlgorithmCase(Stated))
    check_private_mean(AlgorithmCase(Mine))  # says nothing, and is refused
    with pytest.raises(AssertionError, match=r"changes .* although the mean is the same: name what that is instead"):
        check_private_mean(AlgorithmCase(Liar))
