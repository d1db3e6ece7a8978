"""The compiled operations against PyTorch's in float64, when they are used, and what happens without a compiler."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from fedkdx_plugin.engine import fused
from fedkdx_plugin.engine.fused import Block, ClipAndMove, NormReluPool, fuse
from fedkdx_plugin.engine.training import mover
from fedkdx_plugin.models.cnn import CNN, CNNSmall, conv_block
from registry import catalog
from registry.interface import Task
from tests.conftest import CLASSES, SHAPE, make_federation, same_state

compiled = pytest.mark.skipif(fused.operations() is None, reason="no C compiler here")


def blocks(inputs: int, filters: int, seed: int = 0) -> tuple[nn.Sequential, Block]:
    """The same block in float64 by PyTorch, and fused in float32; batch norm not as it begins."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        reference = conv_block(inputs, filters, 0)
        norm = reference[1]
        for tensor, (low, high) in {norm.weight: (-2, 2), norm.bias: (-1, 1), norm.running_mean: (-1, 1)}.items():
            nn.init.uniform_(tensor, low, high)
    ours = conv_block(inputs, filters, 0)
    ours.load_state_dict(reference.state_dict())
    nets = {"model": nn.Sequential(ours)}
    fuse(nets)
    assert type(nets["model"][0]) is Block
    return reference.double(), nets["model"][0]


@compiled
@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("time", [10, 11, 52])  # 2, 3 and 44 after the convolution: one pair, an odd one, many
@pytest.mark.parametrize("filters", [1, 5, 32])
def test_a_block_gives_pytorchs_values_gradients_and_statistics(rows, time, filters):
    reference, ours = blocks(3, filters)
    x = 5 + 3 * torch.randn(rows, 3, 1, time, generator=torch.Generator().manual_seed(1))
    theirs, mine = x.double().requires_grad_(), x.clone().requires_grad_()
    expected, found = reference(theirs), ours(mine)
    assert "NormReluPool" in type(found.grad_fn).__name__
    arrives = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    expected.backward(arrives.double())
    found.backward(arrives)
    pairs = [(found, expected), (mine.grad, theirs.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(ours.parameters(), reference.parameters(), strict=True)]
    pairs += [(p, q) for p, q in zip(ours.buffers(), reference.buffers(), strict=True)]
    for one, other in pairs:
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-4, atol=1e-4 * (1 + other.abs().max().item()))


@compiled
def test_a_gradient_goes_to_the_first_of_equal_neighbours_and_to_none_below_zero():
    norm = nn.BatchNorm2d(1)
    x = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0, -2.0]).view(1, 1, 1, 6).requires_grad_()
    theirs = x.detach().clone().requires_grad_()
    arrives = torch.tensor([1.0, 10.0, 100.0]).view(1, 1, 1, 3)
    NormReluPool.apply(x, norm, norm.weight, norm.bias).backward(arrives)
    nn.MaxPool2d((1, 2))(nn.ReLU()(nn.BatchNorm2d(1)(theirs))).backward(arrives)
    torch.testing.assert_close(x.grad, theirs.grad)


