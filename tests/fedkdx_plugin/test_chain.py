"""Chains of layers against float64, and when they are used."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import nn

from fedkdx_plugin.models.cnn import CNN, CNNSmall
from fedkdx_plugin.native import library
from fedkdx_plugin.native.chain import Chain
from fedkdx_plugin.native.fuse import fuse
from tests.bounds import allowances, assert_within, gamma, is_clear

compiled = pytest.mark.skipif(library.operations() is None, reason="no C compiler here")


def block(inputs: int, filters: int, taps: int = 9) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, filters, (1, taps)), nn.BatchNorm2d(filters), nn.ReLU(), nn.MaxPool2d((1, 2))
    )


def dense(*sizes: int) -> nn.Sequential:
    pairs = [[nn.Linear(*pair), nn.ReLU()] for pair in pairwise(sizes)]
    return nn.Sequential(*(layer for pair in pairs for layer in pair))


def both(net: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Return the same network in float64 by PyTorch, and fused in float32, with changed batch-norm statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for part in net.modules():
            if hasattr(part, "reset_parameters"):
                part.reset_parameters()
            if isinstance(part, nn.BatchNorm2d):
                part.eps = 0.1  # of two values' gradients, all but what is due to it cancels
                nn.init.uniform_(part.weight, -1.5, 1.5)
                part.weight.data += 0.5 * part.weight.data.sign()  # near 0, neighbours differ by rounding alone
                nn.init.uniform_(part.bias, -1, 1)
                nn.init.uniform_(part.running_mean, -1, 1)
    ours = copy.deepcopy(net).to(memory_format=torch.channels_last)
    fuse({"model": ours})
    assert is_fused(ours)
    return net.double(), ours


def is_fused(net: nn.Module) -> bool:
    return isinstance(vars(net).get("forward"), Chain)


Run = Callable[[nn.Module], list[torch.Tensor]]  # what a network makes, in float64, whatever it computes in


def gradients(net: nn.Module) -> list[torch.Tensor]:
    return [torch.zeros_like(p).double() if p.grad is None else p.grad.double() for p in net.parameters()]


def a_step(x: torch.Tensor, by_x: bool) -> Run:
    """Values, gradients and statistics."""

    def run(net: nn.Module) -> list[torch.Tensor]:
        dtype = next(net.parameters()).dtype
        given = x.to(dtype, copy=True).requires_grad_(by_x)
        out = net(given)
        outs = [out] if isinstance(out, torch.Tensor) else list(out)
        rng = torch.Generator().manual_seed(2)
        sum((o * torch.randn(o.shape, generator=rng).to(dtype)).sum() for o in outs).backward()
        made = [*outs, *([given.grad] if by_x else []), *net.buffers()]
        return [*(tensor.detach().double() for tensor in made), *gradients(net)]

    return run


def clear_windows(net: nn.Module, shape: tuple[int, ...], run_on: Callable[[torch.Tensor], Run]) -> torch.Tensor:
    """Return the first random windows with which rounding cannot change what ReLU and pooling let through."""
    for seed in range(200):
        x = 5 + 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        if is_clear(net, run_on(x)):
            return x
    raise AssertionError("no windows are clear enough: take fewer")


def agree(reference: nn.Module, ours: nn.Module, run: Run) -> None:
    """Assert that the results of `ours` in float32 differ from float64 by no more than its roundings can cause."""
    allowed = allowances(reference, run)
    for found, expected, most in zip(run(ours), run(reference), allowed, strict=True):
        assert_within(found, expected, most)


def check(net: nn.Module, shape: tuple[int, ...], by_x: bool = True) -> None:
    reference, ours = both(net)
    x = clear_windows(reference, shape, lambda x: lambda net: net(x.double()))
    agree(reference, ours, a_step(x, by_x))
    out = ours(x)
    assert "Chained" in str((out if isinstance(out, torch.Tensor) else out.logits).grad_fn)


@compiled
@pytest.mark.parametrize("rows", [1, 2, 17])
@pytest.mark.parametrize("time", [10, 11, 52])  # 2, 3 and 44 after the convolution: one pair, an odd one, many
@pytest.mark.parametrize(("inputs", "filters"), [(16, 16), (32, 32), (48, 64), (16, 112)])
def test_a_block_gives_pytorchs_values_gradients_and_statistics(rows, time, inputs, filters, processor):
    check(block(inputs, filters), (rows, inputs, 1, time))


@compiled
@pytest.mark.parametrize("taps", [1, 2, 3, 5, 6, 12])
@pytest.mark.parametrize("time", [13, 14, 15, 40])
def test_so_does_one_of_another_width(taps, time, processor):
    """Multiples of three take Winograd's way, with tiles that end with a window or beyond it."""
    check(block(32, 48, taps), (25, 32, 1, time))


