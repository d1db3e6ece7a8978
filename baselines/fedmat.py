"""FedMAT: Chen et al., Federated Multi-task Learning with Hierarchical Attention for Sensor Data Analytics, 2020.

The paper calls it FATHOM. Deviations from it:

- The clients' hidden states are not joined on the server, which would be data leaving the client in every step: what is
  shared are the weights of the feature network and of the temporal attention, averaged as in FedAvg.
- Any model takes the place of the first LSTM: it sees the window in segments, which are the time steps.
- The attended steps are summed up; the paper runs a second, private LSTM over them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from baselines.fedavg import FedAvg, FedAvgClient
from registry.interface import Model, Task

SEGMENTS = 4  # time steps in a window; the paper takes 10 to 30 single samples, which no convolution can be run on
SHORTEST_SEGMENT = 8  # samples of a segment: a shorter window has fewer segments


class HierarchicalAttention(Model):
    """Attention over the channels, a network over the segments of the window, attention over the segments.

    Args:
        task: gives the feature network, built for segments.
    """

    def __init__(self, task: Task) -> None:
        super().__init__(task.shape, task.classes)
        channels, _, time = task.shape
        self.segments = max(1, min(SEGMENTS, time // SHORTEST_SEGMENT))
        self.length = time // self.segments
        self.network = task.model((channels, 1, self.length))
        self.network.head = nn.Identity()  # only its features are used
        self.feature_size = self.network.feature_size
        self.attention = nn.Conv2d(channels, channels, 1, bias=False)
        nn.init.zeros_(self.attention.weight)  # no channel is preferred at first
        self.temporal = nn.Linear(self.segments * self.feature_size, self.segments)
        self.head = nn.Linear(self.feature_size, task.classes)

    def features(self, x: Tensor) -> Tensor:
        """Σ_s β_s h_s over the segments s; samples that fill no segment are left out."""
        x = self._attend(x)[..., : self.segments * self.length]
        segments = x.unflatten(3, (self.segments, self.length)).movedim(3, 1)  # (n, segments, channels, 1, length)
        h = self.network.features(segments.flatten(0, 1)).unflatten(0, (-1, self.segments))
        beta = torch.tanh(self.temporal(h.flatten(1))).softmax(1)
        return (beta.unsqueeze(2) * h).sum(1)

    def _attend(self, x: Tensor) -> Tensor:
        """α_t ⊙ x_t with α_t = softmax(W x_t) over the channels, times their number: no preference changes nothing."""
        return self.attention(x).softmax(1) * x.shape[1] * x


class FedMATClient(FedAvgClient):
    """Keeps its attention over channels and its classifier; shares feature network and temporal attention."""

    private = ("model.attention.*", "model.head.*")

    @classmethod
    def build(cls, task: Task) -> dict[str, nn.Module]:
        return {"model": HierarchicalAttention(task)}


class FedMAT(FedAvg):
    """Shares features and attention over time; each client has its own attention over channels and classifier."""

    paper = "Chen et al. 2020, FATHOM, doi:10.1109/IJCNN48605.2020.9207508"
    sends = "shared part down and up; own attention and classifier on it"
    Client = FedMATClient
