"""InceptionTime: convolutions of several lengths side by side."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from fedkdx_plugin.models.cnn import check_sizes
from fedkdx_plugin.models.parts import MeanOverTime, conv_norm
from fedkdx_plugin.models.resnet import Residual
from registry.interface import Model


class Inception(nn.Module):
    """Module of the paper: (n, inputs, 1, time) -> (n, 4 · filters, 1, time).

    A bottleneck of one sample, three convolutions of it and one of the input's maxima over three samples, put together
    and normalised.
    """

    def __init__(self, inputs: int, filters: int, kernels: tuple[int, ...]) -> None:
        super().__init__()
        self.bottleneck = nn.Conv2d(inputs, filters, (1, 1), bias=False)
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.ConstantPad1d(((kernel - 1) // 2, kernel // 2), 0.0),
                nn.Conv2d(filters, filters, (1, kernel), bias=False),
            )
            for kernel in kernels
        )
        self.maxima = nn.Sequential(
            nn.MaxPool2d((1, 3), stride=1, padding=(0, 1)), nn.Conv2d(inputs, filters, (1, 1), bias=False)
        )
        self.norm = nn.BatchNorm2d((len(kernels) + 1) * filters)

    def forward(self, x: Tensor) -> Tensor:
        """Return all branches after one another, normalised."""
        short = self.bottleneck(x)
        normed: Tensor = self.norm(torch.cat([*(branch(short) for branch in self.branches), self.maxima(x)], 1))
        return normed


class InceptionTime(Model):
    """Six inception modules with convolutions of 10, 20 and 40 samples (32 filters each), a shortcut over three each.

    The paper's result is the mean of five such networks; this is one.

    Args:
        shape: (channels, 1, time) of one window.
        classes: number of classes.

    Raises:
        UserError: a window or a number of classes that no such network can take.
    """

    paper: ClassVar[str] = "Ismail Fawaz et al. 2020, arXiv:1909.04939"
    parts: ClassVar[tuple[str, ...]] = ("blocks", "pooling")
    filters: ClassVar[int] = 32
    kernels: ClassVar[tuple[int, ...]] = (10, 20, 40)

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        check_sizes(shape, classes)
        super().__init__(shape, classes)
        self.feature_size = (len(self.kernels) + 1) * self.filters
        self.blocks = nn.Sequential(self.block(shape[0]), self.block(self.feature_size))
        self.pooling = MeanOverTime()
        self.head = nn.Linear(self.feature_size, classes)

    def block(self, inputs: int) -> Residual:
        """Return three modules with a shortcut."""
        first, second, third = (
            Inception(before, self.filters, self.kernels) for before in (inputs, self.feature_size, self.feature_size)
        )
        layers = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        return Residual(layers, conv_norm(inputs, self.feature_size, 1))
