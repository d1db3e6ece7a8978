"""PullAvg: where a client starts, and its two ends, FedAvgFT and training alone."""

from __future__ import annotations

import pytest
import torch

from baselines.fedavgft import FedAvgFT
from baselines.pullavg import PullAvg
from registry.interface import Round
from tests.conftest import make_federation, make_task, same_state


@pytest.mark.parametrize("local_bn", [False, True])
def test_the_whole_way_in_all_rounds_is_fedavgft(local_bn):
    one = make_federation(FedAvgFT, task=make_task(local_bn=local_bn), rounds=5)
    other = make_federation(PullAvg, task=make_task(local_bn=local_bn), rounds=5, params={"pull_end": 1.0})
    one.run()
    other.run()
    assert same_state(dict(one.save().tensors), dict(other.save().tensors))


def test_no_step_of_the_way_leaves_clients_alone_after_their_first_start():
    """So what the server's model is later changes no client."""
    one, other = (make_federation(PullAvg, join_ratio=1, params={"pull_start": 0.0}) for _ in range(2))
    for t in (1, 2, 3):
        for federation in (one, other):
            federation.round(Round(t, 3))
        other.server.weights = {name: tensor + 1 for name, tensor in other.server.weights.items()}
    for mine, theirs in zip(one.workspace.kept, other.workspace.kept, strict=True):
        assert same_state(mine, theirs)


@pytest.mark.parametrize(("start", "end"), [(1.0, 0.0), (0.8, 0.2)])
def test_a_client_starts_on_the_line_between_its_own_model_and_the_servers(start, end, double):
    federation = make_federation(PullAvg, rounds=4, join_ratio=1, params={"pull_start": start, "pull_end": end})
    federation.round(Round(1, 4))
    own = {n.removeprefix("personal."): t.numpy().copy() for n, t in federation.workspace.kept[2].items()}
    for t in (2, 3):
        share = start + (end - start) * t / 4
        client = federation.workspace.enter(2)
        client.receive(federation.server.message(2, Round(t, 4)))
        for name, tensor in client.nets["model"].state_dict().items():
            if tensor.is_floating_point():
                expected = (1 - share) * own[name] + share * federation.server.weights[f"model.{name}"].numpy()
                torch.testing.assert_close(tensor, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def test_a_client_that_is_rarely_selected_follows_its_own_rounds():
    """In round 8 of 10 with half of the clients, 5 rounds are expected: after one, it is at (1 + 1) / 2.5 = 0.8."""
    federation = make_federation(PullAvg, rounds=1, join_ratio=1)
    federation.run()
    message = federation.server.message(0, Round(9, 10, 0.5))
    assert message.meta == {"progress": 0.9, "expected": 5.0}
    client = federation.workspace.enter(0)
    before = {n: t.clone() for n, t in client.nets["personal"].state_dict().items()}
    client.receive(message)
    weight = client.nets["model"].state_dict()["fc.weight"]
    expected = before["fc.weight"] + (1 - 0.8) * (federation.server.weights["model.fc.weight"] - before["fc.weight"])
    torch.testing.assert_close(weight, expected)
