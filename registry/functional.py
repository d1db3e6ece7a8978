"""Functions that losses of several algorithms are made of: soft predictions, distillation, features, parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
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


def beside(
    net: Callable[..., Any], tensors: Mapping[str, Tensor], prefix: str = "model."
) -> list[tuple[Tensor, Tensor]]:
    """Return each parameter of a network with the tensor of its name; parameters without one are left out.

    Args:
        net: the network, as `losses` receives it.
        tensors: prefix and name -> tensor of the parameter's shape.
        prefix: what stands before a parameter's name, by default that of its full name in `model`.
    """
    assert isinstance(net, nn.Module)  # `losses` receives it as something to call
    return [(w, tensors[prefix + name]) for name, w in net.named_parameters() if prefix + name in tensors]


def squared_distance(pairs: Sequence[tuple[Tensor, Tensor]], like: Tensor) -> Tensor:
    """Return Σ ‖w − v‖² over pairs of tensors, (); 0 on the device of `like` without any."""
    total = torch.zeros((), device=like.device)
    for one, other in pairs:
        total = total + (one - other).square().sum()
    return total


def inner_product(pairs: Sequence[tuple[Tensor, Tensor]], like: Tensor) -> Tensor:
    """Return Σ ⟨w, v⟩ over pairs of tensors, (), whose gradient by w is v; 0 on the device of `like` without any."""
    total = torch.zeros((), device=like.device)
    for one, other in pairs:
        total = total + (one * other).sum()
    return total
