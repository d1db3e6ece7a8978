"""Networks, data and plans of somebody's own app, without Flower: what fits, and what is one clear line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fedkdx_plugin.flower.apps.models import LogitsOnly, Split, as_shape, maker
from fedkdx_plugin.flower.apps.plan import Plan, form_of
from fedkdx_plugin.flower.apps.windows import AppData
from fedkdx_plugin.testing.made import TinyNet
from registry import catalog
from registry.errors import UserError
from registry.interface import layers

SHAPE, CLASSES, CPU = (3, 16), 4, torch.device("cpu")
X, Y = np.random.default_rng(0).normal(size=(9, *SHAPE)), np.arange(9) % CLASSES
# what needs features, or treats the last layer apart; by the papers, not by what happens to fail
LOOKS_INSIDE = {"MOON", "FedAS", "FedFTL", "FedPer", "LG-FedAvg", "FedRep", "FedBABU", "FedRoD", "FedProto", "FedPAC"}
LOOKS_INSIDE |= {"FedGH", "FedDBE", "GPFL", "kNN-Per", "FedKD", "FedKD+", "FedKDX", "FedKDX+"}
NEVER = {"Local", "Centralised", "FedMAT"}  # in an app with a function that makes one network


class Bare(nn.Module):
    """A network that does not tell its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 5, stride=2)
        self.norm = nn.BatchNorm1d(4)
        self.tail = nn.Sequential(nn.Flatten(), nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, CLASSES))

    def forward(self, x):
        return self.tail(self.norm(self.conv(x)))


class Named(Bare):
    head_name = "tail.3"


class Headed(Bare):
    def __init__(self) -> None:
        super().__init__()
        self.tail[3] = nn.Identity()
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(super().forward(x))


def made(given, own=SHAPE, classes=CLASSES):
    torch.manual_seed(0)
    return maker(given, own)(as_shape(own), classes)


@pytest.mark.parametrize("network", [Named, Headed])
def test_a_network_is_taken_apart_at_its_last_layer_and_put_together_again(network):
    model = made(network)
    torch.manual_seed(0)
    plain = network().eval()
    x = torch.from_numpy(X).float()
    assert isinstance(model, Split) and model.feature_size == 8 and model.training
    output = model.eval()(x.unsqueeze(2))
    assert torch.equal(output.logits, plain(x))
    assert torch.equal(output.logits, model.head(output.features)) and output.features.shape == (9, 8)
    assert sum(name.startswith("head.") for name, _ in model.named_parameters()) == 2
    assert len(list(model.parameters())) == len(list(plain.parameters()))
    back = model.original()
    assert type(back) is network and back.state_dict().keys() == plain.state_dict().keys()
    assert torch.equal(back.eval()(x), plain(x))
    assert type(model.body.get_submodule(model.name)) is nn.Identity  # what came back is a copy


@pytest.mark.parametrize("network", [Named, Headed])
def test_layers_of_a_network_are_its_own(network):
    assert layers(made(network)) == [("body.conv", "body.norm"), ("body.tail.1",), ("head",)]


def test_of_a_bare_network_the_logits_are_known_and_all_else_is_refused():
    model = made(lambda: Bare())
    assert isinstance(model, LogitsOnly)
    output = model.eval()(torch.zeros(2, 3, 1, 16))
    assert output.logits.shape == (2, CLASSES) and type(model.original()) is Bare
    for use in (
        lambda: model.head,
        lambda: model.feature_size,
        lambda: model.features(torch.zeros(1, 3, 1, 16)),
        lambda: output.features.detach(),
        lambda: output.features + torch.ones(8),
        lambda: torch.ones(8) * output.features,
        lambda: torch.cat([output.features, output.features]),
        lambda: nn.functional.normalize(output.features),
    ):
        with pytest.raises(UserError, match=r"the features.*of Bare.*head_name = 'tail.3'"):
            use()


@pytest.mark.parametrize("own", [(16,), (3, 16), (3, 1, 16), (3, 4, 4)])
def test_a_network_takes_windows_in_its_own_shape(own):
    seen = []

    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(int(np.prod(own)), CLASSES)

        def forward(self, x):
            seen.append(tuple(x.shape[1:]))
            return self.head(x.flatten(1))

    made(Seen, own)(torch.zeros(2, *as_shape(own)))
    assert set(seen) == {own}


def fails():
    raise ValueError("mine")


class Softmax(Headed):
    def forward(self, x):
        return super().forward(x).softmax(1)


class Early(Bare):
    head_name = "conv"


class Nobody(Bare):
    head_name = "nobody"


@pytest.mark.parametrize(
    ("given", "own", "classes", "reason"),
    [
        (Bare(), SHAPE, CLASSES, "called without arguments.*not a Bare"),
        (5, SHAPE, CLASSES, "not 5"),
        (lambda: 5, SHAPE, CLASSES, "must return a network"),
        (Bare, (3, 17, 2), CLASSES, "Bare fails on windows of shape"),
        (Bare, SHAPE, 5, r"logits \(3, 5\) for 3 windows \(3, 16\), not \(3, 4\); is classes=5 right"),
        (Softmax, SHAPE, CLASSES, "Softmax does not return what its layer 'head' makes"),
        (Nobody, SHAPE, CLASSES, "no layer 'nobody'.*head_name = 'tail.3'"),
        (Early, SHAPE, CLASSES, "'conv' (is not the last one|of Early is given).*head_name = 'tail.3'"),
        ("cnn", SHAPE, CLASSES, r"\(channels, 1, time\)"),
        ("cnnn", (3, 1, 16), CLASSES, "did you mean cnn"),
        (TinyNet, SHAPE, CLASSES, r"\(channels, 1, time\)"),
        (Bare, 16, CLASSES, "shape=16"),
        (Bare, (3, 0), CLASSES, "shape="),
    ],
)
def test_what_is_no_network_is_one_line(given, own, classes, reason):
    with pytest.raises(UserError, match=reason):
        made(given, own, classes)


