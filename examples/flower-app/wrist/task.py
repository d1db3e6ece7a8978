"""The network and the data, of which nothing knows of federated learning; here waves, as an accelerometer might see."""

import numpy as np
from flwr.app import Context
from torch import Tensor, nn

SHAPE, CLASSES = (3, 64), 4  # three channels of 64 samples
TRAINING, TEST = 120, 40  # windows of a client


class Net(nn.Module):
    """A network from windows (n, 3, 64) to logits (n, 4)."""

    head_name = "classifier"  # its last layer: what it is given are the features

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(nn.Conv1d(3, 16, 9), nn.BatchNorm1d(16), nn.ReLU(), nn.MaxPool1d(4))
        self.hidden = nn.Linear(16 * 14, 32)
        self.classifier = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Compute logits (n, 4) of windows (n, 3, 64)."""
        logits: Tensor = self.classifier(self.hidden(self.convolutions(x).flatten(1)).relu())
        return logits


def load(context: Context) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return this node's windows and labels, for training and for testing; wearers differ in speed and strength."""
    rng = np.random.default_rng(int(context.node_config["partition-id"]))
    speed, strength = rng.uniform(0.8, 1.2), rng.uniform(0.5, 1.5, size=(1, 3, 1))
    y = rng.integers(CLASSES, size=TRAINING + TEST)
    time = np.arange(SHAPE[1]) / SHAPE[1] + 0.2 * rng.uniform(size=(len(y), 1, 1))
    x = strength * np.sin(2 * np.pi * speed * (y[:, None, None] + 1) * time) + 0.5 * rng.normal(size=(len(y), *SHAPE))
    return x[:TRAINING], y[:TRAINING], x[TRAINING:], y[TRAINING:]
