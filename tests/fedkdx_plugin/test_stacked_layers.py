"""Converted layers compute what PyTorch's do, stacked or not, and leave out rows that only fill a batch up."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, vmap

from fedkdx_plugin.engine.backends.stacked import size
from fedkdx_plugin.engine.backends.stacked.layers import CONVERTED, Rows, convert, reason_against
from registry.interface import Model

CLIENTS, ROWS = 3, 5
LAYERS = {
    "conv2d": (lambda: nn.Conv2d(3, 4, (1, 9)), (3, 1, 20)),
    "conv2d without bias": (lambda: nn.Conv2d(3, 4, (1, 5), bias=False), (3, 1, 20)),
    "conv2d padded and strided": (lambda: nn.Conv2d(3, 4, (1, 3), stride=(1, 2), padding=(0, 2)), (3, 2, 11)),
    "conv2d dilated": (lambda: nn.Conv2d(3, 4, (1, 3), dilation=(1, 3)), (3, 2, 11)),
    "conv2d 1×1": (lambda: nn.Conv2d(3, 4, 1), (3, 2, 6)),
    "conv1d": (lambda: nn.Conv1d(3, 4, 5, stride=2, padding=1), (3, 20)),
    "lstm": (lambda: nn.LSTM(6, 4, batch_first=True), (7, 6)),
    "lstm without bias": (lambda: nn.LSTM(6, 4, batch_first=True, bias=False), (7, 6)),
    "linear, which stays": (lambda: nn.Linear(6, 4), (6,)),
    "conv2d of height 3, which stays": (lambda: nn.Conv2d(3, 4, 3), (3, 6, 7)),
    "conv2d in groups, which stays": (lambda: nn.Conv2d(4, 4, (1, 3), groups=2), (4, 1, 9)),
    "conv2d 'same', which stays": (lambda: nn.Conv2d(3, 4, (1, 3), padding="same"), (3, 1, 9)),
}
NORMS = {
    "1d": (lambda: nn.BatchNorm1d(4), (4,)),
    "1d over time": (lambda: nn.BatchNorm1d(4), (4, 6)),
    "2d": (lambda: nn.BatchNorm2d(4, momentum=0.3, eps=1e-2), (4, 2, 6)),
    "2d plain": (lambda: nn.BatchNorm2d(4, affine=False), (4, 2, 6)),
    "2d without running statistics": (lambda: nn.BatchNorm2d(4, track_running_stats=False), (4, 2, 6)),
    "3d": (lambda: nn.BatchNorm3d(4), (4, 2, 3, 2)),
}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def output(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = layer(x)
    return torch.cat([y[0].flatten(), *(part.flatten() for part in y[1])]) if isinstance(layer, nn.LSTM) else y


def stack(layers: list[nn.Module]) -> dict[str, torch.Tensor]:
    states = [{**dict(layer.named_parameters()), **dict(layer.named_buffers())} for layer in layers]
    return {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}


@pytest.mark.parametrize("name", LAYERS)
def test_a_stack_computes_what_each_layer_does_and_so_do_its_gradients(name):
    make, shape = LAYERS[name]
    layers, x = [make() for _ in range(CLIENTS)], torch.randn(CLIENTS, ROWS, *shape)
    converted = convert({"net": layers[0]}, Rows())["net"]
    assert (type(converted) is type(layers[0])) == name.endswith("stays")

    def one(state, x):
        return functional_call(_Output(converted), {f"layer.{n}": t for n, t in state.items()}, (x,))

    leaves = {"x": x.requires_grad_()} | {n: t.requires_grad_() for n, t in stack(layers).items()}
    y = vmap(one)({n: t for n, t in leaves.items() if n != "x"}, x)
    y.square().sum().backward()
    for k, layer in enumerate(layers):
        own = x[k].detach().requires_grad_()
        expected = output(layer, own)
        expected.square().sum().backward()
        torch.testing.assert_close(y[k], expected)
        torch.testing.assert_close(x.grad[k], own.grad)
        for parameter, value in layer.named_parameters():
            torch.testing.assert_close(leaves[parameter].grad[k], value.grad)


class _Output(nn.Module):
    """`output` as a module, for `functional_call`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return output(self.layer, x)


def test_an_lstm_goes_on_from_a_given_state_and_takes_time_first():
    lstm, x = nn.LSTM(6, 4), torch.randn(7, ROWS, 6)
    state = torch.randn(1, ROWS, 4), torch.randn(1, ROWS, 4)
    torch.testing.assert_close(convert({"net": lstm}, Rows())["net"](x, state), lstm(x, state))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", NORMS)
def test_batch_norm_knows_only_the_real_rows(name, masked):
    """Output, gradients and running statistics are those of PyTorch's own on a batch of the real rows alone."""
    make, shape = NORMS[name]
    norm, x, weight = make(), 3 * torch.randn(ROWS + 2, *shape) + 1, torch.randn(ROWS, *shape)
    real = torch.tensor([True, False, True, True, False, True, True] if masked else [True] * ROWS)
    x = x[: len(real)]
    rows = Rows()
    converted = convert({"net": norm}, rows)["net"]
    rows.mask = real if masked else None
    results = []
    for layer, own in ((norm, x[real]), (converted, x)):
        own = own.clone().requires_grad_()
        y = layer.train()(own)
        (y[real] if len(y) > ROWS else y).mul(weight).sum().backward()
        parameters = [parameter.grad for parameter in layer.parameters()]
        results.append((y, own.grad, parameters, [layer.running_mean, layer.running_var]))
    (y, gradient, *rest), (y_masked, gradient_masked, *rest_masked) = results
    torch.testing.assert_close(y_masked[real], y)
    torch.testing.assert_close(gradient_masked[real], gradient)
    assert not gradient_masked[~real].any()
    torch.testing.assert_close(rest_masked, rest)
    torch.testing.assert_close(converted.eval()(x)[real], norm.eval()(x[real]))  # evaluation moves nothing


