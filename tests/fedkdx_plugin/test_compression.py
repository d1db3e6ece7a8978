"""The codec's promises: error, size, names, and that nothing from outside or from linear algebra breaks it."""

import math

import pytest
import safetensors.torch
import torch

from fedkdx_plugin.algorithm import compression
from fedkdx_plugin.algorithm.additions import owed, residual_of
from fedkdx_plugin.algorithm.compression import (
    HEADER,
    NonFinite,
    compress,
    compress_together,
    decompress,
    linear,
)
from fedkdx_plugin.algorithm.updates import Sender
from fedkdx_plugin.models.cnn import CNN
from registry.interface import BadMessage

SHAPES = [(40, 60), (60, 40), (50, 50), (16, 9, 1, 9), (32, 16, 9), (128, 7)]
EPSILONS = [0.0, 0.5, 0.9, 0.98, 0.999, 0.9999]


def matrix(shape, decay=1.0, seed=0, dtype=torch.float64):
    """Make a tensor whose singular values fall as 1/j^decay."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = shape[0], math.prod(shape[1:])
    rank = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, rank, dtype=torch.float64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(columns, rank, dtype=torch.float64, generator=generator)).Q
    values = torch.arange(1, rank + 1, dtype=torch.float64) ** -decay
    return (left * values @ right.T).reshape(shape).to(dtype)


def shapes_of(tensors):
    return {name: tensor.shape for name, tensor in tensors.items()}


def there_and_back(tensors, epsilon, quantise=False):
    return decompress(compress(tensors, epsilon, quantise).payload, shapes_of(tensors))


def values(tensors):
    return sum(tensor.numel() for tensor in tensors.values())


def error(restored, tensor):
    """Relative, in the Frobenius norm, counted in float64."""
    return (
        torch.linalg.norm((restored.double() - tensor.double()).flatten())
        / torch.linalg.norm(tensor.double().flatten())
    ).item()


def test_threshold_is_equation_10():
    assert [linear(p, 0.9, 0.98) for p in (0, 0.5, 1)] == pytest.approx([0.9, 0.94, 0.98], abs=1e-15)
    for progress in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="progress"):
            linear(progress, 0.9, 0.98)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_the_rank_is_the_smallest_and_the_error_is_bounded(shape, decay, epsilon):
    tensors = {"w": matrix(shape, decay)}
    payload, ranks = compress(tensors, epsilon)
    energy = torch.linalg.svdvals(tensors["w"].flatten(1)) ** 2
    share = energy.cumsum(0) / energy.sum()
    rank = ranks["w"]
    assert share[rank - 1] > epsilon and (rank == 1 or share[rank - 2] <= epsilon)
    rows, columns = tensors["w"].flatten(1).shape
    saves = 8 * rank * (rows + 1 + columns) + HEADER + 2 < 8 * rows * columns
    assert ("w.U" in payload) == saves
    assert values(payload) <= values(tensors)
    restored = decompress(payload, shapes_of(tensors))["w"]
    assert error(restored, tensors["w"]) <= math.sqrt(1 - epsilon)
    if "w.U" in payload:
        assert error(restored, tensors["w"]) == pytest.approx(math.sqrt(1 - share[rank - 1]), abs=1e-7)


@pytest.mark.parametrize("epsilon", EPSILONS)
def test_single_precision_keeps_the_bound(epsilon):
    for seed, shape in enumerate(SHAPES):
        tensors = {"w": matrix(shape, 2.0, seed, torch.float32)}
        restored = there_and_back(tensors, epsilon)["w"]
        assert restored.dtype == torch.float32 and restored.shape == shape
        assert error(restored, tensors["w"]) <= math.sqrt(1 - epsilon)


def test_the_papers_model_at_every_threshold():
    torch.manual_seed(0)
    tensors = dict(CNN((9, 1, 128), 6).state_dict())
    for epsilon in (0.9, 0.98):
        payload, ranks = compress(tensors, epsilon)
        restored = decompress(payload, shapes_of(tensors))
        assert set(ranks) == {name for name, t in tensors.items() if t.ndim >= 2}
        assert values(payload) <= values(tensors)
        for name, tensor in tensors.items():
            if tensor.ndim < 2:
                assert torch.equal(restored[name], tensor)
            else:
                assert error(restored[name], tensor) <= math.sqrt(1 - epsilon)


@pytest.mark.parametrize("shape", [(20, 30), (32, 9, 9), (32, 9, 1, 9), (1, 40), (40, 1), (3,), (3, 1), (2, 2), ()])
def test_a_threshold_of_one_is_exact(shape):
    tensors = {"w": torch.randn(shape)}
    for epsilon in (1.0, 1.5):
        assert torch.equal(there_and_back(tensors, epsilon)["w"], tensors["w"])


def test_kernels_are_matrices_of_output_channels():
    """A kernel of rank 1 in that reading is sent in 16 + 1 + 81 values, whatever its width."""
    kernel = torch.outer(torch.randn(16), torch.randn(81)).reshape(16, 9, 1, 9)
    payload, ranks = compress({"w": kernel}, 0.99)
    assert ranks == {"w": 1} and values(payload) == 16 + 1 + 81
    torch.testing.assert_close(decompress(payload, {"w": kernel.shape})["w"], kernel)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_huge_and_tiny_values(scale):
    tensors = {"w": matrix((40, 60), dtype=torch.float32) * scale}
    for epsilon in (0.9, 0.9999):
        assert error(there_and_back(tensors, epsilon)["w"], tensors["w"]) <= math.sqrt(1 - epsilon)
    assert "w.U" in compress(tensors, 0.9).payload


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_factors_cannot_hold_goes_dense(dtype):
    full = torch.full((40, 60), torch.finfo(dtype).max, dtype=dtype)  # its singular value is beyond the type
    assert torch.equal(there_and_back({"w": full}, 0.9)["w"], full)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(20, 30),
        torch.eye(30),
        torch.eye(30) + 1e-9,
        torch.ones(20, 30),
        torch.diag(torch.tensor([1.0] * 15 + [1 - 1e-7] * 15)),
        torch.diag(10.0 ** -torch.arange(30.0)),
        torch.full((20, 30), 1e-45),
        torch.zeros(0, 5),
        torch.zeros(5, 0),
        torch.tensor(3.0),
        torch.arange(600).reshape(20, 30),
        torch.ones(20, 30, dtype=torch.bool),
        torch.randn(20, 30).bfloat16(),
    ],
    ids=lambda tensor: f"{tuple(tensor.shape)}-{tensor.dtype}",
)
@pytest.mark.parametrize("epsilon", [0.0, 0.9, 1 - 1e-15])
def test_awkward_tensors_pass(tensor, epsilon):
    payload, _ = compress({"w": tensor}, epsilon)
    restored = decompress(payload, {"w": tensor.shape})["w"]
    assert values(payload) <= tensor.numel() and restored.dtype == tensor.dtype
    if torch.linalg.norm(tensor.double()) == 0 or "w" in payload:
        assert torch.equal(restored, tensor)
    else:
        assert error(restored, tensor) <= math.sqrt(1 - epsilon) + 2 * torch.finfo(tensor.dtype).eps
    safetensors.torch.save(payload)  # contiguous, nothing shared


def test_the_energy_kept_is_more_than_epsilon_not_as_much():
    assert compress({"w": torch.eye(30)}, 0.5).ranks == {"w": 16}


def test_factors_that_save_nothing_are_not_sent():
    two = torch.zeros(10, 30)
    two[range(7), range(7)] = 1  # 7 · (10 + 1 + 30) = 287 of 300 values: 52 bytes less, and a longer header
    payload, ranks = compress({"w": two}, 0.99)
    assert ranks == {"w": 7} and list(payload) == ["w"]


def test_an_update_of_zeros_costs_nothing():
    assert values(compress({"w": torch.zeros(20, 30)}, 0.9).payload) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("shape", [(30, 20), (3,), ()])
@pytest.mark.parametrize("epsilon", [0.9, 1.0])
def test_nonfinite_tensors_are_named_before_anything_is_decomposed(bad, shape, epsilon, monkeypatch):
    monkeypatch.setattr(compression, "METHODS", ())
    broken = torch.zeros(shape)
    broken.view(-1)[-1] = bad
    with pytest.raises(NonFinite, match="'broken'"):
        compress({"good": torch.randn(30, 20), "broken": broken}, epsilon)
    with pytest.raises(NonFinite, match="'broken'"):
        decompress({"broken": broken}, {"broken": broken.shape})


def test_names_never_collide():
    names = ["a", "a.U", "a.S", "a.V", "a.dense", "a.U.dense", "a.U.U", ".U", ""]
    tensors = {name: matrix((20, 30), 3.0, seed) for seed, name in enumerate(names)}
    tensors |= {name + "x.S": torch.randn(3, dtype=torch.float64) for name in names}
    for epsilon in (0.5, 1.0):
        restored = there_and_back(tensors, epsilon)
        assert list(restored) == list(tensors)
        for name, tensor in tensors.items():
            assert error(restored[name], tensor) <= math.sqrt(1 - epsilon)


def test_payloads_from_outside_are_checked():
    tensors = {"w": matrix((20, 30), 3.0), "b": torch.randn(3)}
    shapes = shapes_of(tensors)
    good = compress(tensors, 0.9).payload
    assert set(good) == {"w.U", "w.S", "w.V", "b"}
    wrong = {
        "'b' is missing": {key: t for key, t in good.items() if key != "b"},
        "'w' is missing.*'w.S'": {key: t for key, t in good.items() if key != "w.S"},
        "'c' is not expected": {**good, "c": torch.ones(3)},
        "'w.S' is not expected": {**good, "w": tensors["w"]},
        r"'b' has shape \(1, 3\), not \(3,\)": {**good, "b": torch.ones(1, 3)},
        r"'w'.*do not give \(20, 30\)": {**good, "w.S": torch.ones(4, dtype=torch.float64)},
        r"'w'.*\(20, 1, 1\)": {**good, "w.U": good["w.U"][:, :1, None]},
        "'w'.*types": {**good, "w.V": good["w.V"].float()},
        "'w'.*int8, torch.int8, torch.int8": {
            key: t.to(torch.int8) if key.startswith("w") else t for key, t in good.items()
        },
        "'w'.*int8, torch.float64, torch.float64": {**good, "w.U": good["w.U"].to(torch.int8)},
        "'w'.*int64": {key: t.long() if key.startswith("w") else t for key, t in good.items()},
        "'b'.*do not give": {
            **{key: t for key, t in good.items() if key != "b"},
            **{f"b.{f}": torch.ones(1) for f in "USV"},
        },
    }
    for text, payload in wrong.items():
        with pytest.raises(BadMessage, match=text):
            decompress(payload, shapes)
    huge = {**good, "w.S": good["w.S"] * 1e308, "w.U": good["w.U"] * 1e10}
    with pytest.raises(NonFinite, match="'w'"):
        decompress(huge, shapes)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("epsilon", [0.5, 0.9, 0.98])
def test_quantised_factors_are_those_of_the_decomposition_to_half_a_step(shape, epsilon):
    """Against the exact U, Σ, V in float64: every entry at most half a step off, the steps part of Σ."""
    tensors = {"w": matrix(shape, 1.5)}
    plain, small = (compress(tensors, epsilon, quantise).payload for quantise in (False, True))
    if "w.U" not in plain:
        plain = dict(
            zip(("w.U", "w.S", "w.V"), torch.linalg.svd(tensors["w"].flatten(1), full_matrices=False), strict=True)
        )
        rank = len(small["w.S"])
        plain = {"w.U": plain["w.U"][:, :rank], "w.S": plain["w.S"][:rank], "w.V": plain["w.V"][:rank]}
    assert small["w.U"].dtype == small["w.V"].dtype == torch.int8
    steps = {"w.U": plain["w.U"].abs().amax(0) / 127, "w.V": (plain["w.V"].abs().amax(1) / 127).unsqueeze(1)}
    for name, step in steps.items():
        assert int(small[name].abs().max()) == 127
        found, exact = (small[name].double() * step).abs(), plain[name].abs()  # signs of a pair of vectors are free
        assert ((found - exact).abs() <= (0.5 + 1e-6) * step).all()
    torch.testing.assert_close(small["w.S"], plain["w.S"] * steps["w.U"] * steps["w.V"].squeeze(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_what_quantising_adds_to_the_error_is_within_its_bound(epsilon, dtype):
    """Half a step in each entry of U and V: by the triangle inequality of the rank-1 parts."""
    for seed, shape in enumerate(SHAPES):
        tensor = matrix(shape, 1.0, seed, dtype)
        restored, small = (
            there_and_back({"w": tensor}, epsilon, True)["w"],
            compress({"w": tensor}, epsilon, True).payload,
        )
        rows, columns = tensor.flatten(1).shape
        left, right = (small[name].double() for name in ("w.U", "w.V"))
        off = [
            0.5 * math.sqrt(n) / torch.linalg.vector_norm(f, dim=d)
            for n, f, d in ((rows, left, 0), (columns, right, 1))
        ]
        sizes = small["w.S"].double() * torch.linalg.vector_norm(left, dim=0) * torch.linalg.vector_norm(right, dim=1)
        bound = (sizes * (off[0] + off[1] + off[0] * off[1])).sum() / torch.linalg.norm(tensor.double())
        assert error(restored, tensor) <= math.sqrt(1 - epsilon) + 1.1 * float(bound)
        assert restored.dtype == dtype and restored.shape == shape


def test_quantised_the_papers_model_takes_a_quarter_and_loses_a_hundredth():
    torch.manual_seed(0)
    update = {name: tensor for name, tensor in CNN((9, 1, 128), 6).state_dict().items() if tensor.ndim >= 2}
    update = {
        name: matrix(tensor.shape, 1.0, seed, torch.float32) for seed, (name, tensor) in enumerate(update.items())
    }
    plain, small = (compress(update, 0.9, quantise).payload for quantise in (False, True))
    assert all("w.U" in payload or len(payload) > len(update) for payload in (plain, small))
    assert len(safetensors.torch.save(small)) < 0.3 * len(safetensors.torch.save(plain))
    exact, rough = (decompress(payload, shapes_of(update)) for payload in (plain, small))
    for name in update:
        assert error(rough[name], exact[name]) < 0.012, name


def test_quantised_or_not_a_threshold_of_one_is_exact_and_nothing_grows():
    tensors = {"w": torch.randn(20, 30), "b": torch.randn(7), "tiny": torch.randn(2, 2)}
    assert all(torch.equal(there_and_back(tensors, 1.0, True)[name], tensors[name]) for name in tensors)
    for epsilon in EPSILONS:
        payload = compress(tensors, epsilon, True).payload
        assert sum(t.nbytes for t in payload.values()) <= sum(t.nbytes for t in tensors.values())
        assert "b" in payload and payload["b"].dtype == torch.float32


@pytest.mark.parametrize("tensor", [torch.zeros(20, 30), torch.eye(30), torch.full((20, 30), 1e-45), torch.zeros(0, 5)])
def test_awkward_tensors_can_be_quantised(tensor):
    restored = there_and_back({"w": tensor}, 0.9, True)["w"]
    assert restored.isfinite().all() and torch.linalg.norm(restored - tensor) <= 0.5 * torch.linalg.norm(tensor)


RATE = 0.25


def sent_with_feedback(change, debt, epsilon, quantise=False):
    """Return the payload for a change at `RATE`, as a gradient, and the change still owed."""
    gradient = Sender().gradient(owed(change, debt), RATE)
    payload = compress(gradient, epsilon, quantise).payload
    return payload, residual_of(gradient, payload, RATE)


def test_feedback_sends_later_what_quantising_left_out():
    debt, total, received = {}, 0, 0
    for step in range(10):
        update = {"w": matrix((40, 60), 1.5, seed=step)}
        payload, debt = sent_with_feedback(update, debt, 0.9999, True)
        total, received = total + update["w"], received + RATE * decompress(payload, shapes_of(update))["w"]
    torch.testing.assert_close(received + debt["w"], total)
    assert 0 < torch.linalg.norm(debt["w"]) < 0.05 * torch.linalg.norm(total)


@pytest.mark.parametrize("epsilon", [-0.1, math.nan])
def test_senseless_thresholds_are_refused(epsilon):
    with pytest.raises(ValueError, match="threshold"):
        compress({}, epsilon)


@pytest.mark.parametrize("failing", [0, 1, 2, 3])
def test_every_method_that_fails_has_a_successor(failing, monkeypatch):
    def fails(matrix):
        raise torch.linalg.LinAlgError("did not converge")

    methods = [fails] * failing + list(compression.METHODS[failing:])
    monkeypatch.setattr(compression, "METHODS", methods)
    for shape in SHAPES:
        tensors = {"w": matrix(shape)}
        payload, ranks = compress(tensors, 0.9)
        assert error(decompress(payload, shapes_of(tensors))["w"], tensors["w"]) <= math.sqrt(0.1)
        assert ("w" in payload) == (
            failing == 3 or ranks["w"] * (sum(tensors["w"].flatten(1).shape) + 1) >= tensors["w"].numel()
        )


def test_a_method_that_gives_nan_is_not_believed(monkeypatch):
    monkeypatch.setattr(
        compression, "METHODS", [lambda m: (torch.full((1, 20), math.nan), torch.full((1, 20, 20), math.nan))]
    )
    tensor = matrix((20, 30))
    assert torch.equal(compress({"w": tensor}, 0.9).payload["w"], tensor)


def test_gesvd_that_fails_is_a_failure_like_any_other(monkeypatch):
    import numpy as np
    from scipy import linalg

    def fails(*args, **options):
        raise np.linalg.LinAlgError("SVD did not converge")

    monkeypatch.setattr(linalg, "svd", fails)
    monkeypatch.setattr(compression, "METHODS", compression.METHODS[2:])
    assert list(compress({"w": matrix((20, 30))}, 0.9).payload) == ["w"]


def test_same_tensors_same_bytes_and_the_input_stays():
    tensors = {"w": matrix((40, 60), dtype=torch.float32).requires_grad_(), "b": torch.randn(3)}
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    first, second = (safetensors.torch.save(compress(tensors, 0.9).payload) for _ in range(2))
    assert first == second
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)


def test_feedback_sends_later_what_was_left_out():
    """What has been received and what is still owed is what there was, and the debt stays bounded."""
    sent, debt, total, received = [], {}, 0, 0
    for step in range(30):
        update = {"w": matrix((40, 60), 1.5, seed=step), "b": torch.ones(3)}
        payload, debt = sent_with_feedback(update, debt, 0.9)
        sent.append(values(payload))
        total = total + update["w"]
        received = received + RATE * decompress(payload, shapes_of(update))["w"]
    torch.testing.assert_close(received + debt["w"], total)
    assert set(debt) == {"w"}
    # ‖debt‖ ≤ Σ_i q^i ‖update‖ with q = √(1 − ε)
    q = math.sqrt(0.1)
    assert 0 < torch.linalg.norm(debt["w"]) <= q / (1 - q) * torch.linalg.norm(matrix((40, 60), 1.5))
    assert max(sent) <= 40 * 60 + 3


def test_feedback_owes_nothing_where_nothing_is_left_out():
    update = {"w": torch.randn(40, 60), "count": torch.tensor(3)}
    assert sent_with_feedback(update, {}, 1.0)[1] == {}


@pytest.mark.parametrize("epsilon", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("quantise", [False, True])
@pytest.mark.parametrize("at_once", [1, 2400, 5000])
def test_updates_compressed_together_are_what_each_is_alone(epsilon, quantise, at_once, monkeypatch):
    monkeypatch.setattr(compression, "AT_ONCE", at_once)
    updates = [
        {"w": matrix((40, 60), 1.5, seed), "v": matrix((40, 60), 3.0, seed + 9), "t": matrix((60, 40), 2.0, seed)}
        | {"k": matrix((16, 3, 1, 9), 2.0, seed), "b": torch.randn(3), "n": torch.tensor(seed)}
        for seed in range(4)
    ]
    updates.append({"zero": torch.zeros(40, 60), "small": matrix((40, 60), 1.5, 1).float(), "w": torch.randn(3, 4)})
    updates.append({})
    for update, made in zip(updates, compress_together(updates, epsilon, quantise), strict=True):
        alone = compress(update, epsilon, quantise)
        assert made.ranks == alone.ranks and list(made.ranks) == list(alone.ranks)
        assert [(n, t.dtype) for n, t in made.payload.items()] == [(n, t.dtype) for n, t in alone.payload.items()]
        restored, expected = (decompress(one.payload, shapes_of(update)) for one in (made, alone))
        for name in update:
            torch.testing.assert_close(restored[name], expected[name], rtol=1e-6, atol=1e-9)


def test_a_matrix_that_fails_among_others_alone_goes_another_way(monkeypatch):
    """The first method fails on a stack with the bad one in it, then on the bad one; all others keep to it."""
    bad, asked = matrix((20, 30), 2.0, 1), []

    def first(matrices):
        asked.append(len(matrices))
        if any(torch.equal(one, bad / bad.abs().max()) for one in matrices):
            raise torch.linalg.LinAlgError("did not converge")
        return compression._by_eigh(matrices)

    monkeypatch.setattr(compression, "METHODS", (first, compression._by_svd))
    updates = [{"w": matrix((20, 30), 2.0, seed)} for seed in range(3)]
    for update, made in zip(updates, compress_together(updates, 0.9), strict=True):
        assert error(decompress(made.payload, shapes_of(update))["w"], update["w"]) <= math.sqrt(0.1)
    assert asked == [3, 1, 1, 1]


def test_one_update_with_nan_among_others_is_refused_before_anything_is_decomposed(monkeypatch):
    monkeypatch.setattr(compression, "METHODS", ())
    with pytest.raises(NonFinite, match="'w'"):
        compress_together([{"w": torch.randn(20, 30)}, {"w": torch.full((20, 30), math.nan)}], 0.9)
