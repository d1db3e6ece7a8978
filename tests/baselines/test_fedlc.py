"""FedLC: the calibrated cross-entropy in float64, absent classes, and FedAvg without margins."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from baselines.fedavg import FedAvg
from baselines.fedlc import MARGINS, FedLC, FedLCClient, FedLCParams
from registry.interface import Batch
from tests.conftest import SHAPE, Recorder, make_data, make_federation, make_task, same_state


def client(y: torch.Tensor, tau: float) -> FedLCClient:
    one = FedLCClient(0, make_task(), FedLCParams(tau), len(y))
    one.nets = FedLCClient.build(one.task)
    one.nets["model"].eval()
    one.data = Batch(make_data(sizes=(len(y),)).train_x[0], y)
    return one


def test_the_loss_is_the_papers_with_its_padding_left_out(double):
    y = torch.tensor([0, 0, 0, 0, 0, 1, 1, 2])  # class 3 is absent
    one = client(y, tau=0.7)
    counts = np.array([5, 2, 1, 1e-8])
    z = one.nets["model"](one.data.x).logits.detach().numpy() - 0.7 * counts**-0.25
    right = np.mean([np.log(np.exp(row).sum()) - row[label] for row, label in zip(z, y.tolist(), strict=True)])
    context = one.context()
    np.testing.assert_allclose(one.losses(one.nets, one.data, context)["model"].item(), right, rtol=1e-9)
    x = torch.cat([one.data.x, torch.full((2, *SHAPE), 100.0)])
    padded = Batch(x, torch.cat([y, y[:2]]), torch.arange(10) < 8)
    np.testing.assert_allclose(one.losses(one.nets, padded, context)["model"].item(), right, rtol=1e-9)


def test_the_logit_of_an_absent_class_is_left_alone():
    one = client(torch.tensor([0, 0, 1, 2]), tau=1.0)
    assert one.context()[MARGINS].tolist() == pytest.approx([2**-0.25, 1, 1, 100])
    one.losses(one.nets, one.data, one.context())["model"].backward()
    slope = one.nets["model"].head.bias.grad
    assert abs(slope[3]) < 1e-20 < abs(slope[2])


def test_a_rare_class_is_pushed_more_than_by_cross_entropy():
    """The gradient of its bias is p − 1 of its one window plus p of the others; calibrated, p is smaller."""
    slopes = []
    for tau in (0.0, 1.0):
        torch.manual_seed(0)
        one = client(torch.tensor([0] * 15 + [1] + [2, 3] * 5), tau)
        one.losses(one.nets, one.data, one.context())["model"].backward()
        slopes.append(float(one.nets["model"].head.bias.grad[1]))
    assert slopes[1] < slopes[0]


def test_without_margins_it_is_fedavg_and_with_them_not():
    runs = [make_federation(FedAvg), *(make_federation(FedLC, params={"tau": tau}) for tau in (0.0, 1.0))]
    for one in runs:
        one.run()
    plain, without, calibrated = (dict(one.server.weights) for one in runs)
    assert same_state(plain, without) and not same_state(plain, calibrated)


def test_it_sends_what_fedavg_sends():
    bytes_sent = []
    for algorithm in (FedAvg, FedLC):
        recorder = Recorder()
        make_federation(algorithm).run([recorder])
        bytes_sent.append([(record.bytes_up, record.bytes_down) for record in recorder.records])
    assert bytes_sent[0] == bytes_sent[1]
