"""Messages, batches, state names."""

import pickle

import pytest
import torch
from torch import nn

from registry.interface import (
    BadMessage,
    Batch,
    Client,
    Message,
    Model,
    Round,
    copy_state,
    float_state,
    last_layers,
    layers,
    private_names,
)
from tests.conftest import TinyNet, make_task


class Everything(Client):
    private = ("model.head.*",)

    def losses(self, nets, batch, context):
        raise AssertionError("not trained here")


def test_message_survives_the_wire_bit_for_bit():
    tensors = {
        "half": torch.randn(3, 5).half(),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "view": torch.arange(12.0).reshape(3, 4).T,
        "whole": torch.tensor([2**40, -1]),
        "ending.U": torch.full((2, 2), torch.pi, dtype=torch.float64),
    }
    meta = {"samples": 3, "rates": [[1, 0.1]], "name": "naïve", "nothing": None}
    back = Message.from_bytes(Message(tensors, meta).to_bytes())
    assert back.meta == meta
    assert back.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back.tensors[name].dtype == tensor.dtype
        assert torch.equal(back.tensors[name], tensor)


def test_one_tensor_under_two_names_is_sent_twice():
    tensor = torch.randn(4, 4)
    back = Message.from_bytes(Message({"a": tensor, "b": tensor, "c": tensor[1]}).to_bytes())
    assert torch.equal(back.tensors["a"], tensor)
    assert torch.equal(back.tensors["b"], tensor)
    assert torch.equal(back.tensors["c"], tensor[1])


def test_the_same_message_gives_the_same_bytes_in_any_order_of_names():
    a, b = torch.randn(3), torch.randn(2)
    assert (
        Message({"a": a, "b": b}, {"x": 1, "y": 2}).to_bytes() == Message({"b": b, "a": a}, {"y": 2, "x": 1}).to_bytes()
    )


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("pickle was run",))


@pytest.mark.parametrize(
    "data",
    [b"", b"1234567", b"\xff" * 64, pickle.dumps(Bomb()), Message({"a": torch.ones(9)}).to_bytes()[:-5]],
    ids=["empty", "short", "huge header", "pickle", "truncated"],
)
def test_foreign_bytes_are_refused(data):
    with pytest.raises(BadMessage):
        Message.from_bytes(data)


def test_safetensors_without_our_metadata_is_refused():
    import safetensors.torch

    with pytest.raises(BadMessage):
        Message.from_bytes(safetensors.torch.save({"a": torch.ones(2)}))


def test_metadata_cannot_hold_nan():
    with pytest.raises(ValueError, match="JSON"):
        Message({}, {"loss": float("nan")}).to_bytes()


def test_batch_mean_counts_real_rows_only():
    values = torch.tensor([1.0, 2.0, float("nan")])
    mask = torch.tensor([True, True, False])
    x = torch.zeros(3, 1, 1, 1)
    assert Batch(x, values, mask).mean(values) == 1.5
    assert Batch(x[:2], values[:2]).mean(values[:2]) == 1.5
    assert Batch(x, values, torch.zeros(3, dtype=torch.bool)).mean(values) == 0


def test_batch_cross_entropy_is_that_of_its_real_rows():
    """Against -log softmax, written out."""
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, 3.0], [9.0, 9.0, 9.0]], dtype=torch.float64)
    y, mask, x = torch.tensor([0, 1, 2]), torch.tensor([True, True, False]), torch.zeros(3, 1, 1, 1)
    each = logits.exp().sum(1).log() - logits[range(3), y]
    torch.testing.assert_close(Batch(x, y).cross_entropy(logits), each.mean())
    torch.testing.assert_close(Batch(x, y, mask).cross_entropy(logits), each[:2].mean())