@compiled
@pytest.mark.parametrize("inputs", [1, 3, 9])
def test_so_does_a_first_block_which_need_not_know_the_gradient_by_its_windows(inputs, processor):
    check(block(inputs, 32), (5, inputs, 1, 100), by_x=False)


@compiled
@pytest.mark.parametrize("rows", [1, 3, 4, 34])
@pytest.mark.parametrize("sizes", [(16, 1), (64, 16, 7), (80, 16, 32, 18), (1216, 256, 128)])
def test_so_do_dense_layers(rows, sizes, processor):
    check(dense(*sizes), (rows, sizes[0]))


@compiled
@pytest.mark.parametrize("rows", [1, 8, 19])
def test_so_do_blocks_and_dense_layers_one_after_the_other(rows, processor):
    blocks = block(16, 32), block(32, 16, 3)  # 72 samples, 32, 15
    check(nn.Sequential(*blocks, nn.Flatten(), dense(16 * 15, 32, 16), nn.Linear(16, 3)), (rows, 16, 1, 72))


@compiled
@pytest.mark.parametrize("model", [CNN, CNNSmall])
@pytest.mark.parametrize("shape", [(3, 1, 100), (9, 1, 128)])
def test_so_does_a_whole_model_with_gradients_by_features_and_logits(model, shape, processor):
    check(model(shape, 6), (7, *shape), by_x=False)


@compiled
@pytest.mark.parametrize("used", ["features", "logits"])
def test_a_result_that_no_loss_uses_sends_nothing_back(used):
    reference, ours = both(CNN((3, 1, 40), 5))
    x = clear_windows(reference, (4, 3, 1, 40), lambda x: lambda net: net(x.double()))

    def run(net: nn.Module) -> list[torch.Tensor]:
        getattr(net(x.to(net.head.weight.dtype)), used).square().sum().backward()
        return gradients(net)

    agree(reference, ours, run)


@compiled
def test_a_model_asked_twice_in_a_step_gets_both_gradients():
    reference, ours = both(CNN((3, 1, 40), 5))

    def asked(x: torch.Tensor) -> Run:
        def run(net: nn.Module) -> list[torch.Tensor]:
            given = x.to(net.head.weight.dtype)
            loss = net(given[:4]).logits.square().sum() + net.features(given[2:]).sum()
            if torch.is_grad_enabled():
                loss.backward()
            return gradients(net)

        return run

    x = clear_windows(reference, (6, 3, 1, 40), asked)
    agree(reference, ours, asked(x))


@compiled
def test_a_gradient_goes_to_the_first_of_equal_neighbours_and_to_none_below_zero():
    """A filter that copies its input."""
    _, ours = both(block(16, 16, 5))
    convolution, norm, *_ = ours
    with torch.no_grad():
        norm.weight.fill_(1), norm.bias.fill_(0)
        convolution.bias.fill_(0), convolution.weight.fill_(0)
        convolution.weight[range(16), range(16), 0, 2] = 1
    values = torch.tensor([1.0, 1.0, -1.0, -1.0, 2.0, -2.0])
    x = torch.zeros(1, 16, 1, 10)
    x[:, :, :, 2:8] = values
    x, theirs = x.requires_grad_(), values.double().view(1, 1, 1, 6).requires_grad_()
    arrives = torch.tensor([1.0, 10.0, 100.0]).view(1, 1, 1, 3)
    ours(x).backward(arrives.expand(1, 16, 1, 3))
    nn.MaxPool2d((1, 2))(nn.ReLU()(nn.BatchNorm2d(1, norm.eps).double()(theirs))).backward(arrives.double())
    # rstd (g - mean(g) - x^ mean(g x^)) with sums of 6 terms and some roundings more; rstd < 1, |x^| < 2
    allowed = gamma(6 + 12) * (1 + 1 + 2 * 2) * 100
    for channel in range(16):
        assert_within(x.grad[:, channel : channel + 1, :, 2:8], theirs.grad, allowed)


