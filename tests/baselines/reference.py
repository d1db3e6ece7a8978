"""Plain training steps on all of a client's windows, by which tests work out what a federation must come to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from baselines.fedavg import FedAvg
from fedkdx_plugin.engine.data import DeviceData
from fedkdx_plugin.engine.rounds import Federation
from tests.conftest import CLASSES, SHAPE, TinyNet, make_data, make_federation

State = dict[str, Tensor]

RATE, STEPS = 0.05, 3


def slopes(state: State, x: Tensor, y: Tensor) -> tuple[State, State]:
    """Return the gradient of the cross-entropy of a TinyNet, and its running statistics after that batch."""
    net = TinyNet(SHAPE, CLASSES).to(x.dtype)
    net.load_state_dict({name: state["model." + name].clone() for name, _ in named(net)}, strict=False)
    net.train()
    F.cross_entropy(net(x).logits, y).backward()
    gradient = {"model." + name: w.grad for name, w in net.named_parameters()}
    return gradient, {"model." + name: own for name, own in net.named_buffers() if own.is_floating_point()}


def named(net: TinyNet) -> list[tuple[str, Tensor]]:
    return [(name, own) for name, own in net.state_dict().items() if own.is_floating_point()]


def descend(state: State, x: Tensor, y: Tensor, move: Callable[[str, Tensor, Tensor], Tensor], steps=STEPS) -> State:
    """Take steps from a state, w ← move(name, w, gradient)."""
    for _ in range(steps):
        gradient, statistics = slopes(state, x, y)
        state = {name: move(name, state[name], own) for name, own in gradient.items()} | statistics
    return state


def is_parameter(name: str) -> bool:
    return "running" not in name


def full_batch(algorithm: type[FedAvg], data: DeviceData | None = None, **options: Any) -> Federation:
    """Return a federation that takes STEPS steps a round on all windows of each client, without clipping and decay."""
    options = {"join_ratio": 1.0, "rounds": 3} | options
    plain = {"batch_size": 100, "local_epochs": STEPS, "learning_rate": RATE, "clip_norm": 0.0, "decay": 1.0}
    return make_federation(algorithm, data or make_data((20, 30, 10)), backend="sequential", **{**plain, **options})


def mean(states: list[State], samples: list[int]) -> State:
    """Return the mean weighted by samples."""
    return {name: sum(n * s[name] for n, s in zip(samples, states, strict=True)) / sum(samples) for name in states[0]}


def assert_same(found: State, expected: State, tolerance: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance, msg=name)


def neighbours(h, keys, labels, without=None):
    """Compute kNN-Per's class shares of the nearest ten keys, key by key; h (d,), keys (n, d), labels (n, classes)."""
    distance = [(np.linalg.norm(h - key), i) for i, key in enumerate(keys) if i != without]
    near = sorted(distance)[:10]
    p = np.zeros(labels.shape[1])
    for d, i in near:
        p += np.exp(-d) * labels[i]
    return p / sum(np.exp(-d) for d, _ in near)
