"""A small transformer on patches of a window."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from fedkdx_plugin.models.cnn import check_sizes
from fedkdx_plugin.models.parts import Attention
from registry.interface import Model


class Layer(nn.Module):
    """Layer of an encoder, normalised first: x + attention(norm(x)), then + MLP(norm(x))."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (n, tokens, width) of the same."""
        x = x + self.attention(x)
        y: Tensor = x + self.mlp(x)
        return y


class PatchTransformer(Model):
    """Patches of 8 samples as tokens (64 values, learnt positions), two encoder layers of 4 heads, mean over tokens.

    As the vision transformer cuts images, and PatchTST time series, here with all channels in a token; the last patch
    is padded with zeros. Its norms are layer norms of the tokens, whatever `--norm` says.

    Args:
        shape: (channels, 1, time) of one window.
        classes: number of classes.

    Raises:
        UserError: a window or a number of classes that no such network can take.
    """

    paper: ClassVar[str] = "after Dosovitskiy et al. 2021, arXiv:2010.11929, and Nie et al. 2023, arXiv:2211.14730"
    patch: ClassVar[int] = 8
    width: ClassVar[int] = 64
    heads: ClassVar[int] = 4
    layers: ClassVar[int] = 2

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        check_sizes(shape, classes)
        super().__init__(shape, classes)
        channels, _, time = shape
        tokens = -(-time // self.patch)
        self.padding = nn.ConstantPad1d((0, tokens * self.patch - time), 0.0)
        self.embedding = nn.Linear(channels * self.patch, self.width)
        self.positions = nn.Parameter(0.02 * torch.randn(tokens, self.width))
        self.encoder = nn.Sequential(
            *(Layer(self.width, self.heads) for _ in range(self.layers)), nn.LayerNorm(self.width)
        )
        self.feature_size = self.width
        self.head = nn.Linear(self.width, classes)

    def features(self, x: Tensor) -> Tensor:
        """Compute the features of windows: (n, channels, 1, time) -> (n, width)."""
        patches = self.padding(x).squeeze(2).unflatten(2, (-1, self.patch))  # (n, channels, tokens, patch)
        tokens = self.embedding(patches.transpose(1, 2).flatten(2)) + self.positions
        features: Tensor = self.encoder(tokens).mean(1)
        return features
