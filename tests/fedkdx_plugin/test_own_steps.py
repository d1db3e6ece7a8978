"""Clients that train in phases, take several steps on a batch, or have an update rule of their own, on all backends."""

from __future__ import annotations

import copy

import pytest
import torch

from baselines.fedavg import FedAvg, FedAvgClient
from fedkdx_plugin.engine.steps import Steps
from fedkdx_plugin.engine.training import batches, planned_steps
from registry.interface import Batch, Message, Round, copy_state
from tests.conftest import make_data, make_federation
from tests.fedkdx_plugin.stacked_runs import assert_alike, both, run, windows, with_client

HEAD, BODY = ("model.head.*",), ("model.conv*", "model.fc*")


def phases(self, epoch, epochs):
    """Train the head first, then convolution and linear layer."""
    return HEAD if epoch == 0 else BODY


def momentum(self, weights, gradients, rate, step, context):
    """Take longer steps at first, by the number of the step, and shrink weights, by the context."""
    length = torch.where(step < 2, 2.0, 0.5)
    return {name: own - length * rate * gradients[name] - context["pull"] * own for name, own in weights.items()}


def pull(self):
    return {"pull": torch.full((), 0.01 * (1 + self.id), dtype=torch.get_default_dtype())}


VARIANTS = {
    "phases": {"trains": phases},
    "repeats": {"repeats": lambda self: 3},
    "update": {"update": momentum, "context": pull},
    "all": {"trains": phases, "repeats": lambda self: 2, "update": momentum, "context": pull},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_stacked_training_is_the_references(variant, double, capsys):
    one, other = both(with_client(**VARIANTS[variant]))
    assert_alike(one, other, 1e-9)
    assert capsys.readouterr().err == ""
    usual, _ = run(FedAvg, "sequential")
    assert any(not torch.equal(t, usual.save().tensors[name]) for name, t in one[0].save().tensors.items())


def test_parallel_training_has_the_references_bits():
    algorithm = with_client(**VARIANTS["phases"])
    one, _ = run(algorithm, "sequential")
    torch.set_num_threads(2)  # as many workers, of one thread each
    other, _ = run(algorithm, "parallel")
    other.close()
    for name, tensor in one.save().tensors.items():
        assert torch.equal(other.save().tensors[name], tensor)


class Spy(FedAvgClient):
    """Notes what it is told."""

    told: list[tuple[int, int]] = []

    def receive(self, message: Message) -> None:
        super().receive(message)
        Spy.told.append((self.id, self.steps))


@pytest.mark.parametrize("backend", ["sequential", "stacked"])
def test_a_client_knows_its_number_of_steps_when_it_receives(backend):
    """Of 5 clients with batches of 16 and 2 epochs: 40 windows are 3 batches, 7 are 1, 65 are 5, 20 are 2, 33 are 3."""
    Spy.told = []
    made = make_federation(
        type("Spied", (FedAvg,), {"Client": Spy}), windows(), rounds=1, join_ratio=1.0, backend=backend
    )
    made.run([])
    settings = made.settings
    assert (settings.batch_size, settings.local_epochs) == (16, 2)
    assert sorted(Spy.told)[:5] == [(0, 6), (1, 2), (2, 10), (3, 4), (4, 6)]


def one_client(algorithm, **options):
    """Return a federation, and a client of it that has received its message."""
    made = make_federation(algorithm, windows(), rounds=1, **options)
    first = Round(1, 1)
    return made, made.backend.begin(0, made.server.message(0, first), first)


def test_plain_updates_written_out_are_sgd(double):
    """The default of `update`, taken through the way of those who override it."""

    def plain(self, weights, gradients, rate, step, context):
        return FedAvgClient.update(self, weights, gradients, rate, step, context)

    (one, _), (other, _) = (run(algorithm, "sequential") for algorithm in (FedAvg, with_client(update=plain)))
    for name, tensor in one.save().tensors.items():
        torch.testing.assert_close(other.save().tensors[name], tensor, rtol=1e-12, atol=1e-12)


def test_parameters_out_of_phase_stay_and_do_not_count_in_the_norm(double):
    """A step by hand: the head's gradient alone is clipped by its own norm."""
    bound = 1e-3
    _, client = one_client(FedAvg)
    before = copy.deepcopy(client.nets["model"])
    x, y = client.data.x[:9], client.data.y[:9]
    twin = copy.deepcopy(before).train()
    torch.nn.functional.cross_entropy(twin(x).logits, y).backward()
    head = dict(twin.head.named_parameters())
    norm = torch.stack([p.grad.norm() for p in head.values()]).norm()
    assert norm > bound
    steps = Steps(client, client.nets, {}, bound)
    steps.take(Batch(x, y), steps.still(HEAD))
    for name, parameter in client.nets["model"].named_parameters():
        old = before.get_parameter(name)
        if name.startswith("head."):
            own = head[name.removeprefix("head.")].grad
            expected = old - client.learning_rate * own * bound / (norm + 1e-6)
            torch.testing.assert_close(parameter, expected, rtol=1e-12, atol=1e-15)
        else:
            assert torch.equal(parameter, old)


@pytest.mark.parametrize("backend", ["sequential", "parallel", "stacked"])
def test_a_batch_counts_once_in_running_statistics(backend, double):
    """Of three steps on a client's only batch the first moves them: r ← 0.9 r + 0.1 b, b of the weights before it."""
    torch.set_num_threads(2)  # as many workers, of one thread each
    options = {"rounds": 1, "local_epochs": 1, "join_ratio": 1.0, "backend": backend}
    made = make_federation(with_client(repeats=lambda self: 3), make_data((12, 12)), **options)
    before, ends = dict(made.server.weights), []
    for x in made.data.train_x:
        net = copy.deepcopy(made.workspace.nets["model"]).train()
        copy_state({"model": net}, before)
        net(x)  # PyTorch's own momentum is 0.1
        ends.append(net.state_dict())
    made.run([])
    made.close()
    for name in ("running_mean", "running_var"):
        found = made.server.weights[f"model.bn.{name}"]
        torch.testing.assert_close(found, (ends[0][f"bn.{name}"] + ends[1][f"bn.{name}"]) / 2, rtol=1e-9, atol=1e-12)
        assert not torch.equal(found, before[f"model.bn.{name}"])
    assert not torch.equal(made.server.weights["model.conv.weight"], before["model.conv.weight"])


def test_planned_steps_are_those_that_are_taken():
    made, client = one_client(with_client(repeats=lambda self: 3))
    taken = len(list(batches(len(client.data.y), Round(1, 1), 0, made.settings, torch.device("cpu"))))
    assert client.steps == planned_steps(client, Round(1, 1), made.settings) == 3 * taken
