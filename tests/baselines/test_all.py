"""What every algorithm of the catalog must do, whatever it is."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch

from fedkdx_plugin.models.cnn import CNNSmall
from fedkdx_plugin.models.cnn_lstm import CNNLSTM
from registry import catalog
from registry.interface import Message, Round, Task
from tests.conftest import CLASSES, SHAPE, Recorder, make_data, make_federation, make_task, same_state, smaller_student

NAMES = list(catalog.BUILT_IN["algorithms"])
FEDERATED = [name for name in NAMES if name not in ("Local", "Centralised")]


def load(name: str):
    return catalog.load("algorithms", name)


def run(federation) -> Recorder:
    recorder = Recorder()
    federation.run([recorder])
    return recorder


@pytest.mark.parametrize("name", NAMES)
def test_same_seed_same_bits(name):
    one, two = (make_federation(load(name), rounds=3) for _ in range(2))
    records = [run(one).records, run(two).records]
    assert same_state(one.save().tensors, two.save().tensors)
    for a, b in zip(*records, strict=True):
        assert (a.train_loss, a.bytes_up, a.bytes_down) == (b.train_loss, b.bytes_up, b.bytes_down)
        assert a.metrics["served"].loss == b.metrics["served"].loss


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model", [CNNSmall, CNNLSTM])
def test_every_model_and_a_smaller_student(name, model):
    task = Task(SHAPE, CLASSES, model, smaller_student(load(name), model))
    federation = make_federation(load(name), make_data(sizes=(20, 3)), task, rounds=2, join_ratio=1, local_epochs=1)
    records = run(federation).records
    assert not any(record.rejected for record in records)
    assert math.isfinite(records[-1].metrics["served"].loss)


@pytest.mark.parametrize("name", NAMES)
def test_unequal_clients_rare_clients_and_absent_classes(name):
    """One window, one class, a client first seen late: nothing is dropped, everything is finite."""
    data = make_data(sizes=(1, 50, 9, 33, 17))
    data.train_y[2].fill_(1)
    for y in data.train_y:
        y[y == 3] = 0  # a class that nobody has to train on
    federation = make_federation(load(name), data, rounds=8, join_ratio=0.2)
    records = run(federation).records
    assert not any(record.rejected for record in records)
    assert all(tensor.isfinite().all() for tensor in federation.save().tensors.values())
    served = records[-1].metrics["served"]
    assert all(math.isfinite(value) for value in (served.accuracy, served.f1, served.recall, served.auc, served.loss))


@pytest.mark.parametrize("name", NAMES)
def test_local_batch_norm_never_travels(name):
    federation = make_federation(load(name), task=make_task(local_bn=True), rounds=2, join_ratio=1)
    sent = listen(federation)
    run(federation)
    assert not [key for key in sent if ".bn." in key]


def listen(federation) -> dict[str, list[torch.Tensor]]:
    """Every tensor that goes over the wire from now on, by name."""
    sent: dict[str, list[torch.Tensor]] = {}
    aggregate, message = federation.server.aggregate, federation.server.message

    def hear(replies, round):
        for reply in replies.values():
            for key, tensor in reply.tensors.items():
                sent.setdefault(key, []).append(tensor.clone())
        aggregate(replies, round)

    def tell(id, round):
        told = message(id, round)
        for key, tensor in told.tensors.items():
            sent.setdefault(key, []).append(tensor.clone())
        return told

    federation.server.aggregate, federation.server.message = hear, tell
    return sent


@pytest.mark.parametrize("name", NAMES)
def test_private_state_is_never_uploaded_by_value(name):
    """But for what the client had from the server and did not change, and for weights of all ones and the like."""
    federation = make_federation(load(name), rounds=2, join_ratio=1)
    up: list[torch.Tensor] = []
    down: list[torch.Tensor] = []
    aggregate, message = federation.server.aggregate, federation.server.message

    def hear(replies, round):
        up.extend(tensor.clone() for reply in replies.values() for tensor in reply.tensors.values())
        aggregate(replies, round)

    def tell(id, round):
        told = message(id, round)
        down.extend(tensor.clone() for tensor in told.tensors.values())
        return told

    federation.server.aggregate, federation.server.message = hear, tell
    run(federation)

    def among(tensor: torch.Tensor, others: list[torch.Tensor]) -> bool:
        return any(other.shape == tensor.shape and torch.equal(other, tensor) for other in others)

    names = federation.workspace.private
    secrets = [kept[key] for kept in federation.workspace.kept for key in kept.keys() & names]
    secrets = [tensor for tensor in secrets if tensor.unique().numel() > 2 and not among(tensor, down)]
    assert bool(secrets) == bool(names)
    assert not any(among(tensor, up) for tensor in secrets)


@pytest.mark.parametrize("name", NAMES)
def test_windows_and_labels_are_in_no_message(name):
    """Nobody is sent another's windows; pooling data is not a message of the algorithm."""
    data = make_data()
    federation = make_federation(load(name), data, rounds=2, join_ratio=1)
    sent = listen(federation)
    run(federation)
    windows = torch.cat([x.flatten(1) for x in data.train_x])
    for tensors in sent.values():
        for tensor in tensors:
            if tensor.is_floating_point() and tensor.numel() and tensor.numel() % windows.shape[1] == 0:
                rows = tensor.reshape(-1, windows.shape[1])
                assert not (torch.cdist(rows.float(), windows) == 0).any()


