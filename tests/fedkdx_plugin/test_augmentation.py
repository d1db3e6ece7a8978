"""`--augment`: each augmentation against a reference in NumPy, its properties, every backend."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from baselines.fedavg import FedAvg
from dataset_utils import shards
from fedkdx_plugin.cli.main import main
from fedkdx_plugin.configuration.config import Options
from fedkdx_plugin.engine.augmentation import (
    JITTER,
    NAMES,
    PERMUTE,
    ROTATE,
    SCALE,
    Augment,
    Augmenter,
    hashed,
    normal,
    rotations,
    top_bits,
    triples,
)
from fedkdx_plugin.engine.training import Settings, batches, train
from fedkdx_plugin.models.cnn import CNNSmall
from registry import catalog
from registry.errors import UserError
from registry.interface import Message, Round
from tests.conftest import make_federation, same_state
from tests.fedkdx_plugin.stacked_runs import assert_alike, both, run, windows
from tests.fedkdx_plugin.test_stacked_step import Refuse, made_step

ALL = Augment(NAMES, ((0, 1, 2),))
ROWS, CHANNELS, TIME = 5, 7, 18
SENSORS = ((0, 1, 2), (4, 6, 5))  # channel 3 belongs to none
WORD = 2**64


def made(rows=ROWS, seed=0):
    return torch.randn(rows, CHANNELS, 1, TIME, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def key(name, seed=0, round=1, client=0):
    return torch.tensor(Augment((name,)).keys(seed, round, client))


def augmented(name, x, keys=None, batch=0, batch_size=8):
    augmenter = Augmenter(Augment((name,), SENSORS), x, batch_size)
    return augmenter(x, key(name) if keys is None else keys, batch)


class Numbers:
    """The numbers of one augmentation, in Python's own whole numbers."""

    def __init__(self, key, count, batch, batch_size=8):
        self.key, self.count, self.start = int(key), count, batch * batch_size

    def bits(self, row, place):
        z = (self.key + ((self.start + row) * self.count + place + 1) * 0x9E3779B97F4A7C15) % WORD
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % WORD
        z = (z ^ z >> 27) * 0x94D049BB133111EB % WORD
        return z ^ z >> 31

    def normal(self, row, place):
        bits = self.bits(row, place)
        u, v = (((part % 2**23) + 0.5) / 2**23 for part in (bits >> 41, bits >> 18))
        return np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)


