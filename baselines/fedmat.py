"""FedMAT: Chen et al., Federated Multi-task Learning with Hierarchical Attention for Sensor Data Analytics, 2020.

The paper calls it FATHOM. Deviations from it:

- The clients' hidden states are not joined on the server, since data would leave the client in every step: the weights
  of the feature network and of the temporal attention are shared instead, averaged as in FedAvg.
- Any model replaces the first LSTM: it is applied to the segments of a window, which are the time steps.
- The weighted steps are summed; the paper applies a second, private LSTM to them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from baselines.fedavg import FedAvg, FedAvgClient
from registry.interface import Model, Task
from registry.parameters import Params, option

SHORTEST_SEGMENT = 8  # samples; shorter windows have fewer segments


@dataclass(frozen=True)
class FedMATParams(Params):
    """Hyper-parameters of FedMAT. The paper's time steps are 10 to 30 single samples, which no convolution can take."""

    segments: int = option(2, "time steps that a window is cut into; 1 leaves attention over time out", 1)


class HierarchicalAttention(Model):
    """Attention over the channels, a network applied to each segment of the window, attention over the segments.

    Args:
        task: makes the feature network, for windows of the length of a segment.
        segments: number of segments, fewer in a window that would have segments of less than 8 samples.
    """

    def __init__(self, task: Task, segments: int) -> None:
        super().__init__(task.shape, task.classes)
        channels, _, time = task.shape
        self.segments = max(1, min(segments, time // SHORTEST_SEGMENT))
        self.length = time // self.segments
        self.network = task.model((channels, 1, self.length))
        self.network.head = nn.Identity()  # only its features are used
        self.feature_size = self.network.feature_size
        self.attention = nn.Conv2d(channels, channels, 1, bias=False)
        nn.init.zeros_(self.attention.weight)  # all channels have the same weight at first
        self.temporal = nn.Linear(self.segments * self.feature_size, self.segments)
        self.head = nn.Linear(self.feature_size, task.classes)

    def features(self, x: Tensor) -> Tensor:
        """Compute Σ_s β_s h_s over the segments s, (n, feature_size), without samples after the last full segment."""
        x = self._attend(x)[..., : self.segments * self.length]
        segments = x.unflatten(3, (self.segments, self.length)).movedim(3, 1)  # (n, segments, channels, 1, length)
        h: Tensor = self.network.features(segments.flatten(0, 1)).unflatten(0, (-1, self.segments))
        beta = torch.tanh(self.temporal(h.flatten(1))).softmax(1)
        return (beta.unsqueeze(2) * h).sum(1)

    def _attend(self, x: Tensor) -> Tensor:
        """Return α_t ⊙ x_t with α_t = softmax(W x_t) over the channels, times their number: equal weights are 1."""
        alpha: Tensor = self.attention(x).softmax(1)
        return alpha * x.shape[1] * x


class FedMATClient(FedAvgClient):
    """Keeps the attention over channels and the classifier; shares the feature network and the temporal attention."""

    private = ("model.attention.*", "model.head.*")
    windows_meet = ""

    @classmethod
    def build(cls, task: Task) -> dict[str, nn.Module]:
        """Return the model with both attentions."""
        return {"model": HierarchicalAttention(task, task.params.segments)}


class FedMAT(FedAvg):
    """Shares features and attention over time; each client has its own attention over channels and classifier.

    The authors' code has, per task, a layer of the features and the weights of the attention over time, too, of which
    the tasks have the hidden states in common; here both are shared. Their dense layer after the attention over
    channels is left out, and that attention is scaled by the number of channels (see `_attend`).
    """

    paper = "Chen et al. 2020, FATHOM, doi:10.1109/IJCNN48605.2020.9207508"
    sends = "shared part down and up; own attention and classifier"
    Client = FedMATClient
    Params = FedMATParams
