"""Client-level privacy between sites: secret draws and noise, at the server or at the sites."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from baselines.fedbn import FedBN
from fedkdx_plugin.engine.schedule import Schedule
from fedkdx_plugin.flower import site
from fedkdx_plugin.privacy.accounting import FIXED, POISSON, Sampling, noise_multiplier, spent
from fedkdx_plugin.privacy.noise import SecretNoise
from fedkdx_plugin.privacy.options import CLIENT, DISTRIBUTED, Privacy
from registry.errors import UserError
from registry.interface import BadMessage, Message, Round
from tests.conftest import Recorder, same_state
from tests.fedkdx_plugin.privacy.cases import NoNoise
from tests.flower.fakes import SETTINGS, make_coordinator, make_link

BUDGET = Privacy(CLIENT, 8.0, 1e-2, 0.5)
SHARED = replace(BUDGET, noise=DISTRIBUTED)
EVERYBODY = Schedule(2, 1.0)
SOME = Schedule(2, 0.7, sampling=POISSON)


def made(folder, state, privacy=BUDGET, schedule=EVERYBODY, **options):
    settings = replace(SETTINGS, privacy=privacy, local_epochs=1)
    link = make_link(FedBN, folder, state, settings=settings)
    coordinator, _ = make_coordinator(FedBN, folder, link, schedule, settings=settings, **options)
    coordinator.meet(Round(1, schedule.rounds))
    return coordinator, link


def test_noise_and_draws_are_nobodys_to_repeat(shard_folder, tmp_path):
    ends, drawn = [], []
    for name in "ab":
        coordinator, _ = made(shard_folder, tmp_path / name, schedule=SOME)
        assert isinstance(coordinator.protection.source, SecretNoise)
        recorder = Recorder()
        coordinator.run([recorder])
        noise = noise_multiplier(8.0, 1e-2, 2, Sampling(3, 0.7 * 3, POISSON))
        sampling = coordinator.protection.plan.sampling
        assert [r.server["privacy_epsilon"] for r in recorder.records] == [
            spent(noise, 1e-2, t, sampling) for t in (1, 2)
        ]
        ends.append(dict(coordinator.server.weights))
        drawn.append([tuple(coordinator._select(Round(1, 2, 0.7))) for _ in range(40)])
    assert not same_state(*ends)
    assert len(set(drawn[0])) > 1 and drawn[0] != drawn[1]  # the same round, again and again: not from the seed


def test_sites_add_their_shares_before_anything_leaves(shard_folder, tmp_path, monkeypatch):
    ends = {}
    for name, privacy, source in (
        ("central", BUDGET, NoNoise),
        ("shares", SHARED, NoNoise),
        ("noised", SHARED, SecretNoise),
    ):
        monkeypatch.setattr(site, "SecretNoise", source)
        coordinator, _ = made(shard_folder, tmp_path / name, privacy)
        coordinator.protection.source = NoNoise()
        record = coordinator.round(Round(1, 2))
        assert not record.lost and not record.rejected
        assert ("privacy_epsilon_server" in record.server) == (privacy is SHARED)
        ends[name] = coordinator.server.weights
    for name, central in ends["central"].items():
        assert torch.allclose(central, ends["shares"][name], atol=1e-6)
        assert not torch.allclose(central, ends["noised"][name], atol=1e-3)


def test_a_site_that_failed_sends_noise_alone(shard_folder, tmp_path, monkeypatch):
    train = site.Sequential.train_one
    monkeypatch.setattr(
        site.Sequential, "train_one", lambda s, id, *a: site.NonFinite("not finite") if id == 1 else train(s, id, *a)
    )
    coordinator, _ = made(shard_folder, tmp_path, SHARED)
    record = coordinator.round(Round(1, 2))
    assert not record.lost and not record.rejected and not record.notes


def test_whether_a_round_counts_does_not_depend_on_what_a_site_sends(shard_folder, tmp_path, monkeypatch):
    coordinator, _ = made(shard_folder, tmp_path, min_updates=3)
    coordinator.protection.source = NoNoise()
    before = {name: tensor.clone() for name, tensor in coordinator.server.weights.items()}
    check = coordinator.server.check_reply

    def refuses(client: int, reply: Message) -> None:
        if client == 1:
            raise BadMessage("wrong")
        check(client, reply)

    monkeypatch.setattr(coordinator.server, "check_reply", refuses)
    record = coordinator.round(Round(1, 2))
    assert list(record.rejected) == [1] and not record.lost
    assert not same_state(before, coordinator.server.weights)


def test_a_restart_goes_on_with_bound_and_budget(shard_folder, tmp_path):
    coordinator, _ = made(shard_folder, tmp_path / "a", replace(BUDGET, clip=None))
    coordinator.round(Round(1, 2))
    saved = Message.from_bytes(coordinator.save().to_bytes())
    again, _ = made(shard_folder, tmp_path / "b", replace(BUDGET, clip=None))
    again.restore(saved)
    assert again.protection.clip == coordinator.protection.clip != 0.1
    longer, _ = made(shard_folder, tmp_path / "c", replace(BUDGET, clip=None), Schedule(5, 1.0))
    with pytest.raises(UserError, match="-gr 5: with --dp the noise was measured for 2 rounds"):
        longer.restore(saved)


@pytest.mark.parametrize(("privacy", "more"), [(BUDGET, 1), (SHARED, 2)])
def test_what_a_restart_releases_again_counts_again(shard_folder, tmp_path, privacy, more):
    schedule = Schedule(4, 1.0)
    coordinator, _ = made(shard_folder, tmp_path / "a", privacy, schedule)
    coordinator.round(Round(1, 4))
    saved = coordinator.save()
    for times in (1, 2):  # it may be killed again before it is further
        again, _ = made(shard_folder, tmp_path / f"b{times}", privacy, schedule)
        again.restore(Message.from_bytes(saved.to_bytes()))
        plan, sums = again.protection.plan, 1 + times * more
        assert again.figures()["privacy_epsilon"] == spent(plan.noise, 1e-2, sums, plan.sampling)
        ends = spent(plan.noise, 1e-2, 4 + times * more, plan.sampling)
        assert f"the run ends at ε = {ends:.2f}, not 8" in again.made_again
        saved = again.save()


def test_a_finished_run_releases_nothing_again(shard_folder, tmp_path):
    coordinator, _ = made(shard_folder, tmp_path / "a", schedule=Schedule(1, 1.0))
    coordinator.round(Round(1, 1))
    again, _ = made(shard_folder, tmp_path / "b", schedule=Schedule(1, 1.0))
    again.restore(coordinator.save())
    assert again.figures() == coordinator.figures() and not again.made_again


def test_privacy_must_not_lean_on_draws_that_sites_know(shard_folder, tmp_path):
    with pytest.raises(UserError, match="-jr 1"):
        made(shard_folder, tmp_path, schedule=Schedule(2, 0.7, sampling=FIXED))


def test_no_statistics_of_windows_are_sent_without_noise(federated_folder, tmp_path):
    with pytest.raises(UserError, match="--scale federated: not with --dp client"):
        made(federated_folder, tmp_path)
