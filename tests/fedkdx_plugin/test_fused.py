"""Compiled losses, clipping and SGD against float64, and what happens without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedkdx_plugin.algorithm.fedkdx import FedKDXClient, FedKDXParams
from fedkdx_plugin.engine.steps import mover
from fedkdx_plugin.models.cnn import CNN, CNNSmall
from fedkdx_plugin.native import library
from fedkdx_plugin.native.sgd import ClipAndMove
from registry import catalog
from registry.functional import SHORTEST_FEATURE
from registry.interface import Batch, Output, Task
from tests.bounds import assert_within, gamma, largest_of_draws, random_errors
from tests.conftest import CLASSES, SHAPE, make_federation, same_state

compiled = pytest.mark.skipif(library.operations() is None, reason="no C compiler here")


@compiled
@pytest.mark.parametrize("model", [CNN, CNNSmall])
@pytest.mark.parametrize("bound", [0.0, 1e-2, 1e6])
def test_clipping_and_moving_is_pytorchs(model, bound):
    nets = [model((3, 1, 40), 4).to(memory_format=torch.channels_last) for _ in range(2)]
    for seed, net in enumerate(nets):
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        nets[1].head.bias.grad = None  # felt by no loss
    expected, allowed = [], []
    for net in nets:
        gradients = {n: p.grad.double() for n, p in net.named_parameters() if p.grad is not None}
        norm = sum(g.square().sum() for g in gradients.values()).sqrt()
        factor = min(1.0, bound / (norm.item() + 1e-6)) if bound else 1.0
        steps = {n: 0.3 * factor * g for n, g in gradients.items()}
        expected.append({n: p.double() - steps.get(n, 0) for n, p in net.named_parameters()})
        # a step is rounded, and its factor, whose norm is a root of sums of 64 squares; so is where it leads
        allowed.append({n: gamma(64 + 6) * abs(steps.get(n, 0)) + gamma(1) * abs(p) for n, p in expected[-1].items()})
    move = mover([list(net.parameters()) for net in nets], 0.3, bound)
    assert isinstance(move, ClipAndMove)
    move()
    for net, values, most in zip(nets, expected, allowed, strict=True):
        for name, parameter in net.named_parameters():
            assert_within(parameter, values[name], most[name])
            assert parameter.grad is None


def test_parameters_of_another_kind_are_pytorchs_to_move():
    assert not isinstance(mover([list(nn.Linear(2, 2).double().parameters())], 0.1, 1.0), ClipAndMove)
    parameter = nn.Parameter(torch.zeros(4, 4)[:, :2])  # part of a larger tensor
    move = mover([[parameter]], 0.5, 10.0)
    assert not isinstance(move, ClipAndMove)
    parameter.grad = torch.ones(4, 2)
    move()
    assert torch.equal(parameter.data, torch.full((4, 2), -0.5)) and parameter.grad is None


TAU, GAMMA = 0.8, 0.9


def outputs(rows: int, classes: int, size: int, spread: float = 1.0) -> tuple[list[Output], torch.Tensor]:
    """Teacher's and student's in float32, and true classes."""
    with torch.random.fork_rng():
        torch.manual_seed(rows)
        pair = [Output(torch.randn(rows, size).relu(), spread * torch.randn(rows, classes)) for _ in range(2)]
        return pair, torch.randint(classes, (rows,))


def losses_and_gradients(pair: list[Output], y: torch.Tensor, **params: object) -> list[torch.Tensor]:
    """Of FedKDX's client, in the precision that the outputs have."""
    teacher, student = ([part.clone().requires_grad_() for part in output] for output in pair)
    client = object.__new__(FedKDXClient)
    client.params = FedKDXParams(tau=TAU, gamma=GAMMA, **params)
    nets = {"teacher": lambda x: Output(*teacher), "student": lambda x: Output(*student)}
    losses = client.losses(nets, Batch(torch.empty(len(y)), y), {})
    torch.stack([2.0 * losses["teacher"], 3.0 * losses["student"]]).sum().backward()
    assert ("Mutual" in str(losses["teacher"].grad_fn)) == (pair[0].logits.dtype == torch.float32)
    leaves = (*teacher, *student)
    return [*losses.values(), *(torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves)]


def contrast(pair: list[Output], tau: float, rng: torch.Generator | None) -> list[torch.Tensor]:
    """Return the contrastive loss in float64 and its gradients by both features, with random errors in each step."""
    off = random_errors(rng)
    features = [output.features.double().requires_grad_() for output in pair]
    (rows, size), unit = features[0].shape, []
    for h in features:
        square = off(off(h).square().sum(1, keepdim=True), size)
        inverse = torch.where(square < SHORTEST_FEATURE**2, 0, square.clamp(min=SHORTEST_FEATURE**2).rsqrt())
        unit.append(off(off(h, 1, size) * off(inverse, 1, size)))
    cosine = off(off(unit[0], size, rows) @ off(unit[1], size, rows).T, size)
    loss = F.cross_entropy(off(cosine / tau), torch.arange(rows))
    loss.backward()
    return [loss.detach(), *(h.grad for h in features)]


