"""FML: a client's own model and the shared one learn from each other."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from baselines.fml import FML, FMLClient, FMLParams
from baselines.local import Local
from registry.interface import Batch, Round
from tests.conftest import TinierNet, make_data, make_federation, make_task, same_state


def test_its_losses_are_the_papers_in_float64():
    torch.manual_seed(0)
    client = FMLClient(0, make_task(TinierNet), FMLParams(alpha=0.3, beta=0.9), 11)
    client.nets = {name: net.double().eval() for name, net in FMLClient.build(client.task).items()}
    data = make_data((11,))
    batch = Batch(data.train_x[0].double(), data.train_y[0])
    found = client.losses(client.nets, batch, {})
    logits = {name: net(batch.x).logits.detach().numpy() for name, net in client.nets.items()}
    p = {name: np.exp(z) / np.exp(z).sum(1, keepdims=True) for name, z in logits.items()}
    for own, other, weight in (("personal", "meme", 0.3), ("meme", "personal", 0.9)):
        ce = -np.mean([np.log(p[own][n, y]) for n, y in enumerate(batch.y)])
        kl = np.mean([sum(p[other][n] * np.log(p[other][n] / p[own][n])) for n in range(11)])
        assert found[own].item() == pytest.approx(weight * ce + (1 - weight) * kl, rel=1e-9)


def test_no_model_feels_the_others_loss():
    torch.manual_seed(0)
    client = FMLClient(0, make_task(TinierNet), FMLParams(), 11)
    client.nets = FMLClient.build(client.task)
    data = make_data((11,))
    losses = client.losses(client.nets, Batch(data.train_x[0], data.train_y[0]), {})
    for own, other in (("personal", "meme"), ("meme", "personal")):
        for net in client.nets.values():
            net.zero_grad()
        losses[own].backward(retain_graph=True)
        assert all(p.grad is None or not p.grad.any() for p in client.nets[other].parameters())
        assert all(p.grad is not None for p in client.nets[own].parameters())


def test_without_divergences_it_is_local_beside_a_meme_that_is_fedavgs():
    """With α = 1 the own model ignores the meme; with β = 1 the meme ignores it, whatever α is."""
    made = make_federation(FML, join_ratio=1, params={"alpha": 1.0, "beta": 1.0})
    other = make_federation(FML, join_ratio=1, params={"alpha": 0.2, "beta": 1.0})
    alone = make_federation(Local, join_ratio=1)
    for one in (made, other, alone):
        one.run()
    for own, theirs in zip(made.workspace.kept, alone.workspace.kept, strict=True):
        assert same_state({n.replace("personal", "model", 1): t for n, t in own.items()}, theirs)
    assert same_state(dict(made.server.weights), dict(other.server.weights))


def test_the_meme_alone_travels():
    made = make_federation(FML, task=make_task(TinierNet))
    down = made.server.message(0, Round(1, 3))
    reply = made.backend.train({0: down}, Round(1, 3))[0].reply
    assert set(down.tensors) == set(reply.tensors)
    assert {name.split(".")[0] for name in down.tensors} == {"meme"}
