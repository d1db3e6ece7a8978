"""Gradient inversion: windows that would have led to an update, found by optimisation.

Zhu et al., Deep Leakage from Gradients, 2019 (arXiv:1906.08935): windows whose gradient is the one that was sent.
Geiping et al., Inverting Gradients, 2020 (arXiv:2003.14053): by the cosine of the gradients, with total variation (here
in time), signed steps of Adam; and proposition 3.1, that the gradients of a dense layer's weights and biases give away
its input where it was a single one.
Yin et al., See through Gradients, 2021 (arXiv:2104.07586): running statistics of batch norm, which are sent with the
weights, give away means and variances of what the layers saw.

For a single window the gradient of the head's biases is that of the logits, so that neither its label nor the loss has
to be known: a distilled student is attacked like a model trained by cross-entropy. For several windows the attacker
takes the loss for a cross-entropy and looks for labels together with windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from registry.interface import Model

Tensors = Mapping[str, Tensor]
RATE = 0.1  # of Adam, in units of scaled windows
DROPS = (3 / 8, 5 / 8, 7 / 8)  # shares of the steps after which the rate is divided by 10
SMALL = 0.1  # standard deviation of the windows to begin with
LEAST = 1e-12


@dataclass(frozen=True)
class Effort:
    """Effort that an attacker spends on an update.

    Attributes:
        steps: steps of the optimisation.
        smoothness: weight of the total variation.
        moments: weight of the statistics of batch norm.
        starts: random windows to begin with; the result with the nearest gradient is taken.
    """

    steps: int = 300
    smoothness: float = 1.0
    moments: float = 0.1
    starts: int = 1


@dataclass(frozen=True, eq=False)
class Seen:
    """Knowledge that an update gives of a network's training, by name of the network's tensors.

    Attributes:
        gradients: parameter -> gradient, up to one positive factor for all.
        statistics: running statistic of batch norm -> its value after training.
        steps: number of training steps that were made.
    """

    gradients: Tensors
    statistics: Tensors
    steps: int = 1


def invert(
    network: Model, seen: Seen, shape: tuple[int, ...], count: int, effort: Effort, rng: torch.Generator
) -> Tensor:
    """Return windows (count, channels, 1, time) whose gradient is most like the one that was seen.

    Args:
        network: the network that was trained, in the state in which it was; it is used up.
        seen: what the update tells.
        shape: (channels, 1, time) of a window.
        count: number of windows to look for.
        rng: draws the windows to begin with.
    """
    problem = _Problem(network, seen, count, effort)
    if problem.known is not None and problem.takes_windows(shape):
        return problem.known.reshape(1, *shape).cpu()
    best, nearest = torch.zeros(count, *shape), float("inf")
    for _ in range(effort.starts):
        found, distance = problem.solved(SMALL * torch.randn(count, *shape, generator=rng))
        if distance < nearest:
            best, nearest = found, distance
    return best


def dense_input(weights: Tensor, biases: Tensor) -> Tensor:
    """Return the input (inputs,) of a dense layer that saw a single one, from the gradients of its weights and biases.

    Of output i they are g_i x and g_i; x is their quotient, here by least squares over all i.

    Args:
        weights: (outputs, inputs).
        biases: (outputs,).
    """
    return biases @ weights / biases.square().sum().clamp(min=torch.finfo(biases.dtype).tiny)


class _Problem:
    """One optimisation: windows, and labels where there are several windows.

    Attributes:
        known: input of the first dense layer, where that can be told.
    """

    def __init__(self, network: Model, seen: Seen, count: int, effort: Effort) -> None:
        network.train()
        for part in network.modules():
            if isinstance(part, _DropoutNd):  # what was dropped is not known
                part.eval()
        self.network, self.count, self.effort = network, count, effort
        own = dict(network.named_parameters())
        self.wanted = {name: seen.gradients[name].detach() for name in own if name in seen.gradients}
        self.parameters = [own[name] for name in self.wanted]
        self.device = next(iter(own.values())).device
        self.residual = self.wanted.get("head.bias") if count == 1 else None  # gradient of the logits, up to a factor
        layer = _first_dense(network, self.wanted) if count == 1 else None
        self.known = dense_input(self.wanted[f"{layer}.weight"], self.wanted[f"{layer}.bias"]) if layer else None
        self.moments = _moments(network, seen)
        self.layer = layer or ""
        self.inputs: dict[str, Tensor] = {}  # of layers, in the last forward pass
        for name in filter(None, (self.layer, *self.moments)):
            network.get_submodule(name).register_forward_pre_hook(partial(self._note, name))

    def _note(self, name: str, layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        self.inputs[name] = given[0]

    def takes_windows(self, shape: tuple[int, ...]) -> bool:
        """Return whether the first dense layer's input is the window itself."""
        window = torch.rand(1, *shape).to(self.device)
        with torch.no_grad():
            self.network(window)
        return torch.equal(self.inputs[self.layer].reshape(-1), window.reshape(-1))

    def solved(self, start: Tensor) -> tuple[Tensor, float]:
        """Return the windows found from a start, and the distance of what they lead to from what was seen."""
        windows = start.to(self.device).requires_grad_()
        labels = torch.zeros(self.count, self.network.classes, device=self.device, requires_grad=True)
        unknown = [windows] if self.residual is not None else [windows, labels]
        adam = torch.optim.Adam(unknown, RATE)
        drops = torch.optim.lr_scheduler.MultiStepLR(adam, [int(share * self.effort.steps) for share in DROPS])
        distance = float("inf")
        for _ in range(self.effort.steps):
            distances = self._distance(windows, labels)
            cost = distances + self.effort.smoothness * variation(windows)
            for tensor, gradient in zip(unknown, torch.autograd.grad(cost, unknown), strict=True):
                tensor.grad = gradient.sign()
            adam.step()
            drops.step()
            distance = float(distances.detach())
        return windows.detach().cpu(), distance

    def _distance(self, windows: Tensor, labels: Tensor) -> Tensor:
        """Return one minus the cosine of the gradients; and how far inputs of layers are from what is known of them."""
        logits = self.network(windows).logits
        if self.residual is not None:
            loss = (logits * self.residual).sum()
        else:
            loss = -(labels.softmax(1) * F.log_softmax(logits, 1)).sum(1).mean()
        made = torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True)
        pairs = [(own, one) for own, one in zip(made, self.wanted.values(), strict=True) if own is not None]
        product = torch.stack([(own * one).sum() for own, one in pairs]).sum()
        norms = [torch.stack([pair[i].square().sum() for pair in pairs]).sum() for i in (0, 1)]
        distance = 1 - product / (norms[0] * norms[1]).sqrt().clamp(min=LEAST)
        if self.known is not None:
            difference = self.inputs[self.layer].reshape(-1) - self.known
            distance = distance + difference.square().sum() / self.known.square().sum().clamp(min=LEAST)
        for name, (mean, variance) in self.moments.items():
            own_variance, own_mean = torch.var_mean(self.inputs[name].transpose(0, 1).flatten(1), 1)
            far = (own_mean - mean).square() / variance.clamp(min=LEAST)
            distance = distance + self.effort.moments * (
                far.mean() + (own_variance / variance.clamp(min=LEAST) - 1).square().mean()
            )
        return distance


