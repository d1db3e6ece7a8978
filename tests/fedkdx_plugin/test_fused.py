"""The compiled operations against PyTorch's in float64, when they are used, and what happens without a compiler."""

from __future__ import annotations

import copy
import os
import platform
import subprocess
import sys
from unittest import mock

import pytest
import torch
from torch import nn

from fedkdx_plugin.algorithm.client import FedKDXClient, FedKDXParams
from fedkdx_plugin.engine.training import mover
from fedkdx_plugin.fused import layers, native
from fedkdx_plugin.fused.layers import Block, fuse
from fedkdx_plugin.fused.sgd import ClipAndMove
from fedkdx_plugin.models.cnn import CNN, CNNSmall, conv_block
from registry import catalog
from registry.interface import Batch, Output, Task
from tests.conftest import CLASSES, SHAPE, make_federation, same_state

compiled = pytest.mark.skipif(native.operations() is None, reason="no C compiler here")


X86 = {"x86_64", "AMD64"}
PROCESSORS = {  # options for vectors of other sizes than this processor's, which runs them as well
    "as it is": None,
    "8 floats": ["-mavx2", "-mfma", "-mno-avx512f"],
    "4 floats": [],
}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=PROCESSORS)
def processor(request, tmp_path_factory):
    """The library for each size of vectors, in place."""
    options = PROCESSORS[request.param]
    if options is None:
        yield
        return
    if platform.machine() not in X86:
        pytest.skip("other vectors are those of another family")
    path = tmp_path_factory.mktemp("library") / "fused.so"
    native.make(os.environ.get("CC", "cc"), path, [options])
    found = native.opened(path)
    with mock.patch.object(native, "operations", lambda: found):
        yield