@compiled
def test_layouts_in_memory_do_not_matter():
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        _, ours = blocks(3, 32)
        ours.to(memory_format=layout)
        x = torch.randn(8, 3, 1, 40, generator=torch.Generator().manual_seed(1)).to(memory_format=layout)
        ours(x).flatten(1).square().sum().backward()
        results.append([p.grad for p in ours.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@compiled
def test_not_a_number_is_passed_on():
    _, ours = blocks(1, 2)
    x = torch.zeros(2, 1, 1, 20)
    x[0, 0, 0, 3] = torch.nan
    assert ours(x).isnan().any()


@compiled
def test_where_it_does_not_fit_pytorchs_operations_are_used():
    reference, ours = blocks(3, 4)
    x = torch.randn(4, 3, 1, 30)
    torch.testing.assert_close(ours.eval()(x).double(), reference.eval()(x.double()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.double().train()(x.double()), reference.train()(x.double()))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        blocks(3, 4)[1](torch.randn(1, 3, 1, 9))


def test_only_such_sequences_are_fused():
    others = [
        nn.Sequential(nn.Conv2d(1, 2, (1, 3)), nn.BatchNorm2d(2), nn.ReLU()),
        nn.Sequential(nn.Conv2d(1, 2, (1, 3)), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d((1, 3))),
        nn.Sequential(nn.Conv2d(1, 2, (1, 3)), nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(1, 2, (1, 3)), nn.BatchNorm2d(2, affine=False), nn.ReLU(), nn.MaxPool2d((1, 2))),
        nn.Sequential(nn.Conv2d(1, 2, (1, 3)), nn.BatchNorm2d(2), nn.ELU(), nn.MaxPool2d((1, 2))),
    ]
    watched = conv_block(1, 2, 0)
    watched[2].register_forward_hook(lambda *_: None)
    fuse(dict(enumerate(map(nn.Sequential, [*others, watched]))))
    assert not any(isinstance(net, Block) for net in (*others, watched))


@compiled
@pytest.mark.parametrize("model", [CNN, CNNSmall])
@pytest.mark.parametrize("bound", [0.0, 1e-2, 1e6])
def test_clipping_and_moving_is_pytorchs(model, bound):
    nets = [model((3, 1, 40), 4).to(memory_format=torch.channels_last) for _ in range(2)]
    for seed, net in enumerate(nets):
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed))
        nets[1].head.bias.grad = None  # felt by no loss
    expected = []
    for net in nets:
        gradients = {n: p.grad.double() for n, p in net.named_parameters() if p.grad is not None}
        norm = sum(g.square().sum() for g in gradients.values()).sqrt()
        factor = min(1.0, bound / (norm.item() + 1e-6)) if bound else 1.0
        expected.append(
            {n: p.double() - 0.3 * factor * gradients[n] if n in gradients else p for n, p in net.named_parameters()}
        )
    move = mover([list(net.parameters()) for net in nets], 0.3, bound)
    assert isinstance(move, ClipAndMove)
    move()
    for net, values in zip(nets, expected, strict=True):
        for name, parameter in net.named_parameters():
            torch.testing.assert_close(parameter.double(), values[name].double(), rtol=1e-5, atol=1e-6)
            assert parameter.grad is None


def test_parameters_of_another_kind_are_pytorchs_to_move():
    assert not isinstance(mover([list(nn.Linear(2, 2).double().parameters())], 0.1, 1.0), ClipAndMove)
    parameter = nn.Parameter(torch.zeros(4, 4)[:, :2])  # part of a larger tensor
    move = mover([[parameter]], 0.5, 10.0)
    assert not isinstance(move, ClipAndMove)
    parameter.grad = torch.ones(4, 2)
    move()
    assert torch.equal(parameter.data, torch.full((4, 2), -0.5)) and parameter.grad is None


@compiled
@pytest.mark.parametrize("model", ["cnn", "cnn_small", "cnn_lstm"])
def test_a_round_is_the_same_to_float_tolerance_with_and_without(model, monkeypatch):
    network = catalog.load("models", model)
    task = Task(SHAPE, CLASSES, network, network)
    algorithm = catalog.load("algorithms", "FedKDX")
    ours = make_federation(algorithm, task=task, rounds=1)
    ours.run()
    monkeypatch.setattr(fused, "operations", lambda: None)
    theirs = make_federation(algorithm, task=task, rounds=1)
    assert not any(isinstance(part, Block) for net in theirs.workspace.nets.values() for part in net.modules())
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
    if has_one and fused.operations() is None:
        pytest.skip("no C compiler here")
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "cache", tmp_path / "file"):
        code = "from fedkdx_plugin.engine.fused import operations; print(operations() is not None)"
        environment = os.environ | {"XDG_CACHE_HOME": str(cache), "TMPDIR": str(tmp_path)} | change
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert (run.stdout.strip(), run.stderr) == (str(has_one), "")
    kept = list(tmp_path.glob("cache/fedkdx/*"))
    assert [path.suffix for path in kept] == ([".so"] if has_one else [])
