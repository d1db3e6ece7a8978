"""A multi-layer perceptron on the flattened window."""

from __future__ import annotations

import math

from torch import nn

from registry.interface import Model


class MLP(Model):
    """Two fully connected layers; ignores that the samples of a window follow each other."""

    parts = ("body",)

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__(shape, classes)
        self.feature_size = 64
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 64), nn.ReLU())
        self.head = nn.Linear(64, classes)