@pytest.mark.parametrize("name", NAMES)
def test_replies_may_arrive_in_any_order(name):
    one, two = (make_federation(load(name), rounds=3, join_ratio=1) for _ in range(2))
    train = two.backend.train
    two.backend.train = lambda messages, round: dict(reversed(train(messages, round).items()))
    one.run()
    two.run()
    assert same_state(one.save().tensors, two.save().tensors)


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_federation_goes_on_as_if_nothing_had_happened(name):
    whole, first, second = (make_federation(load(name), rounds=5) for _ in range(3))
    whole.run()
    for t in (1, 2):
        first.round(Round(t, 5))
    second.restore(Message.from_bytes(first.save().to_bytes()))
    second.run(done=2)
    assert same_state(whole.save().tensors, second.save().tensors)
    assert whole.save().meta == second.save().meta


@pytest.mark.parametrize("name", FEDERATED)
def test_asking_the_server_for_a_message_changes_nothing(name):
    asked, quiet = (make_federation(load(name), rounds=3) for _ in range(2))
    for t in (1, 2, 3):
        for id in range(4):
            asked.server.message(id, Round(t, 3))
        asked.round(Round(t, 3))
        quiet.round(Round(t, 3))
    assert same_state(asked.save().tensors, quiet.save().tensors)


@pytest.mark.parametrize("name", FEDERATED)
def test_federated_learning_beats_chance(name):
    data = make_data(sizes=(60, 40, 80, 50), tests=40)
    federation = make_federation(load(name), data, rounds=20, join_ratio=1, local_epochs=3)
    assert run(federation).records[-1].metrics["served"].accuracy > 0.5  # four classes


@pytest.mark.parametrize("name", FEDERATED)
def test_what_clients_learn_comes_from_each_other(name):
    """Change one client's windows: another one, trained in the next round, comes out different."""
    data = make_data()
    other = make_data()
    other.train_x[0].mul_(-1).add_(0.5)
    kept = []
    for windows in (data, other):
        federation = make_federation(load(name), windows, rounds=3, join_ratio=1)
        federation.run()
        kept.append({**federation.workspace.kept[3], **federation.server.networks()})
    assert not same_state(*kept)


@pytest.mark.parametrize("name", NAMES)
def test_hyper_parameters_are_documented(name):
    for field in fields(load(name).Params):
        assert field.metadata["help"], field.name


@pytest.mark.parametrize("name", NAMES)
def test_the_engine_never_meets_frozen_networks_in_training(name):
    client = load(name).Client
    federation = make_federation(load(name), rounds=2, join_ratio=1)
    federation.run()
    for net in client.frozen:
        assert not any(parameter.requires_grad for parameter in federation.workspace.nets[net].parameters())
        assert not federation.workspace.nets[net].training
        assert net not in federation.views


def test_a_run_without_any_reply_keeps_every_algorithm_alive():
    for name in NAMES:
        federation = make_federation(load(name), rounds=2, join_ratio=1, learning_rate=1e30, clip_norm=0)
        records = run(federation).records
        assert all(len(record.rejected) == len(record.selected) for record in records), name


# FedFomo holds windows out and explores by a client's number, as all randomness comes from (seed, round, client)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "FedFomo"])
def test_renaming_clients_renames_the_outcome(name, double):
    """With one full batch a round and everybody selected, nothing else depends on the clients' numbers."""
    data, order = make_data(), [2, 0, 3, 1]
    renamed = replace(data, train_x=[data.train_x[k] for k in order], train_y=[data.train_y[k] for k in order])
    one, two = (
        make_federation(load(name), windows, rounds=2, join_ratio=1, batch_size=200, local_epochs=1)
        for windows in (data, renamed)
    )
    one.run()
    two.run()
    for key, tensor in one.server.networks().items():
        torch.testing.assert_close(two.server.networks()[key], tensor, rtol=1e-9, atol=1e-9)
    for new, old in enumerate(order if name != "Centralised" else [0]):
        for key, tensor in one.workspace.kept[old].items():
            torch.testing.assert_close(two.workspace.kept[new][key], tensor, rtol=1e-9, atol=1e-9)
