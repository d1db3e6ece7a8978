"""Gradient inversion on known ground, and what a server sees of a round."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedkdx_plugin.engine.randomness import seeded
from fedkdx_plugin.privacy.audit import identity
from fedkdx_plugin.privacy.audit.inversion import Effort, Seen, _moments, correlations, dense_input, invert, matched
from fedkdx_plugin.privacy.audit.view import Update, see
from fedkdx_plugin.testing.made import CLASSES, SHAPE, TinyNet, make_federation
from registry import catalog
from registry.interface import Model, Round


class Dense(Model):
    """Three dense layers on the window itself."""

    def __init__(self, shape, classes):
        super().__init__(shape, classes)
        self.first, self.second = nn.Linear(shape[0] * shape[2], 20), nn.Linear(20, 10)
        self.feature_size, self.head = 10, nn.Linear(10, classes)

    def features(self, x):
        return self.second(self.first(x.flatten(1)).relu()).relu()


def trained_on(network: Model, x: torch.Tensor, loss) -> Seen:
    """Return what one step on windows tells, and leave the network as it was."""
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    named = dict(network.train().named_parameters())
    gradients = torch.autograd.grad(loss(network(x).logits), list(named.values()))
    after = {name: tensor.clone() for name, tensor in network.state_dict().items() if "running" in name}
    network.load_state_dict(before)
    return Seen(dict(zip(named, [3.0 * g for g in gradients], strict=True)), after)


def distilled(logits: torch.Tensor) -> torch.Tensor:
    """Return a loss that no attacker knows: the outputs of a private teacher are in it."""
    target = torch.tensor([[0.1, 0.2, 0.6, 0.1]])
    return F.cross_entropy(logits, torch.tensor([2])) + 2 * F.kl_div(logits.log_softmax(1), target, reduction="sum")


@pytest.mark.parametrize("loss", [lambda z: F.cross_entropy(z, torch.tensor([1])), distilled])
def test_dense_layers_give_their_window_away_exactly(loss):
    with seeded(0, "test"):
        network, x = Dense(SHAPE, CLASSES), torch.randn(1, *SHAPE)
    found = invert(network, trained_on(network, x, loss), SHAPE, 1, Effort(steps=1), torch.Generator())
    torch.testing.assert_close(found, x, rtol=1e-3, atol=1e-4)
    assert correlations(found, x)[0, 0] > 0.9999


def test_the_input_of_a_dense_layer_is_the_quotient_of_its_gradients():
    x, g = torch.randn(7), torch.randn(5)
    torch.testing.assert_close(dense_input(g[:, None] * x, g), x)
    assert not dense_input(torch.zeros(5, 7), torch.zeros(5)).any()  # a layer without gradient tells nothing


def smooth(seed: int, count: int = 1) -> torch.Tensor:
    """Return windows that change slowly, as recordings do."""
    rng = torch.Generator().manual_seed(seed)
    time = torch.linspace(0, 1, SHAPE[2])
    phase, speed = torch.rand(count, SHAPE[0], 1, 1, generator=rng), torch.rand(count, SHAPE[0], 1, 1, generator=rng)
    return torch.sin(2 * torch.pi * (phase + (0.5 + speed) * time)) + phase


def test_a_window_is_found_through_convolution_and_batch_norm():
    with seeded(1, "test"):
        network = TinyNet(SHAPE, CLASSES)
    x = smooth(3)
    seen = trained_on(network, x, distilled)
    found = invert(network, seen, SHAPE, 1, Effort(steps=300, smoothness=0.1), torch.Generator().manual_seed(0))
    assert correlations(found, x)[0, 0] > 0.9
    with seeded(1, "test"):
        network = TinyNet(SHAPE, CLASSES)
    other = trained_on(network, smooth(8), distilled)
    missed = invert(network, other, SHAPE, 1, Effort(steps=300, smoothness=0.1), torch.Generator().manual_seed(0))
    assert correlations(missed, x)[0, 0] < correlations(found, x)[0, 0] - 0.3  # found in the update, not made up


def test_windows_are_matched_one_to_one():
    true = smooth(4, 6)
    order = torch.tensor([3, 0, 5])
    places, values = matched(2 * true[order] + 1, true)  # correlation knows no scale
    assert places.tolist() == order.tolist()
    np.testing.assert_allclose(values, 1, atol=1e-9)
    places, _ = matched(true[[1, 1]], true)
    assert len(set(places.tolist())) == 2


def test_correlations_are_those_of_numpy():
    one, other = torch.randn(3, 2, 1, 9), torch.randn(4, 2, 1, 9)
    expected = np.corrcoef(one.flatten(1).numpy(), other.flatten(1).numpy())[:3, 3:]
    np.testing.assert_allclose(correlations(one, other), expected, atol=1e-6)


SENDING = ["FedAvg", "FedProx", "FedAvgM", "FedAdam", "SCAFFOLD", "FedDBE", "FedKD", "FedKDX", "FedKDX+"]


@pytest.mark.parametrize("name", SENDING)
def test_what_a_server_sees_is_where_its_client_arrived(name):
    """The state that the update of a client leads to predicts what the client's own network did after training."""
    algorithm = catalog.load("algorithms", name)
    params = {"epsilon_start": 1.0, "epsilon_end": 1.0} if name.startswith("FedKD") else {}  # compressed without loss
    federation = make_federation(algorithm, join_ratio=1.0, backend="sequential", params=params)
    arrived = {}
    end = federation.backend.end

    def noting(client, loss):
        arrived[client.id] = {n: t.clone() for n, t in client.shared().items()}
        return end(client, loss)

    federation.backend.end = noting
    for index in (1, 2):
        updates = see(federation, Round(index, 5))
        assert [update.clients for update in updates] == [(0,), (1,), (2,), (3,)]
        for update in updates:
            assert update.change
            for tensor in update.change:
                torch.testing.assert_close(update.end[tensor], arrived[update.clients[0]][tensor], rtol=1e-3, atol=1e-4)


