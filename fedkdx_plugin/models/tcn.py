"""Temporal convolutional network: causal convolutions that reach back twice as far in each block."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from fedkdx_plugin.models.cnn import check_sizes
from fedkdx_plugin.models.parts import conv_norm
from fedkdx_plugin.models.resnet import Residual
from registry.interface import Model


class TCN(Model):
    """Residual blocks of two causal convolutions of 7 samples (64 filters), 1, 2, 4, ... samples apart.

    There are as many blocks as it takes for the last sample's value to depend on the whole window; it is the feature.
    Deviations: batch norm in place of weight normalisation, so that `--norm` has its meaning, and no dropout.

    Args:
        shape: (channels, 1, time) of one window.
        classes: number of classes.

    Raises:
        UserError: a window or a number of classes that no such network can take.
    """

    paper: ClassVar[str] = "Bai, Kolter and Koltun 2018, arXiv:1803.01271"
    filters: ClassVar[int] = 64
    kernel: ClassVar[int] = 7

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        check_sizes(shape, classes)
        super().__init__(shape, classes)
        blocks: list[nn.Module] = []
        inputs, reach = shape[0], 1
        while reach < shape[2]:
            dilation = 2 ** len(blocks)
            blocks.append(self.block(inputs, dilation))
            inputs, reach = self.filters, reach + 2 * (self.kernel - 1) * dilation
        self.blocks = nn.Sequential(*blocks)
        self.feature_size = self.filters
        self.head = nn.Linear(self.feature_size, classes)

    def block(self, inputs: int, dilation: int) -> Residual:
        """Return a block; its shortcut is a convolution of one sample where the number of channels changes."""
        first, second = (
            conv_norm(before, self.filters, self.kernel, dilation, causal=True) for before in (inputs, self.filters)
        )
        shortcut = nn.Identity() if inputs == self.filters else nn.Conv2d(inputs, self.filters, (1, 1))
        return Residual(nn.Sequential(first, nn.ReLU(), second, nn.ReLU()), shortcut)

    def features(self, x: Tensor) -> Tensor:
        """Compute the features of windows, those of the last sample: (n, channels, 1, time) -> (n, filters)."""
        features: Tensor = self.blocks(x)[:, :, 0, -1]
        return features
