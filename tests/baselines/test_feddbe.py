"""FedDBE: a bias of features for each client, and a common mean of the features without it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from baselines.fedavg import FedAvg
from baselines.feddbe import BIAS, MEAN, Biased, FedDBE, FedDBEClient, FedDBEParams
from registry.interface import Batch, Round
from tests.baselines.checks import goes_on_identically, overheard, travels
from tests.conftest import SHAPE, TinyNet, make_data, make_federation, make_task


def client(**params) -> FedDBEClient:
    torch.manual_seed(0)
    one = FedDBEClient(0, make_task(), FedDBEParams(**params), 12)
    one.nets = {"model": FedDBEClient.build(one.task)["model"].double().eval()}
    one.nets["model"].bias.data.normal_()
    return one


def batch() -> Batch:
    data = make_data((12,))
    return Batch(data.train_x[0].double(), data.train_y[0])


def test_its_losses_are_the_papers_in_float64():
    one, data, mean = client(kappa=3.0), batch(), np.linspace(-1, 1, 16)
    found = one.losses(one.nets, data, {MEAN: torch.from_numpy(mean)})
    net = one.nets["model"]
    z = net.base.features(data.x).detach().numpy()
    w, b, own = (t.detach().numpy() for t in (net.head.weight, net.head.bias, net.bias))
    logits = (z + own) @ w.T + b
    ce = -np.mean([row[k] - np.log(np.exp(row).sum()) for row, k in zip(logits, data.y, strict=True)])
    assert found["model"].item() == pytest.approx(ce, rel=1e-9)
    expected = 3.0 / 2 * sum((z[:, j].mean() - mean[j]) ** 2 for j in range(16)) / 16
    assert found["mean"].item() == pytest.approx(expected, rel=1e-9)


def test_padding_rows_change_no_mean():
    one, data, context = client(), batch(), {MEAN: torch.ones(16, dtype=torch.float64)}
    rows = torch.cat([data.x, 100 * torch.ones(3, *SHAPE).double()])
    padded = Batch(rows, torch.cat([data.y, data.y[:3]]), torch.arange(15) < 12)
    for name, value in one.losses(one.nets, data, context).items():
        torch.testing.assert_close(one.losses(one.nets, padded, context)[name], value)


def test_the_mean_feels_no_bias_and_the_bias_no_mean():
    one = client()
    one.losses(one.nets, batch(), {MEAN: torch.zeros(16, dtype=torch.float64)})["mean"].backward()
    assert one.nets["model"].bias.grad is None
    assert one.nets["model"].base.fc.weight.grad.any()


def test_without_a_bias_it_is_the_model_itself():
    torch.manual_seed(0)
    base = TinyNet(SHAPE, 4).eval()
    expected = base(torch.ones(3, *SHAPE))
    found = Biased(base).eval()(torch.ones(3, *SHAPE))
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.features, expected.features)


def test_the_first_round_is_fedavgs_and_gives_the_common_mean(double):
    plain, made = (make_federation(algorithm, rounds=3, join_ratio=1) for algorithm in (FedAvg, FedDBE))
    seen, reply = {}, FedDBE.Client.reply

    def listen(self):
        seen[self.id] = self.nets["model"].eval().features(self.data.x).detach().mean(0)
        return reply(self)

    for one in made.workspace.clients:
        one.__class__ = type("Listening", (FedDBE.Client,), {"reply": listen})
    heard = overheard(made)
    for federation in (plain, made):
        federation.round(Round(1, 3))
    assert torch.equal(plain.server.weights["model.head.weight"], made.server.weights["model.head.weight"])
    assert torch.equal(plain.server.weights["model.fc.weight"], made.server.weights["model.base.fc.weight"])
    sizes = [40, 7, 65, 20]
    expected = sum(n / 132 * seen[id] for id, n in enumerate(sizes))
    torch.testing.assert_close(made.server.mean[MEAN], expected, rtol=1e-9, atol=1e-12)
    assert not any(kept[BIAS].any() for kept in made.workspace.kept)
    mean = made.server.mean[MEAN].clone()
    for t in (2, 3):
        made.round(Round(t, 3))
    assert torch.equal(made.server.mean[MEAN], mean)
    assert all(kept[BIAS].any() and not travels(kept[BIAS], heard) for kept in made.workspace.kept)


def test_a_larger_weight_holds_the_mean_features_nearer():
    def distance(kappa):
        made = make_federation(FedDBE, rounds=8, join_ratio=1, params={"kappa": kappa})
        made.run()
        net = made.workspace.enter(0).nets["model"].eval()
        federated = {**made.workspace.state_for_evaluation(0, made.server.networks())}
        net.load_state_dict({n.removeprefix("model."): t for n, t in federated.items()}, strict=False)
        means = [net.features(x).detach().mean(0) for x in made.data.train_x]
        return sum(float((mean - made.server.mean[MEAN]).square().sum()) for mean in means)

    assert distance(20.0) < distance(0.0) / 2


def test_a_restart():
    assert goes_on_identically(lambda: make_federation(FedDBE, rounds=4))
