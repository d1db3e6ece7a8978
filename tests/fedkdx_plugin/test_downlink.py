"""Differences down: what clients hold is what the server takes them to hold."""

from __future__ import annotations

import pytest
import torch

from baselines.fedkd_plus import FedKDPlus
from fedkdx_plugin.algorithm.additions import OFF
from fedkdx_plugin.algorithm.downlink.differences import DifferencesServer
from fedkdx_plugin.algorithm.fedkdx_plus import FedKDXPlus
from fedkdx_plugin.algorithm.updates import group, move
from fedkdx_plugin.engine.faults import Faults
from registry.interface import BadMessage, Message, Round
from tests.conftest import Recorder, make_federation, same_state

DIFFERENCES = OFF | {"downlink": "differences"}
VARIANTS = [{}, {"error_feedback": True}, {"quantise": True, "error_feedback": True}, {"serve": "both"}]


def noted(federation, id: int, message: Message) -> dict[str, torch.Tensor]:
    """Return the student that the server assumes client `id` to hold once it has this message."""
    student = {name: tensor.clone() for name, tensor in federation.server.downlink.held(id)[1].items()}
    move(student, message.tensors, 1.0)
    return student


def hold(federation, id: int, message: Message) -> dict[str, torch.Tensor]:
    """Return the student that client `id` does hold once it has this message, without changing the client."""
    one = federation.workspace.enter(id)
    memory, one.memory = one.memory, dict(one.memory)
    one.receive(Message.from_bytes(message.to_bytes()))
    one.memory = memory
    return {name: tensor.clone() for name, tensor in one.shared().items()}


@pytest.mark.parametrize("algorithm", [FedKDXPlus, FedKDPlus])
@pytest.mark.parametrize("extra", VARIANTS)
def test_what_a_client_holds_is_what_the_server_notes(algorithm, extra):
    federation = make_federation(algorithm, rounds=8, join_ratio=0.5, params=DIFFERENCES | extra)
    first = set()
    for t in range(1, 9):
        federation.round(Round(t, 8))
        for id in range(4):
            message = federation.server.message(id, Round(t, 8))
            first.add("sums" in message.meta)
            assert same_state(hold(federation, id, message), noted(federation, id, message))
    assert first == {True, False}


def test_replies_that_are_lost_or_refused_leave_nothing_out_of_step():
    faults = Faults(dropout=0.2, corrupt=0.4)
    federation, recorder = make_federation(FedKDXPlus, rounds=12, params=DIFFERENCES, faults=faults), Recorder()
    federation.run([recorder])
    assert sum(len(record.rejected) for record in recorder.records) > 5
    assert sum(len(record.lost) for record in recorder.records) > 2
    for id in range(4):
        message = federation.server.message(id, Round(12, 12))
        assert same_state(hold(federation, id, message), noted(federation, id, message))


def test_a_message_leaves_out_no_more_than_its_threshold_allows(double):
    federation = make_federation(FedKDXPlus, rounds=6, params=DIFFERENCES | {"epsilon_start": 0.6, "epsilon_end": 0.6})
    federation.run()
    weights, compressed = federation.server.weights, 0
    for id in range(4):
        _, held = federation.server.downlink.held(id)
        message = federation.server.message(id, Round(6, 6))
        brought = noted(federation, id, message)
        for name, tensor in weights.items():
            behind, left = (tensor - held[name]).norm(), (tensor - brought[name]).norm()
            assert left <= 0.4**0.5 * behind + 1e-9
            compressed += bool(left > 1e-4)
    assert compressed


def test_what_one_message_leaves_out_is_in_the_next():
    """Where the server stands still, a client gets there, however little each message may carry."""
    torch.manual_seed(0)
    weights = {"w": torch.randn(12, 20), "b": torch.randn(12)}
    still = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    downlink = DifferencesServer(still, quantise=False)
    distances = []
    for version in range(1, 15):
        assert "w.S" in downlink.message(0, weights, version, 0.5).tensors
        downlink.step(weights, version, 0.5, still, 0.1, [0])
        distances.append(float((downlink.held(0)[1]["w"] - weights["w"]).norm()))
        assert torch.equal(downlink.held(0)[1]["b"], weights["b"])
        if distances[-1] < 1e-3:
            break
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.02 * distances[0]


def test_a_message_made_again_after_a_round_that_did_not_count_keeps_that_rounds_share_of_energy():
    """The student stays, and ε moves on. Singular values 3 and 1 have 9/10 and 1/10 of the energy: 0.85 takes one."""
    start, weights = {"w": torch.zeros(32, 32)}, {"w": torch.zeros(32, 32)}
    weights["w"][0, 0], weights["w"][1, 1] = 3.0, 1.0
    downlink = DifferencesServer(start, quantise=False)
    ranks = [len(downlink.message(0, weights, 1, epsilon).tensors["w.S"]) for epsilon in (0.85, 0.95, 0.95, 0.85)]
    assert ranks == [1, 2, 2, 1]
    metrics = downlink.step(weights, 1, 0.95, start, 0.1, [0])[1]  # what it sent with this ε: nothing left out
    assert float(metrics[0]["energy_kept"]) == pytest.approx(1) and torch.allclose(
        downlink.held(0)[1]["w"], weights["w"]
    )


