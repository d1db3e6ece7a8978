"""FedProto, FedGH, FedPAC: prototypes, their mean over clients, and what the server makes of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from baselines.fedgh import CLIP, FedGH
from baselines.fedpac import FedPAC, combination, statistics
from baselines.fedproto import FedProto
from baselines.local import Local
from registry.interface import BadMessage, Batch, Message, Round, float_state
from registry.prototypes import (
    COUNTS,
    PROTOTYPES,
    Prototypes,
    class_counts,
    class_means,
    distances,
    training_features_of,
)
from tests.baselines.checks import awkward_data, goes_on_identically, run
from tests.conftest import CLASSES, SHAPE, TinyNet, make_data, make_federation, same_state


def trained(algorithm, data=None, rounds=2, **options):
    made = make_federation(algorithm, data, rounds=rounds, join_ratio=1, **options)
    made.run()
    return made


def in_evaluation(model, x):
    return model.eval().features(x).detach().numpy().copy()


def in_training(model, x):
    """Features of a `TinyNet` by the statistics of batches of at most 32 windows, dealt out in turn; in NumPy."""
    count = -(-len(x) // 32)
    found = np.empty((len(x), model.feature_size))
    scale, shift = (t.detach().numpy()[:, None, None] for t in (model.bn.weight, model.bn.bias))
    w, b = (t.detach().numpy() for t in (model.fc.weight, model.fc.bias))
    for first in range(count):
        z = model.conv(x[first::count]).detach().numpy()
        mean, variance = (of(z, axis=(0, 2, 3), keepdims=True)[0] for of in (np.mean, np.var))
        z = np.maximum((z - mean) / np.sqrt(variance + 1e-5) * scale + shift, 0)
        found[first::count] = np.maximum(z.reshape(len(z), -1) @ w.T + b, 0)
    return found


def replies_of(federation, features=in_evaluation):
    """Client -> its reply in a further round, and the features of its own model for its windows after it."""
    seen, reply = {}, type(federation.workspace.clients[0]).reply

    def listen(self):
        seen[self.id] = features(self.nets["model"], self.data.x)
        return reply(self)

    for one in federation.workspace.clients:
        one.__class__ = type("Listening", (type(one),), {"reply": listen})
    messages = {id: federation.server.message(id, Round(3, 3)) for id in range(federation.data.clients)}
    found = federation.backend.train(messages, Round(3, 3))
    return {id: one.reply for id, one in found.items()}, seen


def test_means_by_class():
    features, y = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 5.0]]), torch.tensor([0, 0, 2])
    assert class_means(features, y, 3).tolist() == [[2.0, 4.0], [0.0, 0.0], [5.0, 5.0]]
    assert class_counts(y, 3) == [2, 0, 1]


def test_clients_weigh_by_their_windows_of_a_class_and_absent_classes_keep_theirs():
    """(1·4 + 3·8) / 4 = 7 for class 0; class 1 comes from one client; class 2 is from the round before."""
    both = Prototypes(3, 1)
    both.update([torch.tensor([[9.0], [0.0], [5.0]])], [[1, 0, 2]])
    assert both.known == [0, 2]
    both.update([torch.tensor([[4.0], [0.0], [0.0]]), torch.tensor([[8.0], [1.0], [0.0]])], [[1, 0, 0], [3, 2, 0]])
    assert both.means.tolist() == [[7.0], [1.0], [5.0]] and both.known == [0, 1, 2]


def test_the_distance_is_a_mean_of_squares_where_a_prototype_is_known():
    h, prototypes = torch.tensor([[1.0, 2.0], [7.0, 7.0]]), torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    found = distances(h, torch.tensor([1, 0]), prototypes, torch.tensor([0.0, 1.0]))
    assert found.tolist() == [((1 - 3) ** 2 + (2 - 4) ** 2) / 2, 0.0]


def test_fedproto_sends_the_mean_features_of_the_trained_model_as_training_has_them(double):
    made = trained(FedProto)
    replies, features = replies_of(made, in_training)
    for id, reply in replies.items():
        y = made.data.train_y[id].numpy()
        assert set(reply.tensors) == {PROTOTYPES}
        assert reply.meta[COUNTS] == [int((y == c).sum()) for c in range(CLASSES)]
        for c in set(y):
            expected = features[id][y == c].mean(0)
            np.testing.assert_allclose(reply.tensors[PROTOTYPES][c].numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 32, 33, 70])
def test_features_of_training_leave_the_model_as_it_is(count, double):
    """By hand in NumPy, in the order of the windows; running statistics stay, and dropout draws nothing."""
    model, x = TinyNet(SHAPE, CLASSES), torch.randn(count, *SHAPE) + 3
    before = {name: own.clone() for name, own in model.state_dict().items()}
    expected = in_training(model, x)
    model.conv = nn.Sequential(model.conv, nn.Dropout(0.9))
    found = training_features_of(model, Batch(x, torch.zeros(count, dtype=torch.int64)))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-9, atol=1e-12)
    model.conv = model.conv[0]
    assert same_state(model.state_dict(), before)


def test_no_batch_is_of_a_single_window(monkeypatch):
    sizes = []
    monkeypatch.setattr(TinyNet, "features", lambda self, x: sizes.append(len(x)) or x.flatten(1))
    training_features_of(TinyNet(SHAPE, CLASSES), Batch(torch.zeros(65, *SHAPE), torch.zeros(65, dtype=torch.int64)))
    assert sizes == [22, 22, 21]


def test_fedprotos_prototypes_are_where_its_loss_sees_features(double):
    """With a client alone, whose prototypes are its own, its loss after training is the spread within classes."""
    made = make_federation(FedProto, make_data((24,)), rounds=3, join_ratio=1)
    made.run()
    client = made.backend.begin(0, made.server.message(0, Round(4, 4)), Round(4, 4))
    client.nets["model"].train()
    h, y = in_training(client.nets["model"], client.data.x), client.data.y.numpy()
    spread = np.mean([((h[i] - h[y == y[i]].mean(0)) ** 2).mean() for i in range(24)])
    found = client.losses(client.nets, client.data, client.context())["prototypes"]
    assert found.item() == pytest.approx(spread, rel=1e-9)


def test_fedproto_without_the_distance_is_local_and_with_it_is_not():
    alone, zero, made = trained(Local), trained(FedProto, params={"lam": 0.0}), trained(FedProto)
    kept = [[dict(one) for one in federation.workspace.kept] for federation in (alone, zero, made)]
    assert all(same_state(one, other) for one, other in zip(kept[0], kept[1], strict=True))
    assert not any(same_state(one, other) for one, other in zip(kept[0], kept[2], strict=True))


def test_fedproto_draws_the_clients_features_of_a_class_together():
    def spread(lam):
        replies, _ = replies_of(trained(FedProto, rounds=6, params={"lam": lam}))
        return torch.stack([reply.tensors[PROTOTYPES] for reply in replies.values()]).var(0).sum()

    assert spread(5.0) < spread(0.0) / 2


def test_fedgh_trains_the_head_on_the_pairs(double):
    """As many steps as pairs, on their mean cross-entropy: in NumPy, with its gradient by hand."""
    made = trained(FedGH, awkward_data(), rounds=1, params={"server_rate": 0.3})
    replies, features = replies_of(made)
    w, b = (made.server.weights[f"model.head.{name}"].numpy().copy() for name in ("weight", "bias"))
    h, y = [], []
    for id in range(4):
        labels = made.data.train_y[id].numpy()
        for c in sorted(set(labels)):
            h.append(features[id][labels == c].mean(0))
            y.append(c)
    h, one_hot = np.array(h), np.eye(CLASSES)[y]
    assert len(y) < 4 * CLASSES
    for _ in range(len(y)):
        z = np.exp(h @ w.T + b)
        off = (z / z.sum(1, keepdims=True) - one_hot) / len(y)
        assert np.sqrt(np.sum((off.T @ h) ** 2) + np.sum(off.sum(0) ** 2)) < CLIP
        w, b = w - 0.3 * off.T @ h, b - 0.3 * off.sum(0)
    made.server.aggregate(replies, Round(3, 3))
    np.testing.assert_allclose(made.server.weights["model.head.weight"].numpy(), w, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(made.server.weights["model.head.bias"].numpy(), b, rtol=1e-9, atol=1e-12)


def test_fedghs_clients_start_from_the_servers_head_and_predict_with_their_own():
    made = trained(FedGH)
    head = made.server.weights["model.head.weight"]
    one = made.workspace.enter(2)
    before = {n: t.clone() for n, t in float_state({"model": one.nets["model"]}).items()}
    now = made.workspace.state_for_evaluation(2, made.server.networks())
    assert same_state(now, before) and not torch.equal(before["model.head.weight"], head)
    one.receive(made.server.message(2, Round(3, 3)))
    after = float_state({"model": one.nets["model"]})
    assert torch.equal(after["model.head.weight"], head)
    assert torch.equal(after["model.conv.weight"], before["model.conv.weight"])


@pytest.mark.parametrize("classes", [None, [], [1, 0], [0, 0], [-1], [4], [True], [0.0], "0", [[0]]])
def test_fedgh_refuses_classes_that_cannot_be(classes):
    server = make_federation(FedGH).server
    prototypes = {PROTOTYPES: torch.zeros(CLASSES, 16)}
    server.check_reply(0, Message(prototypes, {"classes": [0, 3]}))
    with pytest.raises(BadMessage, match="'classes'"):
        server.check_reply(0, Message(prototypes, {"classes": classes}))


def test_fedpacs_statistics_by_loops():
    rng = np.random.default_rng(0)
    h, y = rng.normal(size=(30, 5)), np.arange(30) % 3
    counts = [10, 10, 10, 0]
    features = torch.from_numpy(h)
    found, variance = statistics(features, class_means(features, torch.from_numpy(y), 4), counts)
    v = 0.0
    for c in range(3):
        own = h[y == c]
        p = len(own) / 30
        np.testing.assert_allclose(found[c], p * own.mean(0))
        v += p * np.mean([row @ row for row in own]) - p**2 * own.mean(0) @ own.mean(0)
    assert variance.item() == pytest.approx(v / 30) and not found[3].any()


@pytest.mark.parametrize("seed", range(5))
def test_fedpacs_heads_solve_the_quadratic_programme(seed):
    """Compared with a general solver, and by the conditions of optimality (Karush, Kuhn, Tucker)."""
    rng = np.random.default_rng(seed)
    differences, variances = rng.normal(size=(6, 9)), rng.uniform(0, 3, 6)
    differences[seed] = 0  # the client itself
    p = differences @ differences.T + np.diag(variances)
    alpha = combination(differences, variances)
    assert alpha.min() >= 0 and alpha.sum() == pytest.approx(1)
    slope = p @ alpha
    assert np.allclose(slope[alpha > 1e-9], alpha @ slope) and (slope >= alpha @ slope - 1e-9).all()
    simplex = {"type": "eq", "fun": lambda a: a.sum() - 1}
    other = minimize(lambda a: a @ p @ a, np.full(6, 1 / 6), bounds=[(0, 1)] * 6, constraints=simplex, method="SLSQP")
    assert alpha @ p @ alpha <= other.fun + 1e-6


def test_fedpacs_programme_by_hand():
    """Without bias, shares go by 1 / v: 1 and 1/3 of 4/3. With nothing to choose by, the sum is still 1."""
    np.testing.assert_allclose(combination(np.zeros((2, 3)), np.array([1.0, 3.0])), [0.75, 0.25])
    np.testing.assert_allclose(combination(np.array([[0.0], [9.0]]), np.array([0.0, 1.0])), [1, 0], atol=1e-12)
    assert combination(np.zeros((3, 2)), np.zeros(3)).sum() == pytest.approx(1)
    assert np.isfinite(combination(np.full((3, 2), 1e30), np.full(3, 1e30))).all()


def test_fedpac_combines_heads_and_averages_bodies(double):
    made = trained(FedPAC, rounds=1)
    replies, _ = replies_of(made)
    made.server.aggregate(replies, Round(3, 3))
    means = np.stack([reply.tensors["classifier/means"].numpy().ravel() for reply in replies.values()])
    v = np.array([float(reply.tensors["classifier/variance"]) for reply in replies.values()])
    heads = np.stack([reply.tensors["model.head.weight"].numpy() for reply in replies.values()])
    for id in range(4):
        alpha = combination(means - means[id], v)
        sent = made.server.message(id, Round(4, 4)).tensors
        np.testing.assert_allclose(sent["model.head.weight"], np.tensordot(alpha, heads, 1), rtol=1e-9, atol=1e-12)
        body = sum(reply.meta["samples"] / 132 * reply.tensors["model.fc.weight"] for reply in replies.values())
        torch.testing.assert_close(sent["model.fc.weight"], body)


def test_fedpac_aligns_to_global_prototypes_and_else_to_its_own(double):
    made = trained(FedPAC, awkward_data(), rounds=1)
    made.server.prototypes.known.remove(2)
    client = made.backend.begin(3, made.server.message(3, Round(2, 2)), Round(2, 2))
    context, y = client.context(), client.data.y
    own = class_means(client.nets["model"].eval().features(client.data.x), y, CLASSES)
    torch.testing.assert_close(context[PROTOTYPES][2], own[2])
    assert torch.equal(context[PROTOTYPES][0], made.server.prototypes.means[0])
    first = make_federation(FedPAC)
    client = first.backend.begin(0, first.server.message(0, Round(1, 2)), Round(1, 2))
    assert not client.losses(client.nets, client.data, client.context())["alignment"]


@pytest.mark.parametrize("algorithm", [FedProto, FedGH, FedPAC])
def test_awkward_clients_and_a_restart(algorithm):
    assert goes_on_identically(lambda: make_federation(algorithm, awkward_data(), rounds=4))
    run(make_federation(algorithm, awkward_data(), rounds=4))
