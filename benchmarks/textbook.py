"""What the suite is measured against: FedAvg and FedKDX as most people would write them.

One client after the other, a `DataLoader` each, `state_dict`s copied about, an SVD of every update, scikit-learn's
metrics. It uses the suite's network and FedKDX's losses, so that the arithmetic is the same, and nothing of its engine.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from sklearn.metrics import accuracy_score, f1_score, recall_score, roc_auc_score
from sklearn.preprocessing import label_binarize
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fedkdx_plugin.algorithm import fedkdx
from fedkdx_plugin.models.cnn import CNN

BATCH, EPOCHS, RATE, CLIP = 32, 4, 0.01, 10.0
GAMMA, TAU, EPSILON = 0.9, 0.8, 0.9


class Windows(NamedTuple):
    """A client's windows (n, channels, 1, time) and labels (n,)."""

    x: Tensor
    y: Tensor


class FedAvg:
    """Train a copy of the global model at each selected client; average.

    Args:
        train, test: every client's windows.
        classes: number of classes.
        device: where networks and batches are put.
    """

    def __init__(self, train: Sequence[Windows], test: Sequence[Windows], classes: int, device: str) -> None:
        self.device, self.classes = device, classes
        self.train_loaders = [DataLoader(TensorDataset(*windows), BATCH, shuffle=True) for windows in train]
        self.test_loaders = [DataLoader(TensorDataset(*windows), BATCH) for windows in test]
        self.sizes = [len(windows.y) for windows in train]
        self.model = CNN(tuple(train[0].x.shape[1:]), classes).to(device)

    def round(self, selected: Sequence[int]) -> None:
        """One round, evaluation of all clients included."""
        states = [self.train_client(id) for id in selected]
        total = sum(self.sizes[id] for id in selected)
        average = {
            name: sum(state[name] * (self.sizes[id] / total) for id, state in zip(selected, states, strict=True))
            for name in states[0]
        }
        self.model.load_state_dict(average)
        self.evaluate([self.model] * len(self.test_loaders))

    def train_client(self, id: int) -> dict[str, Tensor]:
        model = copy.deepcopy(self.model)
        model.train()
        optimiser = torch.optim.SGD(model.parameters(), lr=RATE)
        for _ in range(EPOCHS):
            for x, y in self.train_loaders[id]:
                x, y = x.to(self.device), y.to(self.device)
                optimiser.zero_grad()
                loss = F.cross_entropy(model(x).logits, y)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimiser.step()
        return model.state_dict()

    def evaluate(self, models: Sequence[CNN]) -> dict[str, float]:
        """Mean figures over the clients, each with its model."""
        figures = []
        for model, loader in zip(models, self.test_loaders, strict=True):
            model.eval()
            scores, labels = [], []
            with torch.no_grad():
                for x, y in loader:
                    scores.append(F.softmax(model(x.to(self.device)).logits, dim=1).cpu().numpy())
                    labels.append(y.numpy())
            score, label = np.concatenate(scores), np.concatenate(labels)
            predicted, one_hot = score.argmax(1), label_binarize(label, classes=range(self.classes))
            figures.append(
                (
                    accuracy_score(label, predicted),
                    roc_auc_score(one_hot, score, average="micro"),
                    f1_score(label, predicted, average="macro", zero_division=0),
                    recall_score(label, predicted, average="macro", zero_division=0),
                )
            )
        return dict(zip(("accuracy", "auc", "f1", "recall"), np.mean(figures, axis=0), strict=True))


class FedKDX(FedAvg):
    """A teacher at each client, a shared student moved by compressed gradients."""

    def __init__(self, train: Sequence[Windows], test: Sequence[Windows], classes: int, device: str) -> None:
        super().__init__(train, test, classes, device)
        self.teachers = [copy.deepcopy(self.model) for _ in train]

    def round(self, selected: Sequence[int]) -> None:
        updates = [self.train_client(id) for id in selected]
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                if tensor.is_floating_point():
                    mean = sum(low_rank(update[name]) for update in updates) / len(updates)
                    tensor -= RATE * low_rank(mean)
        self.evaluate([self.model] * len(self.test_loaders))
        self.evaluate(self.teachers)

    def train_client(self, id: int) -> dict[str, Tensor]:
        teacher, student = self.teachers[id], copy.deepcopy(self.model)
        teacher.train(), student.train()
        optimisers = [torch.optim.SGD(net.parameters(), lr=RATE) for net in (teacher, student)]
        for _ in range(EPOCHS):
            for x, y in self.train_loaders[id]:
                x, y = x.to(self.device), y.to(self.device)
                for optimiser in optimisers:
                    optimiser.zero_grad()
                loss = self.loss(teacher(x), student(x), y)
                loss.backward()
                for net, optimiser in zip((teacher, student), optimisers, strict=True):
                    nn.utils.clip_grad_norm_(net.parameters(), CLIP)
                    optimiser.step()
        before, after = self.model.state_dict(), student.state_dict()
        return {name: (before[name] - after[name]) / RATE for name in before if before[name].is_floating_point()}

    def loss(self, t: object, s: object, y: Tensor) -> Tensor:
        loss = F.cross_entropy(t.logits, y) + F.cross_entropy(s.logits, y)
        for learner, target in ((t, s), (s, t)):
            learnt, fixed = fedkdx.soften(learner.logits, TAU), fedkdx.soften(target.logits, TAU)
            loss = loss + fedkdx.kd(learnt, fixed, TAU).mean()
            loss = loss + fedkdx.nkd(fedkdx.apart(learnt, y), fedkdx.apart(fixed, y), GAMMA, TAU).mean()
        loss = loss + fedkdx.contrastive(t.features, s.features.detach(), TAU).mean()
        return loss + fedkdx.contrastive(t.features.detach(), s.features, TAU).mean()


def low_rank(tensor: Tensor) -> Tensor:
    """Return the tensor rebuilt from the fewest singular values of its matrix that keep EPSILON of its energy."""
    if tensor.dim() < 2:
        return tensor
    u, s, v = torch.linalg.svd(tensor.flatten(1), full_matrices=False)
    energy = (s**2).cumsum(0) / (s**2).sum()
    rank = int((energy <= EPSILON).sum()) + 1
    return ((u[:, :rank] * s[:rank]) @ v[:rank]).view_as(tensor)
