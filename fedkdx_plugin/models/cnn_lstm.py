"""The paper's hybrid of convolution and LSTM."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from fedkdx_plugin.models.cnn import check_sizes, conv_block, dense_layers, padding_for, pooled_length
from registry.interface import Model


class CNNLSTM(Model):
    """One 1×9 convolution (32 filters), an LSTM (32 units), fully connected layers (256, 128 neurons).

    The paper gives the layers but not their sizes. The convolution block and the fully connected layers are
    as in `CNN`, and so is the padding of windows of fewer than 28 samples. The hidden states of all time
    steps are used: with the last one alone, or their mean, the network learns far more slowly at the paper's
    learning rate.

    Args:
        shape: (channels, 1, time) of one window.
        classes: number of classes.

    Raises:
        UserError: a window or a number of classes that no such network can take.
    """

    paper: ClassVar[str] = "FedKDX, paper §4.4.2 and Fig. 6"
    filters: ClassVar[int] = 32
    units: ClassVar[int] = 32
    neurons: ClassVar[tuple[int, int]] = (256, 128)

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        check_sizes(shape, classes)
        super().__init__(shape, classes)
        channels, _, time = shape
        padding = padding_for(time)
        self.convolution = conv_block(channels, self.filters, padding)
        self.lstm = nn.LSTM(self.filters, self.units, batch_first=True)
        self.dense = dense_layers(self.units * pooled_length(time, padding), self.neurons)
        self.feature_size = self.neurons[-1]
        self.head = nn.Linear(self.feature_size, classes)

    def features(self, x: Tensor) -> Tensor:
        """Compute the features of windows: (n, channels, 1, time) -> (n, feature_size)."""
        steps = self.convolution(x).squeeze(2).transpose(1, 2)  # (n, time, filters)
        hidden, _ = self.lstm(steps)
        features: Tensor = self.dense(hidden.flatten(1))
        return features
