"""The built-in models: what every model must do, then sizes, the shortest windows, and that they can be stacked."""

import pytest
import torch
from torch.func import functional_call, grad, stack_module_state, vmap

from fedkdx_plugin.models.cnn import CNN, CNNSmall
from fedkdx_plugin.models.cnn_lstm import CNNLSTM
from fedkdx_plugin.testing import ModelCase, model_checks
from registry.errors import UserError

MODELS = [CNN, CNNSmall, CNNLSTM]
SHAPES = {"UCI-HAR": ((9, 1, 128), 6), "SLEEP": ((3, 1, 100), 12), "PAMAP2": ((27, 1, 256), 12)}


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
    assert model.paper.startswith("FedKDX")
    assert model.__doc__.splitlines()[0].endswith(".")
