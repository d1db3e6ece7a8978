"""Functions that losses of several algorithms are made of: soft predictions, distillation, directions of features."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

SHORTEST_FEATURE = 1e-6  # a feature vector shorter than this has no direction worth comparing


def soften(z: Tensor, tau: float) -> Tensor:
    """Return log p at temperature τ > 0: logits (n, classes) -> (n, classes); eq. 5-6 of FedKDX."""
    return F.log_softmax(z / tau, dim=1)


def kd(log_learner: Tensor, log_target: Tensor, tau: float) -> Tensor:
    """Return τ² KL(p_target ‖ p_learner) of softened predictions, the target fixed (Hinton et al., arXiv:1503.02531).

    Args:
        log_learner, log_target: as of `soften`, (n, classes). No gradient reaches the target.
        tau: the temperature they were softened with.

    Returns:
        (n,), one value a sample.
    """
    log_target = log_target.detach()
    return tau**2 * (log_target.exp() * (log_target - log_learner)).sum(1)  # torch.vmap has no rule for F.kl_div


def unit(h: Tensor) -> Tensor:
    """Scale the rows of (n, size) to length 1; without a direction, 0 with gradient 0, unlike in F.normalize."""
    length: Tensor = torch.linalg.vector_norm(h, dim=1, keepdim=True)
    return h / length.masked_fill(length < SHORTEST_FEATURE, torch.inf)
