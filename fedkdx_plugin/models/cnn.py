"""The paper's convolutional network and a smaller one of the same form."""

from __future__ import annotations

from typing import ClassVar

from torch import nn

from registry.errors import UserError
from registry.interface import Model

KERNEL = 9
SHORTEST_VALID = 28  # samples; two valid 1×9 convolutions, each pooled by two, leave one
SHORTEST = 4  # samples; one pooling leaves two, which batch norm needs in a batch of one
LARGEST = 100_000  # above this the first layers alone take gigabytes


class CNN(Model):
    """Two 1×9 convolutions (32, 64 filters) with max pooling, fully connected layers (256, 128 neurons).

    Each convolution is followed by batch norm and ReLU. Convolutions are valid, except for windows of fewer than 28
    samples, which are padded with zeros to keep their length. Features are the 128 values before the output layer.

    Args:
        shape: (channels, 1, time) of one window.
        classes: number of classes.

    Raises:
        UserError: a window or a number of classes that no such network can take.
    """

    paper: ClassVar[str] = "FedKDX, paper §3.6 and Fig. 2"
    parts: ClassVar[tuple[str, ...]] = ("convolutions", "dense")
    filters: ClassVar[tuple[int, int]] = (32, 64)
    neurons: ClassVar[tuple[int, int]] = (256, 128)

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        check_sizes(shape, classes)
        super().__init__(shape, classes)
        channels, _, time = shape
        padding = padding_for(time)
        first, second = self.filters
        self.convolutions = nn.Sequential(
            conv_block(channels, first, padding), conv_block(first, second, padding), nn.Flatten()
        )
        left = pooled_length(pooled_length(time, padding), padding)
        self.dense = dense_layers(second * left, self.neurons)
        self.feature_size = self.neurons[-1]
        self.head = nn.Linear(self.feature_size, classes)


class CNNSmall(CNN):
    """CNN with half the filters and fewer neurons (96, 64): a student with a fifth of its weights."""

    paper: ClassVar[str] = "FedKDX, paper §3.6, made smaller"
    filters = (16, 32)
    neurons = (96, 64)


def check_sizes(shape: tuple[int, int, int], classes: int) -> None:
    """Raise UserError for a window or a number of classes that the models cannot take."""
    if len(shape) != 3 or not all(isinstance(size, int) for size in (*shape, classes)):
        raise UserError(f"model: windows of shape {shape}, {classes} classes; whole numbers would be right")
    channels, height, time = shape
    if height != 1 or not 1 <= channels <= LARGEST or not SHORTEST <= time <= LARGEST:
        raise UserError(
            f"model: windows of shape {tuple(shape)}; (channels, 1, time) with 1 to {LARGEST} channels "
            f"and {SHORTEST} to {LARGEST} samples would be right"
        )
    if not 2 <= classes <= LARGEST:
        raise UserError(f"model: {classes} classes; 2 to {LARGEST} would be right")


def padding_for(time: int) -> int:
    """Return the number of zeros on either side before a convolution: 0, or what keeps a short window's length."""
    return 0 if time >= SHORTEST_VALID else KERNEL // 2


def pooled_length(time: int, padding: int) -> int:
    """Return the number of samples that `conv_block` leaves of `time`."""
    return (time + 2 * padding - KERNEL + 1) // 2


def conv_block(inputs: int, filters: int, padding: int) -> nn.Sequential:
    """Return 1×9 convolution, batch norm, ReLU, 1×2 max pooling: (n, inputs, 1, time) -> (n, filters, 1, ...)."""
    return nn.Sequential(
        nn.Conv2d(inputs, filters, (1, KERNEL), padding=(0, padding)),
        nn.BatchNorm2d(filters),
        nn.ReLU(),
        nn.MaxPool2d((1, 2)),
    )


def dense_layers(inputs: int, neurons: tuple[int, int]) -> nn.Sequential:
    """Return two fully connected layers with ReLU: (n, inputs) -> (n, neurons[1])."""
    first, second = neurons
    return nn.Sequential(nn.Linear(inputs, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU())
