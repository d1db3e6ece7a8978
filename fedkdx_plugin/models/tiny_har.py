"""TinyHAR: few weights, attention between channels, an LSTM, attention over time."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from fedkdx_plugin.models.cnn import check_sizes
from fedkdx_plugin.models.parts import Attention
from registry.interface import Model

KERNEL = 5
SHORTEST_STRIDED = 8  # samples; two strides of 2 leave two, which batch norm needs in a batch of one


class TinyHAR(Model):
    """Convolutions of each channel by itself (20 filters), attention between channels, LSTM of 40 units, attention.

    Four convolutions of 5 samples, the first and the third with a stride of 2 (not in windows of fewer than 8 samples);
    then, for each step of time, attention between the channels and a layer that joins them; an LSTM; the sum of its
    states weighted by attention, times a learnt γ, plus the last state. Deviations: one attention head in place of the
    authors' variant, and no dropout.

    Args:
        shape: (channels, 1, time) of one window.
        classes: number of classes.

    Raises:
        UserError: a window or a number of classes that no such network can take.
    """

    paper: ClassVar[str] = "Zhou et al. 2022, doi:10.1145/3544794.3558467"
    filters: ClassVar[int] = 20

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        check_sizes(shape, classes)
        super().__init__(shape, classes)
        filters, units = self.filters, 2 * self.filters
        layers: list[nn.Module] = []
        longer = 2 if shape[2] >= SHORTEST_STRIDED else 1
        for inputs, stride in ((1, longer), (filters, 1), (filters, longer), (filters, 1)):
            layers += [
                nn.Conv2d(inputs, filters, (1, KERNEL), stride=(1, stride), padding=(0, KERNEL // 2)),
                nn.BatchNorm2d(filters),
                nn.ReLU(),
            ]
        self.convolutions = nn.Sequential(*layers)
        self.between_channels = Attention(filters, 1)
        self.joined = nn.Sequential(nn.Linear(shape[0] * filters, units), nn.ReLU())
        self.lstm = nn.LSTM(units, units, batch_first=True)
        self.scores = nn.Sequential(nn.Linear(units, units), nn.Tanh(), nn.Linear(units, 1, bias=False))
        self.gamma = nn.Parameter(torch.ones(1))
        self.feature_size = units
        self.head = nn.Linear(units, classes)

    def features(self, x: Tensor) -> Tensor:
        """Compute the features of windows: (n, channels, 1, time) -> (n, units)."""
        maps = self.convolutions(x.transpose(1, 2))  # (n, filters, channels, steps)
        n, filters, channels, steps = maps.shape
        tokens = maps.permute(0, 3, 2, 1).reshape(n * steps, channels, filters)
        tokens = tokens + self.between_channels(tokens)
        hidden, _ = self.lstm(self.joined(tokens.reshape(n, steps, channels * filters)))
        weights = self.scores(hidden).softmax(1)
        features: Tensor = self.gamma * (weights * hidden).sum(1) + hidden[:, -1]
        return features