def _moments(network: nn.Module, seen: Seen) -> dict[str, tuple[Tensor, Tensor]]:
    """Return batch norm -> mean and variance (channels,) of what it saw in training, a mean over the steps.

    A step moves a running statistic r to (1 - m) r + m b, where b is that of the batch and m the momentum.
    """
    found = {}
    for name, part in network.named_modules():
        if not isinstance(part, _BatchNorm) or not part.momentum:
            continue
        after = [seen.statistics.get(f"{name}.{kind}") for kind in ("running_mean", "running_var")]
        left = (1 - part.momentum) ** seen.steps
        pairs = zip(after, (part.running_mean, part.running_var), strict=True)
        known = [(new - left * old) / (1 - left) for new, old in pairs if new is not None and old is not None]
        if len(known) == 2:
            found[name] = known[0], known[1].clamp(min=0)
    return found


def variation(windows: Tensor) -> Tensor:
    """Return the mean absolute difference of samples that follow each other in time, ()."""
    return windows.diff(dim=-1).abs().mean() if windows.shape[-1] > 1 else windows.new_zeros(())


def _first_dense(network: nn.Module, wanted: Tensors) -> str | None:
    """Return the name of the first dense layer whose gradients are known; None if the head is the only one."""
    for name, part in network.named_modules():
        if isinstance(part, nn.Linear) and name != "head" and {f"{name}.weight", f"{name}.bias"} <= wanted.keys():
            return str(name)
    return None


def correlations(found: Tensor, true: Tensor) -> np.ndarray:
    """Return Pearson's correlation of each window found with each true one, over all channels and samples, (n, m)."""
    rows = [windows.double().flatten(1) for windows in (found, true)]
    rows = [row - row.mean(1, keepdim=True) for row in rows]
    rows = [row / row.norm(dim=1, keepdim=True).clamp(min=LEAST) for row in rows]
    table: np.ndarray = (rows[0] @ rows[1].T).cpu().numpy()
    return table


def matched(found: Tensor, true: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return for each window found the true one that it stands for, and their correlation, (n,) each.

    Each true window is taken at most once, so that the sum of correlations is largest.
    """
    table = correlations(found, true)
    rows, columns = linear_sum_assignment(-table)
    return columns, table[rows, columns]
