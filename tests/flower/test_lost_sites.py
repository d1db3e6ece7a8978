"""What becomes of a federation when sites are lost, late, restarted or send rubbish; without processes or a network."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from dataset_utils import shards
from fedkdx_plugin.engine.schedule import Schedule
from fedkdx_plugin.flower.protocol import Answer
from registry import catalog
from registry.errors import UserError
from registry.interface import Message, Round
from tests.conftest import Recorder, same_state
from tests.flower.fakes import make_coordinator, make_link, make_local

FEDKDX, FEDAVG = (catalog.load("algorithms", name) for name in ("FedKDX", "FedAvg"))


def run(algorithm, folder, tmp_path, rounds=4, each=None, **sites):
    """Run a federation of three sites, with `each(round, link)` before each round; return all that tests check."""
    link = make_link(algorithm, folder, tmp_path)
    coordinator, story = make_coordinator(algorithm, folder, link, Schedule(rounds, 1.0), **sites)
    records, train = Recorder(), coordinator.round

    def round(index: Round):
        if each:
            each(index.index, link)
        return train(index)

    coordinator.round = round
    coordinator.run([records])
    return coordinator, records.records, story


def test_a_lost_answer_leaves_no_trace_in_private_state(shard_folder, tmp_path):
    def each(round, link):
        link.spoil = {1: lambda data: None} if round == 2 else {}

    coordinator, records, story = run(FEDKDX, shard_folder, tmp_path, each=each)
    assert [record.lost for record in records] == [{}, {1: "no answer"}, {}, {}]
    assert [event.client for event in story.of("silent")] == [1]
    local = make_local(FEDKDX, shard_folder, Schedule(4, 1.0))
    local._lost = lambda selected, round: {1: "no answer"} if round.index == 2 else {}
    local.run()
    assert same_state(dict(coordinator.server.save().tensors), dict(local.server.save().tensors))


def test_a_round_of_too_few_updates_leaves_no_trace(shard_folder, tmp_path):
    """One answer is lost, so the other two would reveal each other: nothing of the round counts, here or there."""

    def each(round, link):
        link.spoil = {1: lambda data: None} if round == 2 else {}

    coordinator, records, _ = run(FEDKDX, shard_folder, tmp_path, each=each, min_updates=3)
    few = "one of 2 updates, of at least 3 (--min-updates)"
    assert [record.lost for record in records] == [
        {},
        {0: f"client 0: {few}", 1: "no answer", 2: f"client 2: {few}"},
        {},
        {},
    ]
    assert [record.rejected for record in records] == [{}] * 4
    local = make_local(FEDKDX, shard_folder, Schedule(4, 1.0))
    local._lost = lambda selected, round: dict.fromkeys(selected, "all") if round.index == 2 else {}
    local.run()
    assert same_state(dict(coordinator.server.save().tensors), dict(local.server.save().tensors))


def noise(data: bytes) -> bytes:
    return bytes(len(data))


def of_another_algorithm(data: bytes) -> bytes:
    return Message({"logits": torch.zeros(4, 4)}, {"samples": 3}).to_bytes()


def changed(change):
    def spoil(data: bytes) -> bytes:
        answer = Message.from_bytes(data)
        tensors = dict(answer.tensors)
        name = next(name for name in sorted(tensors) if name.startswith("reply/"))
        tensors[name] = change(tensors[name].clone())
        return Message(tensors, answer.meta).to_bytes()

    return spoil


RUBBISH = {
    "noise": noise,
    "another algorithm's": of_another_algorithm,
    "NaN": changed(lambda tensor: tensor.fill_(torch.nan)),
    "shape": changed(lambda tensor: tensor[None]),
    "another client's": lambda data: Message(
        Message.from_bytes(data).tensors, {**Message.from_bytes(data).meta, "client": 0}
    ).to_bytes(),
    "impossible metrics": lambda data: _wrong_metrics(data),
    "silence": lambda data: None,
    "Flower's error": lambda data: "Flower says: no",
}


def _wrong_metrics(data: bytes) -> bytes:
    answer = Message.from_bytes(data)
    tensors = {name: tensor + 2 if name.startswith("metrics/") else tensor for name, tensor in answer.tensors.items()}
    return Message(tensors, answer.meta).to_bytes()


@pytest.mark.parametrize("kind", RUBBISH)
def test_rubbish_costs_its_sender_alone_the_round(kind, shard_folder, tmp_path):
    def each(round, link):
        link.spoil = {1: RUBBISH[kind]} if round == 2 else {}

    coordinator, records, _ = run(FEDAVG, shard_folder, tmp_path, rounds=3, each=each)
    second = records[1]
    assert set(second.lost) | set(second.rejected) == {1}
    assert all(reason for reason in [*second.lost.values(), *second.rejected.values()])
    assert not records[0].lost and not records[2].lost and not records[2].rejected
    assert all(tensor.isfinite().all() for tensor in coordinator.server.networks().values())
    assert records[2].metrics["served"].client_samples.tolist() == [12, 12, 12]


def test_a_late_site_takes_part_from_when_it_joins(shard_folder, tmp_path):
    def each(round, link):
        link.away = {2} if round < 3 else set()

    link_away = run(FEDAVG, shard_folder, tmp_path, each=each, least=2)
    _, records, story = link_away
    # who is there is looked up when a round begins
    assert [record.selected for record in records[1:]] == [[0, 1], [0, 1, 2], [0, 1, 2]]
    assert [event.round for event in story.of("left") + story.of("joined") if event.client == 2][-1] == 3


def test_a_restarted_server_goes_on_from_its_checkpoint(shard_folder, tmp_path):
    whole, records, _ = run(FEDKDX, shard_folder, tmp_path / "whole", rounds=5)
    link = make_link(FEDKDX, shard_folder, tmp_path / "broken")

    class Killed(Exception):
        pass

    class Checkpoint(Recorder):
        def on_round_end(self, record):
            super().on_round_end(record)
            self.saved = first.save()
            if record.round == 2:  # by now, the sites have trained in the third
                raise Killed

    first, _ = make_coordinator(FEDKDX, shard_folder, link, Schedule(5, 1.0))
    before, after = Checkpoint(), Recorder()
    with pytest.raises(Killed):
        first.run([before])
    saved = Message.from_bytes(before.saved.to_bytes())
    second, _ = make_coordinator(FEDKDX, shard_folder, link, Schedule(5, 1.0))
    second.restore(saved)
    second.run([after], done=2)
    assert same_state(dict(second.server.save().tensors), dict(whole.server.save().tensors))
    accuracies = [record.metrics["served"].accuracy for record in [*before.records, *after.records]]
    assert accuracies == [record.metrics["served"].accuracy for record in records]


def test_a_site_that_lost_its_disk_is_refused_and_the_others_go_on(shard_folder, tmp_path):
    def each(round, link):
        if round == 3:
            shutil.rmtree(tmp_path / "site-1")

    _, records, story = run(FEDKDX, shard_folder, tmp_path, each=each)
    assert "goes on from round 2" in records[2].rejected[1]
    assert set(records[2].selected) == {0, 1, 2}
    assert {event.client for event in story.of("refused")} == {1}


def test_too_few_sites_are_waited_for_and_then_end_the_run(shard_folder, tmp_path):
    def each(round, link):
        link.away = {1, 2}

    with pytest.raises(UserError, match="1 of at least 2 sites are there after 0 s"):
        run(FEDAVG, shard_folder, tmp_path, each=each, least=2)


@pytest.mark.parametrize(
    "what, change", [("windows of shape", {"channels": ["x", "y"]}), ("classes", {"classes": list("dcba")})]
)
def test_data_of_another_kind_is_refused_by_name(what, change, shard_folder, tmp_path):
    loaded = shards.load(shard_folder)
    channels = len(change.get("channels", "xyz"))
    cut = [shard._replace(x=shard.x[:, :channels].copy()) for shard in (loaded.train[1], loaded.test[1])]
    about = {"name": "other", "classes": list("abcd"), "channels": list("xyz")} | change
    shards.write(tmp_path / "other", about, [shards.ClientData(*cut, {})])
    link = make_link(FEDAVG, shard_folder, tmp_path)
    link.setups[1] = replace(link.setups[1], folder=tmp_path / "other", shard=0)
    coordinator, story = make_coordinator(FEDAVG, shard_folder, link, Schedule(1, 1.0), least=2)
    records = Recorder()
    coordinator.run([records])
    assert records.records[0].selected == [0, 2]
    (event,) = story.of("refused")
    assert event.client == 1 and event.detail.startswith(what)
    assert link.refused == {1: event.detail}


def test_another_version_is_refused_by_name(shard_folder, tmp_path):
    link = make_link(FEDAVG, shard_folder, tmp_path)
    sites = link.sites
    link.sites = lambda: {
        id: replace(site, versions={"fedkdx": "0.0.1"} if id == 1 else site.versions) for id, site in sites().items()
    }
    coordinator, story = make_coordinator(FEDAVG, shard_folder, link, Schedule(1, 1.0), least=2)
    coordinator.run()
    assert [(event.client, event.detail[:18]) for event in story.of("refused")] == [(1, "runs fedkdx 0.0.1,")]


def test_an_answer_shows_no_control_letters(shard_folder):
    sent = Answer(0, 1, dropped="\x1b[2Jgone\n" + "x" * 1000).to_message()
    dropped = Answer.from_message(Message.from_bytes(sent.to_bytes()), 0, 1, 4).dropped
    assert dropped.isprintable() and len(dropped) <= 300


def test_private_state_can_be_read_by_its_owner_alone_also_in_a_folder_that_others_can_enter(shard_folder, tmp_path):
    state = tmp_path / "site-0"
    state.mkdir()
    state.chmod(0o755)
    run(FEDKDX, shard_folder, tmp_path, rounds=1)
    (kept,) = state.rglob("*.safetensors")
    assert [path.stat().st_mode & 0o777 for path in (state, kept.parent.parent, kept.parent, kept)] == [
        0o755,
        0o700,
        0o700,
        0o600,
    ]