def plan(name="FedAvg", model=Named, **options) -> Plan:
    return Plan.of(name, model, None, SHAPE, CLASSES, options)


@pytest.mark.parametrize("name", [name for name in catalog.BUILT_IN["algorithms"] if name not in NEVER])
def test_a_bare_network_runs_where_logits_alone_are_needed(name):
    if name not in LOOKS_INSIDE:
        return plan(name, Bare).try_out()
    with pytest.raises(UserError, match=f"^{name.replace('+', '.')}: .*head_name = 'tail.3'"):
        plan(name, Bare).try_out()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"local_epochs": 0}, "local_epochs: 0 is out of range"),
        ({"set": {"gamma": 1}}, "no hyper-parameter 'gamma'"),
        ({"augment": ["rotate"]}, r"augment \(--augment\) rotate"),
        ({"bn": "local", "norm": "group"}, r"bn \(--bn\) local"),
    ],
)
def test_wrong_options_are_one_line(options, reason):
    with pytest.raises(UserError, match=reason):
        plan(**options).try_out()


def test_models_that_begin_otherwise_each_time_are_refused():
    def random():
        network = Named()
        nn.init.constant_(network.tail[3].bias, np.random.default_rng().normal())
        return network

    with pytest.raises(UserError, match="other initial weights each time"):
        plan(model=random).try_out()


def test_a_failure_of_the_users_own_is_one_line_with_its_cause():
    with pytest.raises(UserError, match="FedAvg fails with this model: ValueError: mine") as caught:
        plan(model=fails).try_out()
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_plan_reaches_the_client_whole():
    sent = plan("FedKDX", set={"gamma": 0.25, "use": ["kd", "nkd"]}, local_epochs=3, seed=7, norm="group")
    text = sent.to_text(sent.workspace())
    got, form = Plan.read(text, "fedkdx", Named, None)
    assert (got.own, got.classes, got.choice.params) == (sent.own, sent.classes, sent.choice.params)
    assert got.settings() == sent.settings() and got.config.norm == "group"
    assert form == form_of(got.workspace()) != form_of(plan("FedKDX", Headed).workspace())
    with pytest.raises(UserError, match="the server's strategy is FedKDX, but this client's app is of FedAvg"):
        Plan.read(text, "FedAvg", Named, None)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"algorithm": "FedAvg"}', None, "1" * 5000])
def test_what_is_no_plan_is_one_line(text):
    with pytest.raises(UserError, match="the server's plan cannot be read"):
        Plan.read(text, "FedAvg", Named, None)


FORMS = {
    "arrays": (X, Y, X[:2], Y[:2]),
    "lists": (X.tolist(), Y.tolist(), X[:2].tolist(), Y[:2].tolist()),
    "with a dimension of 1": (X[:, :, None], Y, X[:2], Y[:2]),
    "tensors": tuple(map(torch.from_numpy, (X, Y, X[:2], Y[:2]))),
    "datasets": (
        TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)),
        [(torch.from_numpy(x), int(y)) for x, y in zip(X[:2], Y[:2], strict=True)],
    ),
    "loaders": (
        DataLoader(TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), batch_size=4, shuffle=True),
        DataLoader(TensorDataset(torch.from_numpy(X[:2]), torch.from_numpy(Y[:2]))),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_windows_come_in_any_form(form):
    data = AppData(3, FORMS[form], SHAPE, CLASSES, CPU)
    np.testing.assert_array_equal(data.train.x, X.astype(np.float32)[:, :, None])
    np.testing.assert_array_equal(data.train.y, Y)
    about = data.announcement()
    assert (about.client, about.samples, about.tests, about.shape) == (3, 9, 2, (3, 1, 16))
    assert data.on_device(4).train_y[3].tolist() == Y.tolist()


def test_a_client_may_have_no_test_windows():
    assert AppData(0, (X, Y, [], []), SHAPE, CLASSES, CPU).announcement().tests == 0
    assert AppData(0, (FORMS["datasets"][0], []), SHAPE, CLASSES, CPU).announcement().tests == 0


@pytest.mark.parametrize(
    ("loaded", "reason"),
    [
        (None, "must return .*not NoneType"),
        ((X, Y, X), "not 3 parts"),
        ((X[:, :, :9], Y, X, Y), r"training windows of shape \(3, 9\), but the strategy has shape=\(3, 16\)"),
        ((X, Y[:3], X, Y), r"9 training windows, but labels of shape \(3,\)"),
        ((X, Y / 2, X, Y), "training labels are float64; whole numbers from 0 to 3"),
        ((X, Y, X, Y + 1), "test labels from 1 to 4; with classes=4, 0 to 3"),
        ((X, Y - 1, X, Y), "training labels from -1 to 2"),
        ((X * np.nan, Y, X, Y), "training windows hold NaN"),
        ((X * 1e300, Y, X, Y), "too large for float32"),
        (([], [], X, Y), "no training windows"),
        (("words", Y, X, Y), "training windows are no array of numbers"),
        (([[1], [2, 3]], Y, X, Y), "training windows are no array"),
        ((iter([]), []), "must be a Dataset with a length"),
        (([1, 2], []), "must be a pair"),
        ((list(zip(X, Y + 0.7, strict=True)), []), "must be a pair .*float64"),
    ],
)
def test_wrong_windows_are_one_line(loaded, reason):
    with pytest.raises(UserError, match=f"^data: .*{reason}"):
        AppData(0, loaded, SHAPE, CLASSES, CPU)