def test_the_hash_is_splitmix64():
    """First numbers of the authors' stream for seed 1234567, as published with the reference implementation in C."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    found = hashed(torch.tensor(1234567), torch.arange(5))
    assert [int(bits) % WORD for bits in found] == expected


def test_numbers_are_standard_normal_and_independent():
    found = normal(key(JITTER)[0], torch.arange(200), 1000, torch.float64)
    count = found.numel()
    assert abs(float(found.mean())) < 4 / count**0.5
    assert abs(float(found.square().mean()) - 1) < 4 * (2 / count) ** 0.5
    assert abs(float(found.pow(4).mean()) - 3) < 4 * (96 / count) ** 0.5
    for a, b in ((found[:, 1:], found[:, :-1]), (found[1:], found[:-1])):
        assert abs(float((a * b).mean())) < 4 / count**0.5
    assert found.unique().numel() == count


@pytest.mark.parametrize("batch", [0, 3])
def test_jitter_is_its_reference(batch):
    x = made()
    numbers = Numbers(key(JITTER), CHANNELS * TIME, batch)
    noise = [[numbers.normal(row, place) for place in range(CHANNELS * TIME)] for row in range(ROWS)]
    expected = x.numpy() + 0.05 * np.array(noise).reshape(x.shape)
    np.testing.assert_allclose(augmented(JITTER, x, batch=batch), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [0, 3])
def test_scaling_is_its_reference(batch):
    x = made()
    numbers = Numbers(key(SCALE), CHANNELS, batch)
    factors = np.array([[1 + 0.1 * numbers.normal(row, place) for place in range(CHANNELS)] for row in range(ROWS)])
    expected = x.numpy() * factors[:, :, None, None]
    np.testing.assert_allclose(augmented(SCALE, x, batch=batch), expected, rtol=1e-12)


def turned(v, q):
    """Turn vectors (3, time) by a quaternion: q v q⁻¹, by the product of quaternions."""
    q = np.array(q) / np.linalg.norm(q)

    def product(a, b):
        return np.concatenate([[a[0] * b[0] - a[1:] @ b[1:]], a[0] * b[1:] + b[0] * a[1:] + np.cross(a[1:], b[1:])])

    back = q * [1, -1, -1, -1]
    return np.stack([product(product(q, np.concatenate([[0], one])), back)[1:] for one in v.T], 1)


@pytest.mark.parametrize("batch", [0, 3])
def test_rotation_is_its_reference_and_keeps_norms(batch):
    x = made()
    numbers, found = Numbers(key(ROTATE), 8, batch), augmented(ROTATE, x, batch=batch)
    expected = x.numpy().copy()
    for row, (sensor, axes) in itertools.product(range(ROWS), enumerate(SENSORS)):
        q = [numbers.normal(row, 4 * sensor + place) for place in range(4)]
        expected[row, list(axes), 0] = turned(x.numpy()[row, list(axes), 0], q)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    for axes in SENSORS:
        torch.testing.assert_close(found[:, axes].norm(dim=1), x[:, axes].norm(dim=1), rtol=1e-12, atol=0)
    assert torch.equal(found[:, 3], x[:, 3]) and not torch.allclose(found[:, :3], x[:, :3], rtol=0.1)


def test_rotations_are_rotations_and_uniform():
    matrices = rotations(torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    torch.testing.assert_close(matrices @ matrices.mT, torch.eye(3, dtype=torch.float64).expand_as(matrices))
    torch.testing.assert_close(torch.linalg.det(matrices), torch.ones(len(matrices), dtype=torch.float64))
    # each entry of a uniform rotation is uniform in [-1, 1]: mean 0, variance 1/3
    assert (matrices.mean(0).abs() < 4 / (3 * len(matrices)) ** 0.5).all()
    assert ((matrices.square().mean(0) - 1 / 3).abs() < 4 * (4 / 45 / len(matrices)) ** 0.5).all()
    half = rotations(torch.tensor([0.0, 0.0, 0.0, 2.0]))  # half a turn about z
    assert torch.equal(half, torch.diag(torch.tensor([-1.0, -1.0, 1.0])))


@pytest.mark.parametrize("batch", [0, 3])
def test_permutation_is_its_reference_and_keeps_values(batch):
    x = made()
    numbers, found = Numbers(key(PERMUTE), 1, batch), augmented(PERMUTE, x, batch=batch)
    orders, segments = list(itertools.permutations(range(4))), np.array_split(np.arange(TIME), 4)
    assert [len(segment) for segment in segments] == [5, 5, 4, 4]
    for row in range(ROWS):
        order = orders[(numbers.bits(row, 0) >> 41) * 24 >> 23]
        expected = x.numpy()[row][..., np.concatenate([segments[place] for place in order])]
        assert np.array_equal(found[row], expected)
    assert torch.equal(found.sort(-1).values, x.sort(-1).values) and not torch.equal(found, x)


def test_every_order_of_segments_is_as_frequent():
    chosen = top_bits(key(PERMUTE)[0], torch.arange(24_000), 1).squeeze() * 24 >> 23
    counts = torch.bincount(chosen, minlength=24)
    assert len(counts) == 24 and ((counts - 1000).abs() < 4.5 * 1000**0.5).all()


@pytest.mark.parametrize("name", NAMES)
def test_windows_depend_on_seed_round_client_batch_and_row_alone(name):
    x = made().float()
    same = augmented(name, x)
    assert torch.equal(same, augmented(name, x))
    others = [augmented(name, x, key(name, *where)) for where in ((1, 1, 0), (0, 2, 0), (0, 1, 1))]
    others.append(augmented(name, x, batch=1))
    for a, b in itertools.combinations([same, *others], 2):
        assert not torch.equal(a, b)
    assert torch.equal(augmented(name, x[:2]), same[:2])  # no row depends on how many there are
    alike = augmented(name, x[:1].expand(ROWS, -1, -1, -1).clone())
    assert len({tuple(row.flatten().tolist()) for row in alike}) > 1


@pytest.mark.parametrize("name", NAMES)
def test_several_clients_at_once_are_each_alone(name):
    x = torch.stack([made(seed=seed) for seed in range(3)])
    keys = torch.stack([key(name, client=client) for client in range(3)])
    together = Augmenter(Augment((name,), SENSORS), x, 8)(x, keys, torch.tensor([2]))
    for own, one, its in zip(together, x, keys, strict=True):
        torch.testing.assert_close(own, augmented(name, one, its, batch=2), rtol=1e-12, atol=1e-12)


def test_the_memory_format_of_windows_stays():
    x = made(8).to(memory_format=torch.channels_last)
    keys = torch.tensor(ALL.keys(0, 1, 0))
    assert Augmenter(ALL, x, 8)(x, keys, 0).is_contiguous(memory_format=torch.channels_last)


def test_augmentations_are_applied_one_after_the_other():
    x, augment = made(), Augment(NAMES, SENSORS)
    expected = x
    for name in NAMES:
        expected = augmented(name, expected)
    assert torch.equal(Augmenter(augment, x, 8)(x, torch.tensor(augment.keys(0, 1, 0)), 0), expected)


@pytest.mark.parametrize(
    ("channels", "expected"),
    [
        (["acc_x", "acc_y", "acc_z", "gyro_x", "gyro_y", "gyro_z"], ((0, 1, 2), (3, 4, 5))),
        (["z", "ecg", "x", "y"], ((2, 3, 0),)),
        (["accX", "accY", "accZ", "acc_x", "acc_y"], ((0, 1, 2),)),
        (["body_acc_x", "body_acc_y", "gravity_acc_z", "temp"], ()),
        ([], ()),
    ],
)
def test_sensors_are_channels_that_differ_in_their_last_letter(channels, expected):
    assert triples(channels) == expected


def test_names_are_kept_in_the_order_in_which_they_are_applied():
    assert Augment.of(["permute", "jitter"], ["eeg"]) == Augment((JITTER, PERMUTE))
    assert Augment.of(["none"], ["x", "y", "z"]) == Augment()
    with pytest.raises(UserError, match=r"rotate: no three channels .* \(eeg, ecg\); leave rotate out"):
        Augment.of(["rotate"], ["eeg", "ecg"])


@pytest.mark.parametrize("name", ["FedAvg", "FedKDX", "pFedMe", "Per-FedAvg", "FedFomo"])
def test_stacked_training_is_the_references_and_windows_have_an_effect(name, double, capsys):
    algorithm = catalog.load("algorithms", name)
    one, other = both(algorithm, augment=ALL)
    assert_alike(one, other, 1e-8, bytes=64)
    assert capsys.readouterr().err == ""
    again, _ = run(algorithm, "sequential", augment=ALL)
    assert same_state(again.save().tensors, one[0].save().tensors)
    plain, _ = run(algorithm, "sequential")
    assert not same_state(plain.save().tensors, one[0].save().tensors)


def test_worker_processes_give_the_bits_of_the_reference():
    one, _ = run(FedAvg, "sequential", augment=ALL)
    torch.set_num_threads(2)  # as many workers, of one thread each
    other, _ = run(FedAvg, "parallel", augment=ALL)
    assert same_state(one.save().tensors, other.save().tensors)


@pytest.mark.parametrize("repeats", [1, 3])
def test_what_is_trained_on_are_the_augmented_windows_of_each_batch(repeats, monkeypatch):
    """In the order of batches; the steps that are taken on one batch see the same windows."""
    settings = Settings(batch_size=16, local_epochs=2, seed=5, augment=ALL)
    federation = make_federation(FedAvg, windows(), **vars(settings))
    client = federation.backend.begin(2, Message(federation.server.weights), Round(3, 4))
    monkeypatch.setattr(client, "repeats", lambda: repeats)
    seen, losses = [], client.losses
    monkeypatch.setattr(
        client, "losses", lambda nets, batch, context: seen.append(batch) or losses(nets, batch, context)
    )
    train(client, Round(3, 4), federation.settings)
    assert len(seen) == repeats * 2 * 5
    keys, augmenter = torch.tensor(ALL.keys(5, 3, 2)), Augmenter(ALL, client.data.x, 16)
    for number, index in enumerate(batches(65, Round(3, 4), 2, federation.settings, torch.device("cpu"))):
        for batch in seen[number * repeats : (number + 1) * repeats]:
            assert torch.equal(batch.x, augmenter(client.data.x[index], keys, number))
            assert torch.equal(batch.y, client.data.y[index])


@pytest.mark.parametrize("name", ["FedAvg", "pFedMe"])
def test_a_step_with_augmentations_waits_for_nothing_and_has_fixed_shapes(name):
    step, ready, plan, state = made_step(catalog.load("algorithms", name), CNNSmall, augment=ALL)
    expected, before = step.train(ready, plan, state.clone()), state
    with Refuse():
        step.load(ready, plan, before, torch.arange(len(ready)))
        for _ in range(plan.rows.shape[1]):
            step.once()
    assert torch.equal(step.total / step.rows.sum(1), expected)
    plain = made_step(catalog.load("algorithms", name), CNNSmall)
    assert not torch.allclose(plain[0].train(*plain[1:]), expected)


@pytest.mark.slow
def test_a_compiled_step_with_augmentations_is_the_step():
    step, ready, plan, state = made_step(FedAvg, CNNSmall, augment=ALL)
    expected = step.train(ready, plan, state.clone())
    step._move = torch.compile(type(step)._moved, fullgraph=True, dynamic=False)
    torch.testing.assert_close(step.train(ready, plan, state), expected, rtol=1e-4, atol=1e-4)


def test_the_choices_of_the_option_are_those_there_are():
    (own,) = (field for field in dataclasses.fields(Options) if field.name == "augment")
    assert own.metadata["choices"] == ("none", *NAMES)


@pytest.mark.parametrize("given", ["jitter,jitter", "none,jitter", "jitter,turn", ","])
def test_a_wrong_choice_is_one_line(given, tmp_path, shard_folder, capsys):
    command = ["run", "-data", str(shard_folder), "-algo", "FedAvg", "--augment", given, "-gr", "1"]
    assert main([*command, "-o", str(tmp_path / "runs")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_rotating_channels_without_axes_is_refused_before_anything_runs(tmp_path, shard_folder, capsys):
    found, folder = shards.load(shard_folder), tmp_path / "shards"
    clients = [shards.ClientData(train, test, {}) for train, test in zip(found.train, found.test, strict=True)]
    shards.write(folder, {"name": "made", "classes": list("abcd"), "channels": ["eeg", "ecg", "emg"]}, clients)
    command = ["run", "-data", str(folder), "-algo", "FedAvg", "--augment", "jitter,rotate", "-gr", "1"]
    assert main([*command, "-o", str(tmp_path / "runs")]) == 2
    assert "--augment rotate: no three channels" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
