"""Residual network for time series."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from fedkdx_plugin.models.cnn import check_sizes
from fedkdx_plugin.models.parts import MeanOverTime, conv_norm
from registry.interface import Model


class Residual(nn.Module):
    """Layers with a shortcut: ReLU(layers(x) + shortcut(x))."""

    def __init__(self, layers: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.layers, self.shortcut = layers, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(layers(x) + shortcut(x))."""
        y: Tensor = self.layers(x) + self.shortcut(x)
        return y.relu()


class ResNet1d(Model):
    """Three residual blocks of convolutions of 8, 5 and 3 samples (64, 128, 128 filters), mean over time.

    Args:
        shape: (channels, 1, time) of one window.
        classes: number of classes.

    Raises:
        UserError: a window or a number of classes that no such network can take.
    """

    paper: ClassVar[str] = "Wang, Yan and Oates 2017, arXiv:1611.06455"
    parts: ClassVar[tuple[str, ...]] = ("blocks", "pooling")
    filters: ClassVar[tuple[int, ...]] = (64, 128, 128)
    kernels: ClassVar[tuple[int, ...]] = (8, 5, 3)

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        check_sizes(shape, classes)
        super().__init__(shape, classes)
        inputs = (shape[0], *self.filters[:-1])
        self.blocks = nn.Sequential(*map(self.block, inputs, self.filters))
        self.pooling = MeanOverTime()
        self.feature_size = self.filters[-1]
        self.head = nn.Linear(self.feature_size, classes)

    def block(self, inputs: int, filters: int) -> Residual:
        """Return a block; its shortcut is a convolution of one sample where the number of channels changes."""
        first, second, third = (
            conv_norm(before, filters, kernel)
            for before, kernel in zip((inputs, filters, filters), self.kernels, strict=True)
        )
        shortcut = nn.BatchNorm2d(filters) if inputs == filters else conv_norm(inputs, filters, 1)
        return Residual(nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third), shortcut)