def test_to_see_changes_nothing_of_a_round():
    algorithm = catalog.load("algorithms", "FedKDX")
    seen, plain = (make_federation(algorithm, join_ratio=1.0, backend="sequential") for _ in range(2))
    for index in (1, 2):
        see(seen, Round(index, 3))
        plain.round(Round(index, 3))
    one, other = seen.save(), plain.save()
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    assert "aggregate" not in vars(seen.server)


def test_where_nothing_is_shared_nothing_is_seen():
    federation = make_federation(catalog.load("algorithms", "Local"), backend="sequential")
    assert see(federation, Round(1, 3)) == []


def updates_of(rows: torch.Tensor, common: torch.Tensor) -> list[Update]:
    start = {"model.w": torch.zeros(rows.shape[1])}
    return [Update((client,), start, {"model.w": row + common}) for client, row in enumerate(rows)]


def test_updates_with_a_direction_of_their_own_are_all_identified():
    rng = torch.Generator().manual_seed(0)
    own = torch.randn(12, 200, generator=rng)
    common = [30 * torch.randn(200, generator=rng) for _ in range(2)]  # what all have in common hides nothing
    rounds = [updates_of(own + 0.5 * torch.randn(12, 200, generator=rng), shift) for shift in common]
    guesses = identity.identify(*rounds)
    assert guesses.guessed.tolist() == guesses.clients.tolist() == list(range(12))


def test_updates_without_a_direction_of_their_own_are_identified_by_chance():
    rng, right = torch.Generator().manual_seed(1), 0
    for _ in range(40):
        rounds = [updates_of(torch.randn(10, 50, generator=rng), torch.zeros(50)) for _ in range(2)]
        guesses = identity.identify(*rounds)
        right += int((guesses.guessed == guesses.clients).sum())
    assert abs(right - 40) < 5 * (400 * 0.1 * 0.9) ** 0.5  # five standard deviations of a binomial


def test_statistics_of_batch_norm_give_the_moments_of_one_batch_away():
    with seeded(2, "test"):
        network = TinyNet(SHAPE, CLASSES)
    x = torch.randn(5, *SHAPE)
    seen = trained_on(network, x, lambda z: F.cross_entropy(z, torch.arange(5) % CLASSES))
    mean, variance = _moments(network, seen)["bn"]
    inputs = network.conv(x).transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, inputs.mean(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(variance, inputs.var(1), rtol=1e-3, atol=1e-4)