def blocks(inputs: int, filters: int, padding: int = 0) -> tuple[nn.Sequential, Block]:
    """The same block in float64 by PyTorch, and fused in float32; batch norm not as it begins."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        reference = conv_block(inputs, filters, padding)
        norm = reference[1]
        for tensor, (low, high) in {norm.weight: (-2, 2), norm.bias: (-1, 1), norm.running_mean: (-1, 1)}.items():
            nn.init.uniform_(tensor, low, high)
    ours = conv_block(inputs, filters, padding)
    ours.load_state_dict(reference.state_dict())
    nets = {"model": nn.Sequential(ours)}
    fuse(nets)
    assert type(nets["model"][0]) is Block
    return reference.double(), nets["model"][0]


def passed_through(block: nn.Sequential, rows: int, time: int, by_x: bool) -> list[torch.Tensor]:
    """Value, gradients and statistics on the same windows whatever the precision, as float64."""
    weight = block[0].weight
    x = 5 + 3 * torch.randn(rows, weight.shape[1], 1, time, generator=torch.Generator().manual_seed(1))
    x = x.to(weight.dtype).requires_grad_(by_x)
    out = block(x)
    assert ("ConvolutionBlock" in str(out.grad_fn)) == isinstance(block, Block)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype))
    found = [out.detach(), *([x.grad] if by_x else []), *(p.grad for p in block.parameters()), *block.buffers()]
    return [tensor.double() for tensor in found]


def check_block(reference: nn.Sequential, ours: Block, rows: int, time: int, by_x: bool = True) -> None:
    """As float64, to 1e-4; where few values make batch norm shaky, not much further off than PyTorch in float32."""
    single = copy.deepcopy(reference).float()
    results = [passed_through(block, rows, time, by_x) for block in (reference, ours, single)]
    for expected, found, pytorchs in zip(*results, strict=True):
        allowed = max(1e-4 * (1 + expected.abs().max()), 4 * (pytorchs - expected).abs().max())
        assert (found - expected).abs().max() <= allowed


@compiled
@pytest.mark.parametrize("rows", [1, 2, 33])
@pytest.mark.parametrize("time", [10, 11, 52])  # 2, 3 and 44 after the convolution: one pair, an odd one, many
@pytest.mark.parametrize(("inputs", "filters"), [(16, 16), (32, 32), (48, 64), (16, 112)])
def test_a_block_gives_pytorchs_values_gradients_and_statistics(rows, time, inputs, filters, processor):
    check_block(*blocks(inputs, filters), rows, time)


@compiled
@pytest.mark.parametrize("inputs", [1, 3, 9])
def test_so_does_a_first_block_which_need_not_know_the_gradient_by_its_windows(inputs, processor):
    check_block(*blocks(inputs, 32), rows=5, time=100, by_x=False)


@compiled
@pytest.mark.parametrize(("threads", "inputs", "padding"), [(2, 16, 0), (1, 3, 0), (1, 16, 4)])
def test_so_does_a_block_whose_convolution_is_pytorchs(threads, inputs, padding, monkeypatch):
    torch.set_num_threads(threads)
    monkeypatch.setattr(layers, "_convolve", None)
    check_block(*blocks(inputs, 32, padding), rows=5, time=40)


@compiled
def test_a_gradient_goes_to_the_first_of_equal_neighbours_and_to_none_below_zero():
    """A filter that copies its input."""
    _, ours = blocks(16, 16)
    convolution, norm, *_ = ours
    with torch.no_grad():
        norm.weight.fill_(1), norm.bias.fill_(0)
        convolution.bias.fill_(0), convolution.weight.fill_(0)
        convolution.weight[range(16), range(16), 0, 4] = 1
    values = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0, -2.0])
    x = torch.zeros(1, 16, 1, 14)
    x[:, :, :, 4:10] = values
    x, theirs = x.requires_grad_(), values.view(1, 1, 1, 6).clone().requires_grad_()
    arrives = torch.tensor([1.0, 10.0, 100.0]).view(1, 1, 1, 3)
    ours(x).backward(arrives.expand(1, 16, 1, 3))
    nn.MaxPool2d((1, 2))(nn.ReLU()(nn.BatchNorm2d(1)(theirs))).backward(arrives)
    for channel in range(16):
        torch.testing.assert_close(x.grad[:, channel : channel + 1, :, 4:10], theirs.grad)


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
    _, ours = blocks(1, 16)
    x = torch.zeros(2, 1, 1, 20)
    x[0, 0, 0, 3] = torch.nan
    assert ours(x).isnan().any()


@compiled
def test_where_it_does_not_fit_pytorchs_operations_are_used():
    reference, ours = blocks(3, 16)
    x = torch.randn(4, 3, 1, 30)
    torch.testing.assert_close(ours.eval()(x).double(), reference.eval()(x.double()), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.double().train()(x.double()), reference.train()(x.double()))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        blocks(3, 16)[1](torch.randn(1, 3, 1, 9))


def a_block(convolution=None, norm=None, activation=None, pool=None) -> nn.Sequential:
    """One that would be fused, but for the layers that are given."""
    parts = (convolution, nn.Conv2d(1, 16, (1, 3))), (norm, nn.BatchNorm2d(16)), (activation, nn.ReLU())
    return nn.Sequential(*(given or usual for given, usual in (*parts, (pool, nn.MaxPool2d((1, 2))))))


def test_only_such_sequences_are_fused():
    others = [
        a_block()[:3],
        a_block(pool=nn.MaxPool2d((1, 3))),
        a_block(pool=nn.MaxPool2d(2)),
        a_block(norm=nn.BatchNorm2d(16, affine=False)),
        a_block(norm=nn.BatchNorm2d(16, momentum=None)),
        a_block(activation=nn.ELU()),
        a_block(convolution=nn.Conv2d(1, 20, (1, 3)), norm=nn.BatchNorm2d(20)),
        a_block(convolution=nn.Conv2d(1, 16, (2, 3))),
        a_block(convolution=nn.Conv2d(16, 16, (1, 3), groups=16)),
        a_block(convolution=nn.Conv2d(1, 16, (1, 3), stride=(1, 2))),
        a_block(convolution=nn.Conv2d(1, 16, (1, 3), dilation=2)),
        a_block(convolution=nn.Conv2d(1, 16, (1, 3), padding="same")),
        a_block(convolution=nn.Conv2d(1, 16, (1, 3), padding=(0, 1), padding_mode="circular")),
        a_block(convolution=nn.Conv2d(1, 16, (1, 3), padding=1)),
        a_block(convolution=nn.Conv2d(1, 16, (1, 3), bias=False)),
    ]
    watched = a_block()
    watched[2].register_forward_hook(lambda *_: None)
    usual = a_block()
    fuse(dict(enumerate(map(nn.Sequential, [*others, watched, usual]))))
    assert not any(isinstance(net, Block) for net in (*others, watched))
    assert isinstance(usual, Block) == (native.operations() is not None)


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
    for one, other in zip(
        losses_and_gradients(pair, y, **params), losses_and_gradients(doubled(pair), y, **params), strict=True
    ):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)


@compiled
def test_certain_predictions_and_features_without_direction_stay_finite():
    pair, y = outputs(8, 5, 16, spread=300.0)
    pair[0].features[3], pair[1].features[4] = 0, 1e-9
    found, expected = losses_and_gradients(pair, y), losses_and_gradients(doubled(pair), y)
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@compiled
@pytest.mark.parametrize("part", ["features", "logits"])
def test_losses_of_what_is_not_a_number_are_none(part):
    pair, y = outputs(4, 3, 8)
    getattr(pair[1], part)[2, 1] = torch.nan
    assert losses_and_gradients(pair, y)[0].isnan()


@compiled
@pytest.mark.parametrize("model", ["cnn", "cnn_small", "cnn_lstm"])
def test_a_round_is_the_same_to_float_tolerance_with_and_without(model, monkeypatch):
    network = catalog.load("models", model)
    task = Task(SHAPE, CLASSES, network, network)
    algorithm = catalog.load("algorithms", "FedKDX")
    ours = make_federation(algorithm, task=task, rounds=1)
    ours.run()
    monkeypatch.setattr(native, "operations", lambda: None)
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
    if has_one and native.operations() is None:
        pytest.skip("no C compiler here")
    (tmp_path / "file").write_text("")
    for cache in (tmp_path / "cache", tmp_path / "file"):
        code = "from fedkdx_plugin.fused.native import operations; print(operations() is not None)"
        environment = os.environ | {"XDG_CACHE_HOME": str(cache), "TMPDIR": str(tmp_path)} | change
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
        assert (run.stdout.strip(), run.stderr) == (str(has_one), "")
    kept = list(tmp_path.glob("cache/fedkdx/*"))
    assert [path.suffix for path in kept] == ([".so"] if has_one else [])