def test_batch_norm_of_a_stack_keeps_each_clients_running_statistics():
    layers, x = [nn.BatchNorm2d(4) for _ in range(CLIENTS)], torch.randn(CLIENTS, ROWS, 4, 1, 6)
    masks = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] + [False] * 4])
    rows = Rows()
    converted, states = convert({"net": layers[0]}, rows)["net"], stack(layers)

    def one(state, x, mask):
        rows.mask = mask
        return functional_call(converted, state, (x,))

    vmap(one)(states, x, masks)
    for k, layer in enumerate(layers):
        layer(x[k][masks[k]])
        torch.testing.assert_close(states["running_mean"][k], layer.running_mean)
        torch.testing.assert_close(states["running_var"][k], layer.running_var)


def test_batch_norm_takes_several_rows_for_each_of_the_batch():
    """As FedMAT's network, which sees a window in segments."""
    norm, rows = nn.BatchNorm1d(4), Rows()
    converted = convert({"net": norm}, rows)["net"]
    x = torch.randn(6, 4)
    rows.mask = torch.tensor([True, False, True])
    torch.testing.assert_close(converted(x)[[0, 1, 4, 5]], norm(x[[0, 1, 4, 5]]))
    with pytest.raises(ValueError, match="batch norm meets 5 rows of a batch of 3"):
        converted(x[:5])


def test_a_batch_without_a_real_row_stays_finite():
    """Of a client that has no batch left; what it comes to is not used."""
    norm, rows = nn.BatchNorm1d(4), Rows()
    converted = convert({"net": norm}, rows)["net"]
    rows.mask = torch.tensor([False, False])
    x = torch.randn(2, 4, requires_grad=True)
    y = converted(x)
    y.sum().backward()
    assert all(tensor.isfinite().all() for tensor in (y, x.grad, converted.running_mean, converted.running_var))


def test_values_a_channel_that_a_window_gives_are_found_out():
    """With one row and one value PyTorch's batch norm raises: such clients must not be stacked."""

    class Net(Model):
        def __init__(self, *layers):
            super().__init__((3, 1, 8), 2)
            self.layers, self.head = nn.Sequential(*layers), nn.Linear(4, 2)

        def features(self, x):
            return self.layers(x)

    wide = nn.Conv2d(3, 4, (1, 3)), nn.BatchNorm2d(4)
    whole = nn.Conv2d(3, 4, (1, 8)), nn.BatchNorm2d(4), nn.Flatten()
    assert size.probe({"a": Net(*wide, nn.AdaptiveAvgPool2d(1), nn.Flatten())}).least_values == 6
    assert size.probe({"a": Net(*whole)}).least_values == 1
    assert size.probe({"a": Net(nn.Conv2d(3, 4, (1, 8)), nn.Flatten())}).least_values > 1000


def test_converting_leaves_the_networks_alone():
    nets = {"net": nn.Sequential(nn.Conv2d(3, 4, (1, 3)), nn.BatchNorm2d(4))}
    copies = convert(nets, Rows())
    assert [type(part) for part in nets["net"]] == [nn.Conv2d, nn.BatchNorm2d]
    assert [type(part) for part in copies["net"]] == [CONVERTED[nn.Conv2d], CONVERTED[nn.BatchNorm2d]]
    assert copies["net"].state_dict().keys() == nets["net"].state_dict().keys()
    assert not any(p is q for p, q in zip(nets["net"].parameters(), copies["net"].parameters(), strict=True))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Dropout(0.1), "draws random numbers"),
        (nn.GRU(4, 4), "GRU of this form has no stacked counterpart"),
        (nn.LSTM(4, 4, num_layers=2), "LSTM of this form"),
        (nn.LSTM(4, 4, bidirectional=True), "LSTM of this form"),
        (nn.LSTM(4, 4, proj_size=2), "LSTM of this form"),
        (nn.SyncBatchNorm(4), "SyncBatchNorm has no stacked counterpart"),
        (nn.BatchNorm1d(4, momentum=None), "counts batches"),
    ],
)
def test_what_cannot_be_stacked_is_named_with_its_place(layer, reason):
    assert reason_against({"teacher": nn.Sequential(nn.ReLU(), layer)}).startswith("teacher.1: ")
    assert reason in reason_against({"teacher": nn.Sequential(nn.ReLU(), layer)})
    assert reason_against({"teacher": layer}).startswith("teacher: ")


def test_what_can_be_stacked_has_no_reason_against_it():
    layers = [nn.Dropout(0.0), nn.LSTM(4, 4), nn.BatchNorm1d(4), nn.Conv2d(3, 4, 3), nn.LayerNorm(4)]
    assert reason_against({"model": nn.Sequential(*layers)}) == ""
