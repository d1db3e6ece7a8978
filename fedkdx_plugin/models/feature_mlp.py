"""A multilayer perceptron on hand-made features of a window."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from fedkdx_plugin.models.cnn import check_sizes
from registry.interface import Model

LAGS = (1, 2, 4, 8, 16, 32)  # samples


class FeatureMLP(Model):
    """Statistics of each channel, then two fully connected layers (128, 64 neurons).

    The statistics are those usual for wearable sensors: mean, standard deviation, minimum, maximum, and how often the
    mean is crossed; and the mean absolute change over 1, 2, 4, ... samples, as far as the window goes, which stands for
    a spectrum. Windows are expected to be scaled by channel (`--scale`).

    Args:
        shape: (channels, 1, time) of one window.
        classes: number of classes.

    Raises:
        UserError: a window or a number of classes that no such network can take.
    """

    paper: ClassVar[str] = "features after Figo et al. 2010, doi:10.1007/s00779-010-0293-9"
    neurons: ClassVar[tuple[int, int]] = (128, 64)

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        check_sizes(shape, classes)
        super().__init__(shape, classes)
        channels, _, time = shape
        self.lags = tuple(lag for lag in LAGS if lag < time)
        statistics = channels * (5 + len(self.lags))
        first, second = self.neurons
        self.dense = nn.Sequential(nn.Linear(statistics, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU())
        self.feature_size = second
        self.head = nn.Linear(second, classes)

    def features(self, x: Tensor) -> Tensor:
        """Compute the features of windows: (n, channels, 1, time) -> (n, neurons[1])."""
        features: Tensor = self.dense(self.statistics(x))
        return features

    def statistics(self, x: Tensor) -> Tensor:
        """Return the statistics, (n, channels · (5 + lags))."""
        x = x.squeeze(2)
        mean = x.mean(2)
        above = (x > mean.unsqueeze(2)).to(x.dtype)
        crossings = (above[:, :, 1:] - above[:, :, :-1]).abs().mean(2)
        changes = [(x[:, :, lag:] - x[:, :, :-lag]).abs().mean(2) for lag in self.lags]
        deviation = (x - mean.unsqueeze(2)).square().mean(2).sqrt()
        return torch.cat([mean, deviation, x.amin(2), x.amax(2), crossings, *changes], 1)
