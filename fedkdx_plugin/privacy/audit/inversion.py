"""Gradient inversion: windows that would have led to an update, found by optimisation.

Zhu et al., Deep Leakage from Gradients, 2019 (arXiv:1906.08935): windows whose gradient is the one that was sent.
Geiping et al., Inverting Gradients, 2020 (arXiv:2003.14053): by the cosine of the gradients, with total variation (here
in time), signed steps of Adam; and proposition 3.1, that the gradients of a dense layer's weights and biases give away
its input where it was a single one.

For a single window the gradient of the head's biases is that of the logits, so that neither its label nor the loss has
to be known: a distilled student is attacked like a model trained by cross-entropy. For several windows the attacker
takes the loss for a cross-entropy and looks for labels together with windows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional as F

Gradients = Mapping[str, Tensor]
RATE = 0.1  # of Adam, in units of scaled windows
DROPS = ((3 / 8, 0.1), (5 / 8, 0.1), (7 / 8, 0.1))  # after these shares of the steps, the rate is multiplied
LEAST = 1e-12


@dataclass(frozen=True)
class Effort:
    """What an attacker spends on an update.

    Attributes:
        steps: steps of the optimisation.
        smoothness: weight of the total variation.
        starts: random windows to begin with; the result with the nearest gradient is taken.
    """

    steps: int = 300
    smoothness: float = 0.1
    starts: int = 1


def invert(
    network: nn.Module, gradients: Gradients, shape: tuple[int, ...], count: int, effort: Effort, rng: torch.Generator
) -> Tensor:
    """Return windows (count, channels, 1, time) whose gradient is most like `gradients`.

    Args:
        network: the network that was trained, in the state in which it was; its dropout is switched off.
        gradients: parameter -> gradient, up to one positive factor for all.
        shape: (channels, 1, time) of a window.
        count: number of windows to look for.
        rng: draws the windows to begin with.
    """
    network.train()
    for part in network.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.eval()
    wanted = {name: gradients[name].detach() for name, _ in network.named_parameters() if name in gradients}
    layer = _first_dense(network, wanted) if count == 1 else None
    known = dense_input(wanted[f"{layer}.weight"], wanted[f"{layer}.bias"]) if layer else None
    if layer and known is not None and _takes_windows(network, layer, shape):
        return known.reshape(1, *shape)
    best, nearest = torch.zeros(count, *shape), float("inf")
    for _ in range(effort.starts):
        problem = _Problem(network, wanted, count, effort, layer, known)
        found, distance = problem.solved(torch.randn(count, *shape, generator=rng))
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
    """One optimisation: windows, and labels where there are several windows."""

    def __init__(
        self, network: nn.Module, wanted: Gradients, count: int, effort: Effort, layer: str | None, known: Tensor | None
    ) -> None:
        self.network, self.wanted, self.count, self.effort = network, wanted, count, effort
        self.layer, self.known = layer, known
        self.parameters = [dict(network.named_parameters())[name] for name in wanted]
        self.residual = wanted.get("head.bias") if count == 1 else None  # gradient of the logits, up to a factor

    def solved(self, start: Tensor) -> tuple[Tensor, float]:
        """Return the windows found from a start, and the distance of their gradients from those wanted."""
        device = self.parameters[0].device
        windows = start.to(device).requires_grad_()
        labels = torch.zeros(self.count, self.network.classes, device=device, requires_grad=True)  # type: ignore[arg-type]
        unknown = [windows] if self.residual is not None else [windows, labels]
        adam = torch.optim.Adam(unknown, RATE)
        drops = torch.optim.lr_scheduler.MultiStepLR(adam, [int(share * self.effort.steps) for share, _ in DROPS])
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
        """Return one minus the cosine of the gradients; and how far the dense layer's input is from what is known."""
        inputs: list[Tensor] = []
        handle = None
        if self.layer:
            module = self.network.get_submodule(self.layer)
            handle = module.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        logits = self.network(windows).logits
        if handle:
            handle.remove()
        if self.residual is not None:
            loss = (logits * self.residual).sum()
        else:
            loss = -(labels.softmax(1) * F.log_softmax(logits, 1)).sum(1).mean()
        made = torch.autograd.grad(loss, self.parameters, create_graph=True, allow_unused=True)
        pairs = [(own, one) for own, one in zip(made, self.wanted.values(), strict=True) if own is not None]
        product = sum(((own * one).sum() for own, one in pairs), windows.new_zeros(()))
        norms = [sum((t[i].square().sum() for t in pairs), windows.new_zeros(())) for i in (0, 1)]
        distance = 1 - product / (norms[0] * norms[1]).sqrt().clamp(min=LEAST)
        if inputs and self.known is not None:
            difference = inputs[0].reshape(-1) - self.known
            distance = distance + difference.square().sum() / self.known.square().sum().clamp(min=LEAST)
        return distance


def variation(windows: Tensor) -> Tensor:
    """Return the mean absolute difference of samples that follow each other in time, ()."""
    return windows.diff(dim=-1).abs().mean() if windows.shape[-1] > 1 else windows.new_zeros(())


def _first_dense(network: nn.Module, wanted: Gradients) -> str | None:
    """Return the name of the first dense layer whose gradients are known; None if the head is the only one."""
    for name, part in network.named_modules():
        if isinstance(part, nn.Linear) and name != "head" and {f"{name}.weight", f"{name}.bias"} <= wanted.keys():
            return name
    return None


def _takes_windows(network: nn.Module, layer: str, shape: tuple[int, ...]) -> bool:
    """Return whether a dense layer's input is the window itself."""
    window, inputs = torch.rand(1, *shape), list[Tensor]()
    handle = network.get_submodule(layer).register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        network(window.to(next(network.parameters()).device))
    handle.remove()
    return len(inputs) == 1 and torch.equal(inputs[0].reshape(-1).cpu(), window.reshape(-1))


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
