"""The built-in models: what every model must do, sizes, the shortest windows, and what each paper says."""

import numpy as np
import pytest
import torch
from torch.func import functional_call, grad, stack_module_state, vmap

from fedkdx_plugin.models.cnn import CNN, CNNSmall
from fedkdx_plugin.models.deep_conv_lstm import DeepConvLSTM
from fedkdx_plugin.models.feature_mlp import FeatureMLP
from fedkdx_plugin.models.inception import InceptionTime
from fedkdx_plugin.models.parts import Attention, conv_norm
from fedkdx_plugin.models.resnet import ResNet1d
from fedkdx_plugin.models.tcn import TCN
from fedkdx_plugin.testing import ModelCase, model_checks
from registry import catalog
from registry.errors import UserError
from registry.networks import last_layers

MODELS = [catalog.load("models", name) for name in catalog.BUILT_IN["models"]]
SHAPES = {"UCI-HAR": ((9, 1, 128), 6), "SLEEP": ((3, 1, 100), 12), "PAMAP2": ((36, 1, 256), 12)}


def build(model, shape, classes, seed=0):
    torch.manual_seed(seed)
    return model(shape, classes)


def size(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("check", model_checks())
@pytest.mark.parametrize("model", MODELS)
def test_what_every_model_must_do(model, check):
    check(ModelCase(model, [(3, 1, 40), (9, 1, 128), (1, 1, 28), (2, 1, 27), (5, 1, 4), (6, 1, 301)]))


def test_cnn_is_the_papers():
    model = CNN((9, 1, 128), 6)
    shapes = [tuple(parameter.shape) for name, parameter in model.named_parameters() if name.endswith("weight")]
    assert shapes == [(32, 9, 1, 9), (32,), (64, 32, 1, 9), (64,), (256, 1664), (128, 256), (6, 128)]
    assert model.feature_size == 128


@pytest.mark.parametrize("name", SHAPES)
def test_the_student_has_at_most_a_quarter_of_the_weights(name):
    assert size(CNNSmall(*SHAPES[name])) <= size(CNN(*SHAPES[name])) / 4


UPPER = {  # the last three layers, of which the first never is one
    **{name: [("dense.0",), ("dense.2",)] for name in ("cnn", "cnn_small", "cnn_lstm")},
    "feature_mlp": [("dense.2",)],
    "deep_conv_lstm": [("first",), ("second",)],
    "resnet": [("blocks.1",), ("blocks.2",)],
    "inception_time": [("blocks.1",)],
    "tcn": [("blocks.2",), ("blocks.3",)],
    "transformer": [("encoder.0",), ("encoder.1", "encoder.2")],  # encoder.2 is the norm after the last one
    "tiny_har": [("scores.0",), ("scores.2",)],
}


@pytest.mark.parametrize("name", catalog.BUILT_IN["models"])
def test_the_last_layers_make_the_features(name):
    model = build(catalog.load("models", name), (9, 1, 128), 6)
    assert last_layers(model, 3) == [*UPPER[name], ("head",)]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("shape", [(9, 1, 128), (5, 1, 4)])
def test_a_batch_of_one_window_trains(model, shape):
    network = build(model, shape, 2)
    torch.nn.functional.cross_entropy(
        network(torch.randn(1, *shape)).logits, torch.zeros(1, dtype=torch.long)
    ).backward()
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


@pytest.mark.parametrize("model", MODELS)
def test_every_sample_of_the_window_counts(model):
    network = build(model, (2, 1, 32), 3).eval()
    x = torch.randn(1, 2, 1, 32, requires_grad=True)
    network(x).logits.square().sum().backward()
    assert (x.grad != 0).float().mean() > 0.9


@pytest.mark.parametrize("model", MODELS)
def test_weights_can_be_handed_in(model):
    network, other = build(model, (3, 1, 40), 5, 1).eval(), build(model, (3, 1, 40), 5, 2).eval()
    x = torch.randn(4, 3, 1, 40)
    torch.testing.assert_close(functional_call(network, other.state_dict(), (x,)).logits, other(x).logits)


@pytest.mark.parametrize("model", [CNN, CNNSmall])
def test_stacked_clients_train_as_each_alone(model, double):
    shape, clients = (3, 1, 40), 3
    networks = [build(model, shape, 5, seed) for seed in range(clients)]
    parameters, buffers = stack_module_state(networks)
    x, y = torch.randn(clients, 8, *shape), torch.randint(5, (clients, 8))

    def loss(parameters, buffers, x, y):
        return torch.nn.functional.cross_entropy(functional_call(networks[0], (parameters, buffers), (x,)).logits, y)

    stacked = vmap(grad(loss))(parameters, {name: b.clone() for name, b in buffers.items()}, x, y)
    for k, network in enumerate(networks):
        torch.nn.functional.cross_entropy(network(x[k]).logits, y[k]).backward()
        for name, parameter in network.named_parameters():
            torch.testing.assert_close(stacked[name][k], parameter.grad, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("shape", "classes"),
    [
        ((9, 2, 128), 6),
        ((0, 1, 128), 6),
        ((9, 1, 3), 6),
        ((9, 1, 10**9), 6),
        ((9, 128), 6),
        ((9, 1, 128), 1),
        ((9, 1, 128), 0),
        ((9.0, 1, 128), 6),
    ],
)
def test_absurd_sizes_are_refused_in_one_line(model, shape, classes):
    with pytest.raises(UserError) as error:
        model(shape, classes)
    assert "\n" not in str(error.value) and "would be right" in str(error.value)


@pytest.mark.parametrize("model", MODELS)
def test_the_catalog_has_something_to_show(model):
    assert model.paper.startswith("FedKDX") or "arXiv:" in model.paper or "doi:" in model.paper
    assert model.__doc__.splitlines()[0].endswith(".")


def weights(model):
    """Return the shapes of all weights of convolutions, linear layers and LSTMs, in order."""
    return [tuple(p.shape) for name, p in model.named_parameters() if "weight" in name and p.ndim > 1]


def test_resnet_has_the_papers_layers():
    """Blocks of 8, 5, 3 samples with 64, 128, 128 filters; a shortcut of one sample where channels change."""
    convolutions = []
    for inputs, filters in ((9, 64), (64, 128), (128, 128)):
        convolutions += [(filters, inputs, 1, 8), (filters, filters, 1, 5), (filters, filters, 1, 3)]
        convolutions += [(filters, inputs, 1, 1)] * (inputs != filters)
    assert weights(ResNet1d((9, 1, 128), 6)) == [*convolutions, (6, 128)]


def test_inception_time_has_the_papers_layers():
    """Six modules: bottleneck, 10, 20, 40 samples, maxima; two shortcuts."""
    expected = []
    for block in (9, 128):
        for inputs in (block, 128, 128):
            expected += [(32, inputs, 1, 1), *[(32, 32, 1, kernel) for kernel in (10, 20, 40)], (32, inputs, 1, 1)]
        expected += [(128, block, 1, 1)]
    assert weights(InceptionTime((9, 1, 128), 6)) == [*expected, (6, 128)]


def test_deep_conv_lstm_has_the_papers_layers():
    """Channels are not mixed before the LSTMs: 64 filters of each of 9 channels are their input."""
    lstms = [(512, 576), (512, 128), (512, 128), (512, 128)]
    assert weights(DeepConvLSTM((9, 1, 128), 6)) == [(64, 1, 1, 5), *[(64, 64, 1, 5)] * 3, *lstms, (6, 128)]


@pytest.mark.parametrize(("time", "blocks"), [(4, 1), (13, 1), (14, 2), (37, 2), (38, 3), (128, 4), (256, 5)])
def test_tcn_reaches_the_first_sample_with_no_block_too_many(time, blocks):
    """Blocks of two convolutions of 7 samples reach 12 · (1 + 2 + 4 + ...) samples back: 12, 36, 84, 180, 372."""
    assert len(build(TCN, (2, 1, time), 3).blocks) == blocks


def test_a_causal_convolution_sees_no_later_sample(double):
    layers = conv_norm(2, 4, 7, dilation=2, causal=True).eval()
    x = torch.randn(1, 2, 1, 40)
    other = x.clone()
    other[..., 20:] = 0
    one, two = layers(x), layers(other)
    assert torch.equal(one[..., :20], two[..., :20]) and not torch.equal(one[..., 20], two[..., 20])
    by_hand = torch.nn.functional.conv2d(x[..., 20 - 12 : 21], layers[1].weight, dilation=(1, 2))
    norm = layers[2]
    torch.testing.assert_close(one[..., 20:21], by_hand / (norm.running_var.view(1, -1, 1, 1) + norm.eps).sqrt())


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_is_pytorchs(heads, double):
    own, like = Attention(16, heads), torch.nn.MultiheadAttention(16, heads, batch_first=True)
    like.in_proj_weight.data, like.in_proj_bias.data = own.inner.weight.data, own.inner.bias.data
    like.out_proj.weight.data, like.out_proj.bias.data = own.outer.weight.data, own.outer.bias.data
    x = torch.randn(3, 7, 16)
    torch.testing.assert_close(own(x), like(x, x, x)[0], rtol=1e-10, atol=1e-12)


def test_statistics_are_those_of_numpy(double):
    """A ramp with a dip: its crossings and changes counted by hand, the others by NumPy."""
    window = np.array([[0.0, 1.0, 2.0, 3.0, 2.0, 9.0]])  # mean 17/6: below it are all but the fourth and the last
    own = build(FeatureMLP, (1, 1, 6), 2).statistics(torch.tensor(window)[None, :, None])[0].numpy()
    changes = [(1 + 1 + 1 + 1 + 7) / 5, (2 + 2 + 0 + 6) / 4, (2 + 8) / 2]  # over 1, 2 and 4 samples
    right = [window.mean(), window.std(), 0.0, 9.0, 3 / 5, *changes]
    np.testing.assert_allclose(own, right, rtol=1e-12)
