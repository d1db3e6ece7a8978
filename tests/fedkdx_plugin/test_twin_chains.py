"""What people write is what runs: compiled chains are used only while they give what PyTorch's layers give."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedkdx_plugin.models.cnn import CNN
from fedkdx_plugin.native import library, twin
from fedkdx_plugin.native.chain import Chained
from fedkdx_plugin.native.fuse import fuse
from registry.interface import Model
from tests.fedkdx_plugin.wrong_library import wrong_library

pytestmark = pytest.mark.skipif(library.operations() is None, reason="no C compiler here")


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(twin, "_verdicts", {})


@pytest.fixture(scope="module")
def wrong(tmp_path_factory):
    """Dense layers' values, and Winograd's gradients by weights."""
    edits = {
        "dense.c": ("totals[i * OUTPUTS + j] + bias[j]", "1.01f * totals[i * OUTPUTS + j] + bias[j]"),
        "winograd.c": ("g[0] = 0.5f * v[0] + one", "g[0] = 0.51f * v[0] + one"),
    }
    return wrong_library(tmp_path_factory.mktemp("wrong") / "fused", edits)


def said(capsys: pytest.CaptureFixture) -> list[str]:
    """Return the lines on standard error since the last call."""
    return capsys.readouterr().err.splitlines()


def block(inputs: int, filters: int, taps: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, filters, (1, taps)), nn.BatchNorm2d(filters), nn.ReLU(), nn.MaxPool2d((1, 2))
    )


def dense(*sizes: int) -> nn.Sequential:
    return nn.Sequential(*(layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())))


WINDOW = (3, 1, 40)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "model": (lambda: CNN(WINDOW, 5), WINDOW),
    "block of 9 taps": (lambda: block(16, 32, 9), (16, 1, 30)),
    "block of 5 taps": (lambda: block(16, 32, 5), (16, 1, 30)),
    "dense": (lambda: dense(64, 32, 16), (64,)),
}


def fused(net: nn.Module) -> nn.Module:
    net = net.to(memory_format=torch.channels_last).train()
    fuse({"net": net})
    return net


def result(net: nn.Module, window: tuple[int, ...] = WINDOW) -> Tensor:
    out = net(torch.randn(4, *window, generator=torch.Generator().manual_seed(0)))
    return out if isinstance(out, Tensor) else out.logits


def is_chained(net: nn.Module, window: tuple[int, ...] = WINDOW) -> bool:
    return "Chained" in str(result(net, window).grad_fn)


@pytest.mark.parametrize("name", MODELS)
def test_chains_are_used_and_nothing_is_said(name, capsys):
    make, window = MODELS[name]
    assert is_chained(fused(make()), window) and said(capsys) == []


@pytest.mark.parametrize("method", ["forward", "features"])
def test_a_models_method_that_is_replaced_runs(method, monkeypatch, capsys):
    net = fused(CNN(WINDOW, 5))
    before = result(net)
    usual = getattr(Model, method)

    def changed(self, x):
        found = usual(self, x)
        return 2 * found if method == "features" else found._replace(logits=2 * found.logits)

    monkeypatch.setattr(Model, method, changed)
    for each in (net, fused(CNN(WINDOW, 5))):
        assert not is_chained(each)
    (line,) = [line for line in said(capsys) if "CNN.forward" in line]
    assert f"Model.{method} was replaced" in line and "differs by" in line
    assert not torch.equal(result(net), before)
    monkeypatch.setattr(Model, method, usual)
    assert torch.equal(result(net), before)


def test_so_does_one_that_a_model_is_given(monkeypatch):
    net = fused(CNN(WINDOW, 5))
    assert is_chained(net)
    monkeypatch.setattr(CNN, "features", lambda self, x: 0 * Model.features(self, x))
    assert not is_chained(net) and torch.equal(result(net), net.head.bias.expand(4, -1))


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net, "head", nn.Linear(128, 5)),
        lambda net: net.convolutions[1].__setitem__(2, nn.ELU()),
        lambda net: net.dense.append(nn.Linear(128, 128)),
        lambda net: setattr(net.convolutions[1][3], "ceil_mode", True),
        lambda net: setattr(net.convolutions[0][2], "forward", torch.tanh),
        lambda net: setattr(net.dense, "forward", lambda x: x[:, :128]),
        lambda net: setattr(net, "features", lambda x: x.flatten(1)[:, :1].expand(-1, 128)),
        lambda net: setattr(net.head, "bias", None),
        lambda net: (
            setattr(net, "parts", ("convolutions", "dense", "dense2")) or setattr(net, "dense2", dense(128, 128))
        ),
    ],
)
def test_layers_that_are_replaced_or_changed_later_are_those_that_run(change):
    """Against the same model that nothing was ever fused in."""
    nets = [CNN(WINDOW, 5).to(memory_format=torch.channels_last).train() for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    ours, theirs = fused(nets[0]), nets[1]
    assert is_chained(ours)
    result(theirs)  # statistics, too
    for net in (ours, theirs):
        with torch.random.fork_rng():
            torch.manual_seed(3)
            change(net)
    bound = 1e-4 * float(result(copy.deepcopy(theirs)).detach().abs().max())  # wrong layers are wrong by far more
    torch.testing.assert_close(result(ours), result(theirs), rtol=0, atol=bound)


def test_hooks_on_all_modules_are_called():
    net, asked = fused(CNN(WINDOW, 5)), []
    assert is_chained(net)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: asked.append(module))
    try:
        assert not is_chained(net)
    finally:
        handle.remove()
    assert net.convolutions[0][0] in asked and is_chained(net)


def test_features_that_the_head_cuts_off_come_out_as_they_are():
    """A ReLU at the head's start is not part of the features."""

    class Cut(CNN):
        def __init__(self, shape, classes):
            super().__init__(shape, classes)
            self.dense = nn.Sequential(nn.Linear(64 * 4, 128))
            self.head = nn.Sequential(nn.ReLU(), nn.Linear(128, classes))

    net = fused(Cut(WINDOW, 5))
    features = net(torch.randn(4, *WINDOW, generator=torch.Generator().manual_seed(0))).features
    assert (features < 0).any() and "Chained" in str(features.grad_fn)