def test_the_server_moves_by_the_uncompressed_mean(double):
    """W - Σ_k (n_k/n) (W - W_k), in float64: what is left out on the way down is not left out of the server's own."""
    federation = make_federation(FedKDXPlus, rounds=2, params=DIFFERENCES | {"epsilon_start": 1.0, "epsilon_end": 1.0})
    federation.round(Round(1, 2))
    before, replies = {n: t.double() for n, t in federation.server.weights.items()}, {}
    aggregate = federation.server.aggregate

    def spy(found, round):
        replies.update(found)
        aggregate(found, round)

    federation.server.aggregate = spy
    federation.round(Round(2, 2))
    total = sum(reply.meta["samples"] for reply in replies.values())
    for name, tensor in before.items():
        change = sum(r.meta["samples"] / total * r.meta["rate"] * r.tensors[name].double() for r in replies.values())
        torch.testing.assert_close(federation.server.weights[name].double(), tensor - change, rtol=1e-9, atol=1e-9)


def test_without_compression_both_ways_are_one(double):
    lossless = {"epsilon_start": 1.0, "epsilon_end": 1.0}
    broadcast = make_federation(FedKDXPlus, rounds=5, join_ratio=0.5, params=OFF | lossless)
    differences = make_federation(FedKDXPlus, rounds=5, join_ratio=0.5, params=DIFFERENCES | lossless)
    broadcast.run()
    differences.run()
    for name, tensor in broadcast.server.weights.items():
        torch.testing.assert_close(differences.server.weights[name], tensor, rtol=1e-9, atol=1e-9)


def test_asking_for_a_message_changes_nothing():
    asked, left_alone = (make_federation(FedKDXPlus, rounds=4, join_ratio=0.5, params=DIFFERENCES) for _ in range(2))
    for t in range(1, 5):
        for id in (3, 1, 1, 0, 2):
            one, two = (asked.server.message(id, Round(t, 4)).to_bytes() for _ in range(2))
            assert one == two
        asked.round(Round(t, 4))
        left_alone.round(Round(t, 4))
    assert same_state(asked.save().tensors, left_alone.save().tensors)


def test_going_on_from_what_was_saved_changes_nothing():
    params = DIFFERENCES | {"quantise": True, "error_feedback": True}
    whole, first, second = (make_federation(FedKDXPlus, rounds=6, join_ratio=0.5, params=params) for _ in range(3))
    for t in range(1, 5):
        whole.round(Round(t, 6))
        first.round(Round(t, 6))
    saved = first.save()
    second.restore(Message.from_bytes(saved.to_bytes()))
    for t in (5, 6):
        one, two = whole.round(Round(t, 6)), second.round(Round(t, 6))
        assert (one.bytes_up, one.bytes_down, one.server) == (two.bytes_up, two.bytes_down, two.server)
    assert same_state(whole.save().tensors, second.save().tensors)


def test_clients_that_train_rarely_are_sent_less_than_every_step():
    def sent(**params) -> int:
        recorder = Recorder()
        make_federation(FedKDXPlus, rounds=12, join_ratio=0.25, params=params).run([recorder])
        return sum(record.bytes_down for record in recorder.records)

    assert sent(**DIFFERENCES) < sent(**OFF)


def test_never_more_than_the_student():
    federation = make_federation(FedKDXPlus, rounds=10, join_ratio=0.25, local_epochs=1, params=DIFFERENCES)
    dense = sum(tensor.nbytes for tensor in federation.server.weights.values())
    for t in range(1, 11):
        federation.round(Round(t, 10))
        for id in range(4):
            message = federation.server.message(id, Round(t, 10))
            assert sum(tensor.nbytes for tensor in message.tensors.values()) <= dense


def test_a_client_that_lost_its_student_says_so():
    federation = make_federation(FedKDXPlus, rounds=2, join_ratio=1, params=DIFFERENCES)
    federation.run()
    message = federation.server.message(0, Round(2, 2))
    one = federation.workspace.enter(0)
    one.memory = {}
    with pytest.raises(
        BadMessage, match=r"client 0: students held are of steps none, but the server's difference starts at 1"
    ):
        one.receive(message)


def test_the_first_message_costs_next_to_nothing():
    federation = make_federation(FedKDXPlus, rounds=2, params=DIFFERENCES)
    message = federation.server.message(0, Round(1, 2))
    dense = sum(tensor.nbytes for tensor in federation.server.weights.values())
    factors = [tensor for name, tensor in message.tensors.items() if name.endswith((".U", ".S", ".V"))]
    assert factors and all(tensor.numel() == 0 for tensor in factors)
    assert sum(tensor.nbytes for tensor in message.tensors.values()) < 0.2 * dense
    assert same_state(hold(federation, 0, message), dict(federation.server.weights))


def test_a_client_of_another_seed_is_told():
    mine, other = (make_federation(FedKDXPlus, rounds=2, seed=seed, params=DIFFERENCES) for seed in (0, 1))
    with pytest.raises(BadMessage, match=r"client 2: initial 'student\..*' differs from the server's"):
        mine.workspace.enter(2).receive(other.server.message(2, Round(1, 2)))


def test_a_difference_that_does_not_fit_is_refused():
    federation = make_federation(FedKDXPlus, rounds=2, join_ratio=1, params=DIFFERENCES)
    federation.run()
    message = federation.server.message(0, Round(2, 2))
    short = {name: tensor[:1] if tensor.ndim else tensor for name, tensor in message.tensors.items()}
    with pytest.raises(BadMessage):
        federation.workspace.enter(0).receive(Message(short, message.meta))


def test_only_the_last_difference_is_remembered():
    federation = make_federation(FedKDXPlus, rounds=6, join_ratio=1, params=DIFFERENCES)
    federation.run()
    for client in federation.workspace.clients:
        assert int(client.memory["pending"]) == 5
        payload = group(client.memory, "pending")
        assert {name.rsplit(".", 1)[0] if name.endswith((".U", ".S", ".V")) else name for name in payload} == set(
            federation.server.weights
        )
