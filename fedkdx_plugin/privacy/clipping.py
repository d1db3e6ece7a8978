"""Bounds on the norm of clients' updates: a fixed one, or one that follows the median of the norms."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from fedkdx_plugin.privacy.options import LEAST_CLIP, MOST_CLIP

State = Mapping[str, Tensor]

FIRST = 0.1  # C of the first round (Andrew et al. 2021, section 3)
QUANTILE = 0.5  # γ: of the norms, that C follows
RATE = 0.2  # η_C: of the steps of log C
BITS_SHARE = 0.1  # at most, of the budget (as z^-2) that the count of clipped updates takes
BITS_NOISE = 1 / 20  # standard deviation of that count's noise, as a share of the clients of a round


def norm(update: State) -> Tensor:
    """Return the L2 norm ‖Δ‖ of an update, over all its tensors together: (), in their type."""
    return torch.stack([t.square().sum() for t in update.values()]).sum().sqrt()


def factor(length: Tensor, bound: float) -> Tensor:
    """Return min(1, C/‖Δ‖): what makes a vector no longer than C."""
    return torch.where(length > bound, bound / length, 1.0)


def bits_noise(noise: float, selected: float, sensitivity: int) -> float:
    """Return the noise multiplier of the count of clipped updates, standard deviation over its sensitivity.

    The paper's standard deviation is m/20 where that takes at most a tenth of the budget; with few clients it would
    take more, and the count is noisier.

    Args:
        noise: noise multiplier z of the whole round.
        selected: planned number m of clients of a round.
        sensitivity: Δ/C of the sum of updates; that of the count is half of it, as each counts +1/2 or -1/2.
    """
    return max(BITS_NOISE * selected / (sensitivity / 2), noise / math.sqrt(BITS_SHARE))


def updates_noise(noise: float, bits: float) -> float:
    """Return the noise multiplier z_Δ of the updates beside a count with multiplier z_b: (z^-2 - z_b^-2)^(-1/2).

    Both together are as private as one sum with z (Andrew et al. 2021, arXiv:1905.03871, theorem 1, where z_b is
    2 σ_b).
    """
    return float((noise**-2 - bits**-2) ** -0.5)


def next_clip(clip: float, share: float) -> float:
    """Return C · exp(-η_C (b - γ)), with b the noised share of updates that were not clipped (section 2.2).

    A share beyond 0 or 1 is noise alone, and taken as 0 or 1, so that no round changes C by more than a factor of
    e^0.1. C stays between `LEAST_CLIP` and `MOST_CLIP`. Neither costs privacy: the share is noised already.
    """
    step = clip * math.exp(-RATE * (min(max(share, 0.0), 1.0) - QUANTILE))
    return min(max(step, LEAST_CLIP), MOST_CLIP)
