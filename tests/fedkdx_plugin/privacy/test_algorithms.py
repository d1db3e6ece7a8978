"""Whatever one client sends, it moves a server by the mean alone, and the mean by no more than the bound allows.

For every algorithm that says so (`Server.beyond_average`); and those that say otherwise are found out by the same test.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from fedkdx_plugin.engine.protection import uncovered
from registry import catalog
from registry.errors import UserError
from registry.interface import UNSTATED, Message, Round, Server, beyond_average
from tests.conftest import same_state
from tests.fedkdx_plugin.privacy.cases import BUDGET, SIZES, Overheard, after, lie, private, replies_of

NAMES = list(catalog.BUILT_IN["algorithms"])
COVERED = [name for name in NAMES if not uncovered(catalog.load("algorithms", name))]
ALL = list(range(len(SIZES)))


def state(server: Server, without: int, round: Round, whole: bool) -> list[Message]:
    """Return all that a server tells anybody but one client, messages and models to predict with; or all it keeps."""
    sent = server.messages(ALL, round)
    own = {name: t for name, t in server.networks().items() if not name.startswith(f"{without}/")}
    told = [sent[id] for id in ALL if id != without] + [Message(own, server.figures())]
    return [*told, server.save()] if whole else told


def same(one: list[Message], other: list[Message]) -> bool:
    return all(
        same_state(dict(a.tensors), dict(b.tensors)) and repr(a.meta) == repr(b.meta)
        for a, b in zip(one, other, strict=True)
    )


def depends_on_the_mean_alone(server: Server, replies: Mapping[int, Message], round: Round) -> bool:
    """Tell whether a client that lies moves nothing if the mean stays what it was without the lie."""
    following = Round(round.index + 1, round.total)
    honest, mean = after(server, replies, round)
    for kind in ("huge", "usual", "nothing"):
        false = lie(server, 1, replies[1], kind)
        others = {id: reply for id, reply in replies.items() if id != 1}
        changed = dict(sorted((others | ({1: false} if false else {})).items()))
        lied, _ = after(server, changed, round, mean)
        # what a server keeps of a client that sent nothing, such as what it holds, is for that client alone
        if not same(*(state(one, 1, following, whole=bool(false)) for one in (honest, lied))):
            return False
    return True


def within_the_bound(server: Server, replies: Mapping[int, Message], round: Round, clip: float) -> bool:
    """Tell whether a client that lies moves the mean, and no further than replacing or leaving out its reply may."""
    _, mean = after(server, replies, round)
    for kind in ("huge", "opposite", "nothing"):
        false = lie(server, 1, replies[1], kind)
        changed = {id: false if id == 1 else reply for id, reply in replies.items() if id != 1 or false}
        _, moved = after(server, changed, round)
        far = torch.stack([(moved[n] - mean[n]).square().sum() for n in mean]).sum().sqrt()
        most = (2 if false else 1) * clip / len(SIZES)
        if not 0 < float(far) <= most * (1 + 1e-9):
            return False
    return True


@pytest.mark.parametrize("name", COVERED)
def test_a_lie_moves_the_mean_alone_and_that_no_further_than_the_bound(name):
    federation = private(catalog.load("algorithms", name))
    for index in (1, 2):
        federation.round(Round(index, 4))
    round = Round(3, 4)
    server, replies = federation.server, replies_of(federation, round)
    assert depends_on_the_mean_alone(server, replies, round)
    assert within_the_bound(server, replies, round, BUDGET.clip)


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
def test_what_is_refused_would_be_found_out(name, monkeypatch):
    """By a client that takes part for the first time in the second round, in which not everybody does."""
    algorithm = catalog.load("algorithms", name)
    assert uncovered(algorithm)
    monkeypatch.setattr(algorithm, "beyond_average", "")
    params = {"eps1": 1.0, "eps2": 0.0, "gamma": 0.0} if name == "CFL" else {}
    federation = private(algorithm, replace(BUDGET, clip=10.0), params=params)
    federation._select = lambda round: [0, 2, 3, 4]
    try:
        federation.round(Round(1, 4))
        federation.server.longest = 1e60  # so that CFL takes its cluster for stationary, and splits it
        replies = replies_of(federation, Round(2, 4), (0, 1, 2, 3))
        honest = depends_on_the_mean_alone(federation.server, replies, Round(2, 4))
        bound = within_the_bound(federation.server, replies, Round(2, 4), 10.0)
    except (Overheard, RuntimeError, KeyError):  # it takes several means, or one whose `around` is unknown
        return
    assert not honest or not bound


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


def test_a_class_that_overrides_aggregate_has_to_say_it_anew():
    from baselines.fedavg import FedAvg

    class Mine(FedAvg):
        def aggregate(self, replies, round):
            super().aggregate(replies, round)

    class Derived(Mine):
        pass

    class Stated(Mine):
        beyond_average = ""

    assert beyond_average(FedAvg) == beyond_average(Stated) == ""
    assert beyond_average(Mine) == beyond_average(Derived) == UNSTATED
    with pytest.raises(UserError, match="whose clients' what its author has not stated"):
        private(Derived)