def test_a_layers_class_that_is_changed_runs(monkeypatch, capsys):
    net = fused(dense(64, 32, 16))
    assert is_chained(net, (64,))
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: F.leaky_relu(x, 0.05))
    assert not is_chained(net, (64,)) and result(net, (64,)).min() < 0
    (line,) = said(capsys)
    assert "ReLU.forward was replaced" in line and "differs by" in line


@pytest.mark.parametrize("name", MODELS)
def test_a_comparison_leaves_network_and_random_numbers_as_they_are(name):
    make, window = MODELS[name]
    net = fused(make())
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    assert vars(net)["forward"]._prepared(torch.randn(4, *window, generator=torch.Generator())) is not None
    assert vars(net)["forward"]._reasons(torch.Size(window)) == []
    assert all(torch.equal(tensor, before[key]) for key, tensor in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_a_comparison_is_made_whatever_the_caller_does_with_gradients(capsys):
    with torch.inference_mode():
        assert result(fused(CNN(WINDOW, 5))).shape == (4, 5)
    assert said(capsys) == [] and all(verdict.agrees for verdict in twin._verdicts.values())


@pytest.mark.parametrize(
    ("name", "is_wrong"), [("model", True), ("block of 9 taps", True), ("block of 5 taps", False), ("dense", True)]
)
def test_a_wrong_chain_is_named_and_not_used(name, is_wrong, wrong, monkeypatch, capsys):
    make, window = MODELS[name]
    right, net = fused(make()), fused(make())
    assert is_chained(right, window)
    monkeypatch.setattr(library, "_library", lambda: wrong)
    assert all(is_chained(each, window) != is_wrong for each in (right, net))
    found = said(capsys)
    assert len(found) == is_wrong and all(f"{type(net).__name__}.forward" in line and " %" in line for line in found)


def test_what_calls_the_library_is_compared_with_it(monkeypatch, capsys):
    net, usual = fused(CNN(WINDOW, 5)), Chained.forward
    assert is_chained(net)
    monkeypatch.setattr(Chained, "forward", staticmethod(lambda *args: tuple(1.01 * out for out in usual(*args))))
    assert not is_chained(net) and len(said(capsys)) == 1
