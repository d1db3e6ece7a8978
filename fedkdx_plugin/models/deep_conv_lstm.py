"""DeepConvLSTM: convolutions of each channel by itself, then two LSTMs."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from fedkdx_plugin.models.cnn import check_sizes
from registry.interface import Model

KERNEL = 5
LAYERS = 4
SHORTEST_VALID = LAYERS * (KERNEL - 1) + 8  # samples; the convolutions leave 8


class DeepConvLSTM(Model):
    """Four convolutions of 5 samples of each channel by itself (64 filters), two LSTMs of 128 units, the last state.

    Convolutions are valid, as in the paper; windows of fewer than 24 samples are padded with zeros to keep their
    length. Deviation: no dropout.

    Args:
        shape: (channels, 1, time) of one window.
        classes: number of classes.

    Raises:
        UserError: a window or a number of classes that no such network can take.
    """

    paper: ClassVar[str] = "Ordóñez and Roggen 2016, doi:10.3390/s16010115"
    filters: ClassVar[int] = 64
    units: ClassVar[int] = 128

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        check_sizes(shape, classes)
        super().__init__(shape, classes)
        channels, _, time = shape
        padding = 0 if time >= SHORTEST_VALID else KERNEL // 2
        layers: list[nn.Module] = []
        for inputs in (1, *[self.filters] * (LAYERS - 1)):
            layers += [nn.Conv2d(inputs, self.filters, (1, KERNEL), padding=(0, padding)), nn.ReLU()]
        self.convolutions = nn.Sequential(*layers)
        self.first = nn.LSTM(self.filters * channels, self.units, batch_first=True)
        self.second = nn.LSTM(self.units, self.units, batch_first=True)
        self.feature_size = self.units
        self.head = nn.Linear(self.units, classes)

    def features(self, x: Tensor) -> Tensor:
        """Compute the features of windows: (n, channels, 1, time) -> (n, units)."""
        maps = self.convolutions(x.transpose(1, 2))  # (n, filters, channels, steps)
        steps = maps.flatten(1, 2).transpose(1, 2)  # (n, steps, filters · channels)
        hidden, _ = self.second(self.first(steps)[0])
        features: Tensor = hidden[:, -1]
        return features
