"""FedFTL: what learns and what does not, CORAL with the clients' pooled statistics, the server's model as in FedAvg."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from baselines.fedavg import FedAvg
from baselines.fedftl import COVARIANCE, MEAN, FedFTL, FedFTLClient, FedFTLParams, pooled, statistics
from fedkdx_plugin.models.cnn import CNN
from fedkdx_plugin.models.cnn_lstm import CNNLSTM
from registry import catalog
from registry.aggregation import Average, Averaging
from registry.errors import UserError
from registry.interface import Batch, Model, Round, Task, layers
from tests.baselines.checks import awkward_data, goes_on_identically, overheard, run, travels
from tests.conftest import CLASSES, SHAPE, TinyNet, make_data, make_federation, make_task, same_state

FEATURES = 2 * TinyNet.width


def batch(count: int = 24) -> Batch:
    data = make_data(sizes=(count,))
    return Batch(data.train_x[0], data.train_y[0])


def client(coral: float = 0.01, task: Task | None = None) -> FedFTLClient:
    torch.manual_seed(0)
    params = FedFTLParams(coral)
    one = FedFTLClient(0, replace(task or make_task(), params=params), params, 24)
    one.nets = FedFTLClient.build(one.task)
    return one


def target(seed: int = 0) -> dict[str, torch.Tensor]:
    root = torch.randn(FEATURES, FEATURES, generator=torch.Generator().manual_seed(seed))
    return {COVARIANCE: root @ root.T}


def learning(one: FedFTLClient, loss: torch.Tensor) -> set[str]:
    """Names of the parameters that a loss reaches."""
    named = {f"{net}.{name}": p for net, module in one.nets.items() for name, p in module.named_parameters()}
    named = {name: p for name, p in named.items() if p.requires_grad}
    grads = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    return {name for name, grad in zip(named, grads, strict=True) if grad is not None and grad.any()}


def test_losses_are_cross_entropy_and_coral():
    one, data, context = client(coral=0.3), batch(), target()
    for net in one.nets.values():
        net.double().eval()
    x, covariance = data.x.double(), context[COVARIANCE].double()
    found = one.losses(one.nets, Batch(x, data.y), {COVARIANCE: covariance})
    h, z = one.nets["personal"](x)
    centred = h - h.sum(0) / len(h)
    own = sum(torch.outer(row, row) for row in centred) / len(h)
    coral = ((covariance - own) ** 2).sum() / (4 * FEATURES**2)
    expected = -(z - z.exp().sum(1, keepdim=True).log())[range(len(x)), data.y].mean() + 0.3 * coral
    torch.testing.assert_close(found["personal"], expected)
    z = one.nets["model"](x).logits
    torch.testing.assert_close(found["model"], -z.log_softmax(1)[range(len(x)), data.y].mean())


@pytest.mark.parametrize(
    ("model", "upper"),
    [
        (TinyNet, {"fc", "head"}),
        (CNN, {"dense.0", "dense.2", "head"}),
        (CNNLSTM, {"dense.0", "dense.2", "head"}),
    ],
)
def test_only_the_upper_layers_of_the_copy_learn(model, upper):
    one = client(task=Task((3, 1, 16), CLASSES, model, model))
    found = one.losses(one.nets, batch(), {})
    expected = {f"personal.base.{layer}.{kind}" for layer in upper for kind in ("weight", "bias")}
    assert learning(one, found["personal"]) == expected
    of_model = learning(one, found["model"])
    assert all(name.startswith("model.") for name in of_model) and "model.head.weight" in of_model


@pytest.mark.parametrize("name", catalog.BUILT_IN["models"])
def test_coral_draws_the_features_of_every_model_and_lower_layers_stay(name):
    model = catalog.load("models", name)
    one = client(coral=1.0, task=Task(SHAPE, CLASSES, model, model))
    size = one.nets["model"].feature_size
    loss = one.losses(one.nets, batch(), {})["personal"]
    aligned = one.losses(one.nets, batch(), {COVARIANCE: torch.eye(size)})["personal"] - loss
    first = layers(one.nets["model"])[0][0]
    assert learning(one, aligned) and not any(".head." in own for own in learning(one, aligned))
    assert learning(one, loss) == learning(one, aligned) | {"personal.base.head.weight", "personal.base.head.bias"}
    assert not any(own.startswith(f"personal.base.{first}.") for own in learning(one, loss))


@pytest.mark.parametrize(("count", "retrained"), [(2, {"dense.2"}), (3, {"dense.0", "dense.2"}), (9, None)])
def test_so_many_last_layers_are_retrained_but_never_the_first(count, retrained):
    model = FedFTLClient.build(replace(Task(SHAPE, CLASSES, CNN, CNN), params=FedFTLParams(layers=count)))["personal"]
    learnt = {name.removeprefix("base.").rpartition(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    every = {name.removeprefix("base.").rpartition(".")[0] for name, _ in model.named_parameters()}
    assert learnt == (retrained or every - {"convolutions.0.0", "convolutions.0.1"} - {"head"}) | {"head"}


def test_a_model_whose_features_nothing_can_align_is_refused():
    class Linear(Model):
        """A head on the window itself."""

        def __init__(self, shape, classes):
            super().__init__(shape, classes)
            self.feature_size = shape[0] * shape[2]
            self.head = nn.Linear(self.feature_size, classes)

        def features(self, x):
            return x.flatten(1)

    with pytest.raises(UserError, match="FedFTL: Linear has no layer between its first and its head"):
        FedFTL.check(Task(SHAPE, CLASSES, Linear, Linear), FedFTLParams())


def test_coral_reaches_the_last_dense_layer_but_not_the_head():
    one, data = client(coral=1.0), batch()
    with_it = one.losses(one.nets, data, target())["personal"]
    without = one.losses(one.nets, data, {})["personal"]
    assert learning(one, with_it - without) == {"personal.base.fc.weight", "personal.base.fc.bias"}


def test_padding_rows_change_nothing(double):
    one, data, context = client(1.0), batch(10), target()
    for net in one.nets.values():
        net.eval()
    rows = torch.cat([data.x, 100 * torch.ones(3, *SHAPE)])
    padded = Batch(rows, torch.cat([data.y, data.y[:3]]), torch.arange(13) < 10)
    plain = one.losses(one.nets, data, context)
    for name, value in one.losses(one.nets, padded, context).items():
        torch.testing.assert_close(value, plain[name])


def test_the_servers_covariance_is_that_of_all_windows_together():
    rng = torch.Generator().manual_seed(0)
    clients = [torch.randn(n, 5, generator=rng, dtype=torch.float64) + k for k, n in enumerate((30, 1, 8))]
    found = pooled([statistics(h) for h in clients], [30 / 39, 1 / 39, 8 / 39], Average(Averaging()))
    torch.testing.assert_close(found, torch.cat(clients).T.cov(correction=0))


def test_a_round_sends_the_statistics_of_the_model_as_it_came(double):
    federation = make_federation(FedFTL, rounds=1, join_ratio=1)
    data, model = federation.data, TinyNet(SHAPE, CLASSES).eval()
    model.load_state_dict({n.removeprefix("model."): t for n, t in federation.server.weights.items()}, strict=False)
    expected = model.features(torch.cat(data.train_x)).detach().T.cov(correction=0)
    run(federation)
    torch.testing.assert_close(federation.server.covariance[COVARIANCE], expected, rtol=1e-9, atol=1e-9)


def test_one_window_has_no_covariance_and_a_finite_gradient():
    one, data = client(), batch(1)
    mean, covariance = statistics(one.nets["model"].eval().features(data.x))
    assert not covariance.any() and mean.any()
    one.nets["personal"].eval()
    loss = one.losses(one.nets, data, target())["personal"]
    loss.backward()
    assert all(p.grad.isfinite().all() for p in one.nets["personal"].parameters() if p.requires_grad)


@pytest.mark.parametrize(("backend", "optimizer"), [("auto", "sgd"), ("sequential", "adamw"), ("stacked", "adamw")])
def test_the_copy_keeps_the_lower_layers_and_statistics_of_the_server(backend, optimizer):
    """Also with weight decay, which would shrink what is fixed."""
    federation = make_federation(FedFTL, rounds=1, join_ratio=1, backend=backend, optimizer=optimizer)
    sent = {name: tensor.clone() for name, tensor in federation.server.weights.items()}
    run(federation)
    for kept in federation.workspace.kept:
        for name, tensor in kept.items():
            same = torch.equal(tensor, sent[name.replace("personal.base.", "model.")])
            assert same == (".conv." in name or ".bn." in name), name


def test_the_copy_starts_anew_from_the_servers_model():
    federation = make_federation(FedFTL, rounds=2, join_ratio=1)
    run(federation)
    one = federation.workspace.enter(2)
    one.data = batch()
    assert not torch.equal(one.state()["personal.base.head.weight"], federation.server.weights["model.head.weight"])
    one.receive(federation.server.message(2, Round(3, 3)))
    for name, tensor in federation.server.weights.items():
        assert torch.equal(one.state()[name.replace("model.", "personal.base.")], tensor), name


def test_the_servers_model_is_that_of_fedavg_bit_for_bit():
    average, transfer = make_federation(FedAvg), make_federation(FedFTL, params={"coral": 1.0})
    average.run()
    transfer.run()
    assert same_state(dict(average.server.weights), dict(transfer.server.weights))


def test_coral_changes_the_copies():
    one, other = make_federation(FedFTL), make_federation(FedFTL, params={"coral": 1.0})
    one.run()
    other.run()
    assert not all(same_state(*pair) for pair in zip(one.workspace.kept, other.workspace.kept, strict=True))
    assert FedFTLParams().coral == 0.01


def test_copies_and_windows_never_travel():
    federation = make_federation(FedFTL, join_ratio=1)
    seen = overheard(federation)
    run(federation)
    upper = [t for kept in federation.workspace.kept for n, t in kept.items() if ".fc." in n or ".head." in n]
    assert not any(travels(tensor, seen) for tensor in upper)
    largest = {(FEATURES, FEATURES), (FEATURES,)} | {tensor.shape for tensor in federation.server.weights.values()}
    assert {tensor.shape for tensor in seen} <= largest  # nothing that grows with the number of windows


def test_other_clients_statistics_are_not_passed_on():
    federation = make_federation(FedFTL, rounds=2, join_ratio=1)
    run(federation)
    message = federation.server.message(0, Round(3, 3))
    assert MEAN not in message.tensors and message.tensors.keys() == federation.server.weights.keys() | {COVARIANCE}


def test_a_saved_server_goes_on_identically():
    assert goes_on_identically(lambda: make_federation(FedFTL, rounds=4))
    fresh = make_federation(FedFTL).server
    fresh.restore(fresh.save())
    assert fresh.covariance == {}


@pytest.mark.parametrize("local_bn", [False, True])
def test_awkward_and_late_clients(local_bn):
    """One window, one class, a class missing; client 3 is first seen in the last round."""
    federation = make_federation(FedFTL, awkward_data(), task=make_task(local_bn=local_bn), rounds=6)
    run(federation, [(0, 1, 2)] * 4 + [(1, 2), (0, 3)])
    assert federation.workspace.enter(3).serves() == "personal"


def test_an_untrained_client_is_served_by_the_servers_model():
    views = run(make_federation(FedFTL, rounds=1), [(1,)])[0].metrics
    assert views["served"].client_loss[0] == views["model"].client_loss[0] != views["personal"].client_loss[0]
    assert views["served"].client_loss[1] == views["personal"].client_loss[1]


def test_it_learns():
    metrics = run(make_federation(FedFTL, rounds=15, join_ratio=1))[-1].metrics
    assert metrics["personal"].accuracy > 0.8
    assert metrics["model"].accuracy > 0.8
