"""GPFL: a conditional valve, and class embeddings that guide features under the common condition."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from baselines.gpfl import EMBEDDING, GPFL, GPFLClient, GPFLParams
from fedkdx_plugin.engine.steps import Steps
from registry.interface import Batch, Message, Round
from tests.baselines.checks import goes_on_identically, overheard, travels
from tests.conftest import SHAPE, make_data, make_federation, make_task


def client(count: int = 12, **params) -> tuple[GPFLClient, np.ndarray]:
    """Return a client that has received embeddings, and these; the ones that it trains have moved since."""
    torch.manual_seed(0)
    one = GPFLClient(0, make_task(), GPFLParams(**params), count)
    one.nets = {name: net.double().eval() for name, net in GPFLClient.build(one.task).items()}
    data = make_data((count,))
    one.data = Batch(data.train_x[0].double(), data.train_y[0])
    embedding = torch.randn(4, 16, dtype=torch.float64)
    one.receive(Message({EMBEDDING: embedding}))
    one.nets["categories"].weight.data.add_(0.1)
    return one, embedding.numpy()


def valve(model, z, condition):
    """Compute the valve in NumPy."""
    z = z.copy()

    def layers(part):
        w, b = (t.detach().numpy() for t in (part[0].weight, part[0].bias))
        h = np.maximum(w @ condition + b, 0)
        return (h - h.mean()) / np.sqrt(h.var() + 1e-5)

    return np.maximum((1 + layers(model.gamma)) * z + layers(model.beta), 0)


def test_its_losses_are_the_papers_in_float64():
    one, e = client(lam=0.7, mu=0.3)
    model, x, y = one.nets["model"], one.data.x, one.data.y.numpy()
    found = one.losses(one.nets, one.data, one.context())
    p = sum((y == c).mean() * e[c] for c in range(4))
    z = model.base.features(x).detach().numpy()
    personal, generic = valve(model, z, p), valve(model, z, e.mean(0))
    w, b = (t.detach().numpy() for t in (model.head.weight, model.head.bias))

    def cross_entropy(logits):
        return -np.mean([row[k] - np.log(np.exp(row).sum()) for row, k in zip(logits, y, strict=True)])

    moved = one.nets["categories"].weight.detach().numpy()
    cosine = [[g @ m / np.linalg.norm(g) / np.linalg.norm(m) for m in moved] for g in generic]
    expected = {
        "model": cross_entropy(personal @ w.T + b),
        "angle": cross_entropy(np.array(cosine)),
        "magnitude": 0.7 * np.mean([np.linalg.norm(g - e[k]) for g, k in zip(generic, y, strict=True)]),
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize("bound", [0.0, 1e-3])
def test_a_step_decays_valve_and_embeddings_beside_the_clipped_gradient(bound):
    """By w ← w − η (g min(1, bound / ‖g‖) + μ w), μ = 0 for features and head; g by autograd of the three terms."""
    one, _ = client(lam=0.7, mu=0.3)
    one.learning_rate = 0.05
    for net in one.nets.values():
        net.train()
    twins = copy.deepcopy(one.nets)
    sum(one.losses(twins, one.data, one.context()).values()).backward()
    before = {(net, name): w.detach().clone() for net, own in one.nets.items() for name, w in own.named_parameters()}
    Steps(one, one.nets, one.context(), bound).take(one.data)
    for net, twin in twins.items():
        norm = torch.stack([w.grad.norm() for w in twin.parameters()]).norm()
        scale = bound / (norm + 1e-6) if bound else 1.0
        for name, w in twin.named_parameters():
            mu = 0.3 if net == "categories" or name.startswith(("gamma", "beta")) else 0.0
            old = before[net, name]
            expected = old - 0.05 * (scale * w.grad + mu * old)
            torch.testing.assert_close(one.nets[net].get_parameter(name), expected, rtol=1e-9, atol=1e-12)


def test_stacked_training_is_the_references(double, capsys):
    """Also where the tensors of a model are not of whole lengths of memory, and so have gaps between them."""
    runs = []
    for backend in ("sequential", "stacked"):
        runs.append(make_federation(GPFL, backend=backend, join_ratio=1, params={"mu": 0.5}))
        runs[-1].run()
    assert capsys.readouterr().err == ""
    for name, own in runs[0].save().tensors.items():
        torch.testing.assert_close(runs[1].save().tensors[name], own, rtol=1e-9, atol=1e-9)


def test_padding_rows_change_nothing():
    one, _ = client(lam=0.7)
    data, context = one.data, one.context()
    rows = torch.cat([data.x, 100 * torch.ones(3, *SHAPE).double()])
    padded = Batch(rows, torch.cat([data.y, data.y[:3]]), torch.arange(15) < 12)
    for name, value in one.losses(one.nets, data, context).items():
        torch.testing.assert_close(one.losses(one.nets, padded, context)[name], value)


def test_the_head_feels_the_clients_own_loss_alone():
    one, _ = client(lam=0.7, mu=0.1)
    losses = one.losses(one.nets, one.data, one.context())
    (losses["angle"] + losses["magnitude"]).backward()
    assert all(p.grad is None for p in one.nets["model"].head.parameters())
    assert one.nets["model"].base.fc.weight.grad.any() and one.nets["categories"].weight.grad.any()


def test_heads_and_conditions_stay_and_the_rest_is_averaged(double):
    made = make_federation(GPFL, rounds=2, join_ratio=1)
    heard = overheard(made)
    embedding = made.server.weights[EMBEDDING]
    made.round(Round(1, 2))
    assert not any("head" in name or "condition" in name for name in made.server.weights)
    for id, kept in enumerate(made.workspace.kept):
        y = made.data.train_y[id]
        expected = sum(float((y == c).double().mean()) * embedding[c] for c in range(4))
        torch.testing.assert_close(kept["model.condition"], expected)
        assert set(kept) == {"model.head.weight", "model.head.bias", "model.condition"}
        assert not any(travels(tensor, heard) for tensor in kept.values())
    assert not torch.equal(made.server.weights[EMBEDDING], embedding)


def test_a_restart():
    assert goes_on_identically(lambda: make_federation(GPFL, rounds=4))