def allowances(pair: list[Output], exact: list[torch.Tensor], **params: object) -> list[torch.Tensor | float]:
    """How far each of `losses_and_gradients` may be off: what is made of logits is made in float64, and rounded."""
    p = FedKDXParams(tau=TAU, gamma=GAMMA, **params)
    weight, tau = p.ctl_weight if "ctl" in p.use else 0.0, p.tau_ctl or p.tau
    term = contrast(pair, tau, None)
    torch.testing.assert_close(exact[2], 2 * weight * term[1], rtol=1e-9, atol=1e-9)  # it is the very one
    of_loss, *by_features = largest_of_draws(term, lambda rng: contrast(pair, tau, rng))
    values = [gamma(4) * loss.abs() + weight * of_loss for loss in exact[:2]]
    by_logits = [gamma(4) * gradient.abs() + 1e-12 for gradient in (exact[3], exact[5])]
    return [*values, 2 * weight * by_features[0], by_logits[0], 3 * weight * by_features[1], by_logits[1]]


def doubled(pair: list[Output]) -> list[Output]:
    return [Output(*(part.double() for part in output)) for output in pair]


@compiled
@pytest.mark.parametrize(("rows", "classes", "size"), [(1, 2, 3), (2, 12, 64), (32, 6, 128), (33, 40, 130)])
@pytest.mark.parametrize(
    "params",
    [{}, {"use": ("kd",)}, {"use": ("nkd",), "nkd_weight": 0.3}, {"ctl_weight": 2.0, "tau_ctl": 0.1}],
)
def test_fedkdxs_losses_and_gradients_are_those_of_float64(rows, classes, size, params):
    """Without the contrastive term both are what the two sides minimise, each by itself."""
    pair, y = outputs(rows, classes, size)
    found, exact = (losses_and_gradients(outputs, y, **params) for outputs in (pair, doubled(pair)))
    for one, other, allowed in zip(found, exact, allowances(pair, exact, **params), strict=True):
        assert_within(one, other, allowed)


@compiled
def test_certain_predictions_and_features_without_direction_stay_finite():
    pair, y = outputs(8, 5, 16, spread=300.0)
    pair[0].features[3], pair[1].features[4] = 0, 1e-9
    found, exact = (losses_and_gradients(outputs, y) for outputs in (pair, doubled(pair)))
    for one, other, allowed in zip(found, exact, allowances(pair, exact), strict=True):
        assert one.isfinite().all()
        assert_within(one, other, allowed)


@compiled
@pytest.mark.parametrize("part", ["features", "logits"])
def test_losses_of_what_is_not_a_number_are_none(part):
    pair, y = outputs(4, 3, 8)
    getattr(pair[1], part)[2, 1] = torch.nan
    assert losses_and_gradients(pair, y)[0].isnan()


@compiled
@pytest.mark.parametrize("model", ["cnn", "cnn_small", "cnn_lstm"])
def test_a_round_is_the_same_to_float_tolerance_with_and_without(model, monkeypatch):
    """Rounding comes to 1e-7 here; what ReLU or pooling lets through in one and not in the other, to 4e-5."""
    network = catalog.load("models", model)
    task = Task(SHAPE, CLASSES, network, network)
    algorithm = catalog.load("algorithms", "FedKDX")
    ours = make_federation(algorithm, task=task, rounds=1, local_epochs=1)
    ours.run()
    monkeypatch.setattr(library, "operations", lambda: None)
    theirs = make_federation(algorithm, task=task, rounds=1, local_epochs=1)
    assert not any("forward" in vars(part) for net in theirs.workspace.nets.values() for part in net.modules())
    theirs.run()
    assert not same_state(ours.save().tensors, theirs.save().tensors)
    for one, other in zip(ours.workspace.kept, theirs.workspace.kept, strict=True):
        for name, tensor in one.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "has_one"),
    [({"CC": "/nowhere/cc"}, False), ({"CC": "false"}, False), ({"FEDKDX_FUSED": "0"}, False), ({}, True)],
)
def test_without_a_compiler_nothing_is_lost(change, has_one, tmp_path):
    """In a process of its own, with an empty cache; then once more with a cache that cannot be made."""
    if has_one and library.operations() is None:
        pytest.skip("no C compiler here")
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "cache", tmp_path / "file"):
        code = "from fedkdx_plugin.native.library import operations; print(operations() is not None)"
        environment = os.environ | {"XDG_CACHE_HOME": str(cache), "TMPDIR": str(tmp_path)} | change
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert (run.stdout.strip(), run.stderr) == (str(has_one), "")
    kept = list(tmp_path.glob("cache/fedkdx/*"))
    assert [path.suffix for path in kept] == ([".so"] if has_one else [])
