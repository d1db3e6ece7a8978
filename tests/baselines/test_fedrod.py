"""FedRoD: balanced softmax for the generic model, a second head on fixed features for the client."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from baselines.fedrod import COUNTS, FedRoD, FedRoDClient, balanced_softmax
from registry.interface import Batch, Round
from registry.parameters import Params
from tests.baselines.checks import overheard, travels
from tests.conftest import make_data, make_federation, make_task


def client(count: int = 20) -> FedRoDClient:
    torch.manual_seed(0)
    one = FedRoDClient(0, make_task(), Params(), count)
    one.nets = {name: net.double().eval() for name, net in FedRoDClient.build(one.task).items()}
    one.nets["second"].weight.data.normal_()
    data = make_data((count,))
    one.data = Batch(data.train_x[0].double(), data.train_y[0].clamp(max=2))  # class 3 is absent
    return one


def test_its_losses_are_the_papers_in_float64():
    one = client()
    y = one.data.y.numpy()
    counts = [int((y == c).sum()) for c in range(4)]
    assert one.context()[COUNTS].tolist() == counts and counts[3] == 0
    found = one.losses(one.nets, one.data, one.context())
    z, g = (t.detach().numpy() for t in one.nets["model"](one.data.x))
    w, b = (t.detach().numpy() for t in one.nets["second"].parameters())
    generic = [
        -np.log(counts[k] * np.exp(row[k]) / sum(n * np.exp(v) for n, v in zip(counts, row, strict=True)))
        for row, k in zip(g, y, strict=True)
    ]
    both = g + z @ w.T + b
    personal = [-(row[k] - np.log(np.exp(row).sum())) for row, k in zip(both, y, strict=True)]
    assert found["model"].item() == pytest.approx(np.mean(generic), rel=1e-9)
    assert found["second"].item() == pytest.approx(np.mean(personal), rel=1e-9)


def test_a_hand_worked_balanced_softmax():
    """Logits 0 and counts 1 and 3: the probabilities are 1/4 and 3/4."""
    loss = balanced_softmax(torch.zeros(2, 3), torch.tensor([0, 1]), torch.tensor([1.0, 3.0, 0.0]))
    torch.testing.assert_close(loss, torch.tensor([4.0, 4 / 3]).log())


def test_with_equal_counts_it_is_cross_entropy():
    logits, y = torch.randn(9, 4), torch.arange(9) % 4
    expected = torch.nn.functional.cross_entropy(logits, y, reduction="none")
    torch.testing.assert_close(balanced_softmax(logits, y, torch.full((4,), 7.0)), expected)


def test_an_absent_class_gives_no_gradient_and_no_nan():
    one = client()
    one.losses(one.nets, one.data, one.context())["model"].backward()
    head = one.nets["model"].head.weight.grad
    assert head.isfinite().all() and not head[3].any() and head[:3].any()


def test_the_second_head_learns_alone():
    one = client()
    one.losses(one.nets, one.data, one.context())["second"].backward()
    assert all(p.grad is None or not p.grad.any() for p in one.nets["model"].parameters())
    assert all(p.grad.any() for p in one.nets["second"].parameters())


def test_the_sum_of_what_was_trained_predicts_and_the_second_head_never_travels(double):
    made = make_federation(FedRoD, rounds=2, join_ratio=1)
    seen, trained, reply = overheard(made), {}, FedRoD.Client.reply

    def listen(self):
        nets = {name: net.eval() for name, net in self.nets.items()}
        features, logits = nets["model"](self.data.x)
        trained[self.id] = (logits + nets["second"](features)).detach()
        return reply(self)

    for one in made.workspace.clients:
        one.__class__ = type("Listening", (FedRoD.Client,), {"reply": listen})
    for t in (1, 2):
        made.round(Round(t, 2))
    for id, kept in enumerate(made.workspace.kept):
        served = made.workspace.enter(id)
        assert served.serves() == "personal"
        net = served.nets["personal"].eval()
        torch.testing.assert_close(net(made.data.train_x[id]).logits, trained[id], rtol=1e-9, atol=1e-9)
        assert kept["second.weight"].any() and not travels(kept["second.weight"], seen)
