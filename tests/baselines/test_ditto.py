"""Ditto: FedAvg with a personal model beside it that is drawn towards the average."""

from __future__ import annotations

import pytest
import torch

from baselines.ditto import Ditto, DittoClient, DittoParams
from baselines.fedavg import FedAvg
from baselines.local import Local
from registry.interface import Batch
from tests.baselines.checks import overheard, travels
from tests.conftest import make_data, make_federation, make_task, same_state


def part(state, net):
    return {name.removeprefix(net): tensor for name, tensor in state.items() if name.startswith(net)}


@pytest.mark.parametrize("local_bn", [False, True])
def test_without_the_distance_it_is_local_beside_fedavg(local_bn):
    task = make_task(local_bn=local_bn)
    made = make_federation(Ditto, task=task, join_ratio=1, params={"lam": 0.0})
    plain, alone = (make_federation(algorithm, task=task, join_ratio=1) for algorithm in (FedAvg, Local))
    for one in (made, plain, alone):
        one.run()
    assert same_state(dict(made.server.weights), dict(plain.server.weights))
    for own, theirs in zip(made.workspace.kept, alone.workspace.kept, strict=True):
        assert same_state(part(own, "personal."), part(theirs, "model."))


def test_the_distance_changes_the_personal_model_alone():
    made = make_federation(Ditto, rounds=2, join_ratio=1, params={"lam": 2.0})
    plain = make_federation(FedAvg, rounds=2, join_ratio=1)
    made.run()
    plain.run()
    assert same_state(dict(made.server.weights), dict(plain.server.weights))


def test_its_loss_is_the_papers_in_float64():
    """F(v) + λ/2 ‖v − W‖², with the cross-entropy and the distance added up value by value."""
    torch.manual_seed(0)
    client = DittoClient(0, make_task(), DittoParams(lam=0.7), 9)
    client.nets = {name: net.double().eval() for name, net in DittoClient.build(client.task).items()}
    context = client.context()
    for p in client.nets["personal"].parameters():
        p.data.add_(torch.rand_like(p) / 5)
    data = make_data((9,))
    batch = Batch(data.train_x[0].double(), data.train_y[0])
    logits = client.nets["personal"](batch.x).logits
    expected = -sum((row - row.exp().sum().log())[label] for row, label in zip(logits, batch.y, strict=True)) / 9
    for name, p in client.nets["personal"].named_parameters():
        for v, w in zip(p.flatten(), context[f"model.{name}"].flatten(), strict=True):
            expected = expected + 0.7 / 2 * (v - w) ** 2
    found = client.losses(client.nets, batch, context)["personal"]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_a_larger_weight_keeps_personal_models_nearer_and_they_never_travel():
    lengths = []
    for lam in (0.0, 1.0, 10.0):
        made = make_federation(Ditto, rounds=1, join_ratio=1, params={"lam": lam})
        seen, start = overheard(made), dict(made.server.weights)
        made.run()
        kept = part(made.workspace.kept[2], "personal.")
        lengths.append(sum(float((kept[n] - start[f"model.{n}"]).square().sum()) for n in kept if "running" not in n))
        assert lam == 0.0 or not any(travels(kept[name], seen) for name in ("conv.weight", "head.weight"))
    assert lengths[0] > lengths[1] > lengths[2] > 0
