"""Layers that several models are made of; windows and their features are (n, channels, 1, time) throughout."""

from __future__ import annotations

from torch import Tensor, nn


def conv_norm(inputs: int, filters: int, kernel: int, dilation: int = 1, causal: bool = False) -> nn.Sequential:
    """Return a convolution along time that keeps the length, and batch norm: (n, inputs, 1, t) -> (n, filters, 1, t).

    Args:
        inputs, filters: number of channels before and after.
        kernel: samples that one value of the result depends on, `dilation` apart.
        dilation: distance of these samples.
        causal: whether a value depends on no later sample.
    """
    reach = dilation * (kernel - 1)
    before = reach if causal else reach // 2
    return nn.Sequential(
        nn.ConstantPad1d((before, reach - before), 0.0),
        nn.Conv2d(inputs, filters, (1, kernel), dilation=(1, dilation), bias=False),
        nn.BatchNorm2d(filters),
    )


class MeanOverTime(nn.Module):
    """Global average pooling: (n, channels, 1, time) -> (n, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean over time."""
        return x.mean((2, 3))


class Attention(nn.Module):
    """Multi-head self-attention (Vaswani et al. 2017, eq. 1): (n, tokens, width) -> (n, tokens, width).

    Written out in products, which vmap stacks over clients; `nn.MultiheadAttention` takes other ways by type and mode.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inner = nn.Linear(width, 3 * width)
        self.outer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return softmax(Q Kᵀ / √d) V of each head, put together by one more layer."""
        n, tokens, width = x.shape
        query, key, value = self.inner(x).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (query @ key.transpose(2, 3) / (width // self.heads) ** 0.5).softmax(3)
        mixed: Tensor = self.outer((weights @ value).transpose(1, 2).reshape(n, tokens, width))
        return mixed