def test_a_models_features_are_made_by_its_parts_in_turn():
    class Parts(Model):
        parts = ("first", "second")

        def __init__(self):
            super().__init__((1, 1, 4), 2)
            self.first, self.second, self.head = nn.Flatten(), nn.Linear(4, 3), nn.Linear(3, 2)

    model, x = Parts(), torch.randn(5, 1, 1, 4)
    features = model.second(x.flatten(1))
    assert torch.equal(model.features(x), features)
    assert torch.equal(model(x).features, features) and torch.equal(model(x).logits, model.head(features))
    with pytest.raises(NotImplementedError, match=r"Model\.features"):
        Model((1, 1, 4), 2)(x)


def test_layers_are_counted_from_the_head_and_the_first_is_no_last_one():
    class Mixed(Model):
        def __init__(self):
            super().__init__((1, 1, 4), 2)
            self.padding = nn.Flatten()  # nothing to train
            self.first = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4))
            self.head = nn.Linear(4, 2)
            self.own = nn.Parameter(torch.ones(1))
            self.middle = nn.Sequential(nn.ReLU(), nn.Sequential(TinyNet((3, 1, 16), 2)), nn.LayerNorm(2))
            self.last = nn.LSTM(4, 4)
            self.norm = nn.LayerNorm(4)

    model = Mixed()
    below = [("first.0", "first.1"), ("first.3",), ("middle.1.0", "middle.2"), ("last", "norm")]
    assert layers(model) == [*below, ("head",)]
    assert last_layers(model, 1) == [("head",)] and last_layers(model, 3) == [*below[2:], ("head",)]
    assert last_layers(model, 5) == last_layers(model, 9) == [*below[1:], ("head",)]
    model.parts = ("last", "first")  # as the features are computed
    assert layers(model) == [("last",), *below[:2], ("head",)]


def test_progress_runs_to_one():
    assert [Round(t, 4).progress for t in (1, 4)] == [0.25, 1.0]


def test_state_has_running_statistics_but_no_counters():
    names = float_state({"model": TinyNet((3, 1, 16), 4)}).keys()
    assert "model.bn.running_var" in names
    assert not any("num_batches_tracked" in name for name in names)


def test_copy_state_copies_all_or_nothing():
    nets = {"a": nn.Linear(2, 2)}
    before = {name: tensor.clone() for name, tensor in float_state(nets).items()}
    for wrong in ({"a.nothing": torch.ones(2)}, {"a.bias": torch.ones(3)}, {"b.bias": torch.ones(2)}):
        with pytest.raises(BadMessage, match=next(iter(wrong)).replace(".", r"\.")):
            copy_state(nets, {"a.weight": torch.ones(2, 2)} | wrong)
    assert all(torch.equal(before[name], tensor) for name, tensor in float_state(nets).items())
    copy_state(nets, {"a.bias": torch.ones(2)})
    assert torch.equal(nets["a"].bias, torch.ones(2))


def test_private_state_is_what_the_class_declares_and_local_batch_norm():
    nets = {"model": TinyNet((3, 1, 16), 4)}
    head = {"model.head.weight", "model.head.bias"}
    norm = {f"model.bn.{name}" for name in ("weight", "bias", "running_mean", "running_var")}
    assert private_names(Everything, make_task(), nets) == head
    assert private_names(Everything, make_task(local_bn=True), nets) == head | norm


def test_a_round_is_no_number_and_a_comparison_with_one_is_an_error_not_false():
    second = Round(2, 5)
    assert second == Round(2, 5, 1.0) and second != Round(3, 5) and second is not None
    assert len({second, Round(2, 5), Round(2, 6)}) == 2 and pickle.loads(pickle.dumps(second)) == second
    reflected = lambda: 2 == second  # noqa: E731, SIM300
    for compare in (lambda: second == 2, reflected, lambda: second != 2, lambda: second == 2.0):
        with pytest.raises(TypeError, match=r"number 2(\.0)?; write round\.index == 2"):
            compare()
    with pytest.raises(TypeError):
        second < 2  # noqa: B015  # as of any tuple