@compiled
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("where", ["weights", "windows"])
def test_layouts_in_memory_do_not_matter(where, layout):
    """Windows are copied where channels are not innermost; weights that are laid out so are PyTorch's to use."""
    reference, ours = both(block(3, 32))
    x = clear_windows(reference, (8, 3, 1, 40), lambda x: lambda net: net(x.double()))
    if where == "weights":
        ours.to(memory_format=layout)
    else:
        x = x.to(memory_format=layout)
    agree(reference, ours, a_step(x, by_x=False))
    assert ("Chained" in str(ours(x).grad_fn)) == (where == "windows" or layout == torch.channels_last)


@compiled
@pytest.mark.parametrize("taps", [9, 5])
def test_not_a_number_is_passed_on(taps):
    net = nn.Sequential(block(16, 16, taps), nn.Flatten(), dense(16 * ((20 - taps + 1) // 2), 4))
    _, ours = both(net)
    x = torch.zeros(2, 16, 1, 20)
    x[0, 0, 0, 3] = torch.nan
    assert ours(x).isnan().any()


@compiled
def test_tensors_that_are_moved_are_found_where_they_are():
    _, ours = both(block(16, 16))
    x = torch.randn(4, 16, 1, 30)
    before = ours(x)
    ours[0].weight.data = 2 * ours[0].weight.data
    ours[0].bias = nn.Parameter(-ours[0].bias.data)
    ours[1].weight.data = ours[1].weight.data.clone().fill_(0.5)
    after = ours(x)
    assert "Chained" in str(after.grad_fn) and not torch.equal(before, after)
    reference = nn.Sequential(*copy.deepcopy(list(ours))).double()
    agree(reference, ours, lambda net: [net(x.to(net[0].weight.dtype)).detach().double()])


@compiled
def test_where_it_does_not_fit_pytorchs_operations_are_used():
    """They give their own bits."""
    reference, ours = both(block(3, 16))
    theirs = copy.deepcopy(reference).float().to(memory_format=torch.channels_last)
    x = torch.randn(4, 3, 1, 30)
    assert torch.equal(ours.eval()(x), theirs.eval()(x))
    ours.train(), theirs.train()
    ours[1].eval(), theirs[1].eval()
    assert torch.equal(ours(x), theirs(x))
    by_x, by_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    ours.train()(by_x).sum().backward()  # of three channels there is no gradient to be had
    theirs.train()(by_theirs).sum().backward()
    assert torch.equal(by_x.grad, by_theirs.grad) and by_x.grad.abs().max() > 0
    assert torch.equal(ours.double()(x.double()), theirs.double()(x.double()))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        both(block(3, 16))[1](torch.randn(1, 3, 1, 9))
    with pytest.raises(RuntimeError, match="channels"):
        both(block(3, 16))[1](torch.randn(4, 5, 1, 30))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        both(CNN((3, 1, 40), 5))[1](torch.randn(4, 3, 1, 48))


@compiled
def test_many_threads_are_left_to_pytorch():
    _, ours = both(block(3, 16))
    x = torch.randn(4, 3, 1, 30)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert ("Chained" in str(ours(x).grad_fn)) == (threads < 3)


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
        a_block(convolution=nn.Conv2d(1, 16, (1, 3), padding=(0, 1))),
        a_block(convolution=nn.Conv2d(1, 16, (1, 3), padding=1)),
        a_block(convolution=nn.Conv2d(1, 16, (1, 3), bias=False)),
        nn.Sequential(nn.Linear(20, 16)),
        nn.Sequential(nn.Linear(16, 16, bias=False)),
        nn.Sequential(nn.Flatten(), nn.Linear(16, 16)),
        nn.Sequential(nn.Linear(16, 16), nn.Sigmoid()),
        nn.Sequential(nn.Linear(16, 16), nn.Dropout()),
        nn.Sequential(),
        nn.Sequential(nn.Linear(16, 16), nn.Conv2d(1, 16, (1, 3))),
        nn.Sequential(*(nn.Linear(16, 16) for _ in range(33))),
    ]
    held = [nn.Sequential(a_block(), nn.Linear(16, 16)), nn.Sequential(a_block(), nn.Flatten(2))]  # no chain themselves
    usual = [a_block(), *(net[0] for net in held), dense(16, 3, 3)[:1], nn.Sequential(a_block(), nn.Flatten())]
    fuse(dict(enumerate([*map(nn.ModuleList, zip([*others, *usual])), *held])))
    assert not any(map(is_fused, [*others, *held]))
    assert {is_fused(net) for net in usual} == {library.operations() is not None}


@compiled
def test_models_that_make_features_in_their_own_way_are_fused_in_parts():
    class Own(CNN):
        def features(self, x):
            return 2 * super().features(x)

    own = Own((3, 1, 40), 5)
    fuse({"model": own})
    assert not is_fused(own) and is_fused(own.convolutions) and is_fused(own.dense)
    headless = CNN((3, 1, 40), 5).to(memory_format=torch.channels_last)
    headless.head = nn.Identity()
    fuse({"model": headless})
    assert not is_fused(headless) and "Chained" in str(headless.features(torch.randn(2, 3, 1, 40)).grad_fn)


@compiled
@pytest.mark.parametrize("part", ["convolutions", "convolutions.0.2", "dense", "head"])
def test_hooks_are_called(part):
    _, ours = both(CNN((3, 1, 40), 5))
    x, calls = torch.randn(2, 3, 1, 40), []
    handle = ours.get_submodule(part).register_forward_hook(lambda *_: calls.append(part))
    assert "Chained" not in str(ours(x).logits.grad_fn) and calls == [part]
    handle.remove()
    assert "Chained" in str(ours(x).logits.grad_fn) and calls == [part]


@compiled
@pytest.mark.parametrize("register", ["register_full_backward_hook", "register_full_backward_pre_hook"])
def test_so_are_those_on_the_way_back(register):
    _, ours = both(CNN((3, 1, 40), 5))
    calls = []
    getattr(ours.dense[0], register)(lambda *_: calls.append(register))
    ours(torch.randn(2, 3, 1, 40)).logits.sum().backward()
    assert calls == [register]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "wrap",
    [nn.utils.weight_norm, nn.utils.spectral_norm, nn.utils.parametrizations.weight_norm],
    ids=["weight_norm", "spectral_norm", "parametrized weight_norm"],
)
def test_layers_whose_weights_are_made_of_others_are_pytorchs(wrap):
    net = nn.Sequential(wrap(nn.Linear(16, 4)), nn.ReLU())
    fuse({"model": net})
    assert not is_fused(net) and net(torch.randn(3, 16)).shape == (3, 4)


@compiled
def test_a_norms_momentum_may_change():
    reference, ours = both(block(16, 16))
    steps = [(momentum, torch.randn(4, 16, 1, 30)) for momentum in (0.1, 0.7)]

    def run(net: nn.Module) -> list[torch.Tensor]:
        for net[1].momentum, x in steps:
            net(x.to(net[0].weight.dtype))
        return [net[1].running_mean.double(), net[1].running_var.double()]

    agree(reference, ours, run)


@compiled
def test_another_default_type_changes_nothing():
    _, ours = both(CNN((3, 1, 40), 5))
    x = torch.randn(2, 3, 1, 40)
    before = ours(x).logits
    torch.set_default_dtype(torch.float64)
    try:
        after = ours(x).logits
        after.sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert after.dtype == torch.float32 and torch.equal(before, after)
    assert ours.head.bias.grad.dtype == torch.float32


@compiled
def test_weights_of_another_size_are_pytorchs_to_refuse():
    _, ours = both(CNN((3, 1, 40), 5))
    ours.dense[0].weight.data = ours.dense[0].weight.data[:, :16].contiguous()
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        ours(torch.randn(2, 3, 1, 40))


@compiled
def test_a_copy_of_a_fused_network_is_one_by_itself():
    reference, ours = both(CNN((3, 1, 40), 5))
    other, x = copy.deepcopy(ours), torch.randn(2, 3, 1, 40)
    before = ours(x).logits
    with torch.no_grad():
        other.head.bias.add_(1.0)
        reference.head.bias.add_(1.0)
    agree(reference, other, lambda net: [net(x.to(net.head.weight.dtype)).logits.detach().double()])
    assert torch.equal(ours(x).logits, before)
    other(x).logits.sum().backward()
    assert ours.head.bias.grad is None and other.head.bias.grad is not None
