"""The checks of fedkdx for every data set; centres, labels and test sets arrive as they are given."""

import numpy as np
import pytest
import torch
from fedkdx_centres.centres import Centres
from fedkdx_centres.wards import Wards
from torch.utils.data import TensorDataset

import fedkdx_plugin as fedkdx
from dataset_utils import shards
from dataset_utils.generate import prepare
from dataset_utils.spec import ShardSpec
from fedkdx_plugin.testing import check_source
from registry.errors import UserError

COUNTS = {"east": (24, 9), "north": (12, 6), "west": (30, 12)}


@pytest.fixture
def folder(tmp_path):
    """Make the six files of the wards."""
    rng, path = np.random.default_rng(0), tmp_path / "wards"
    path.mkdir()
    for ward, counts in COUNTS.items():
        for part, count in zip(("train", "test"), counts, strict=True):
            y = np.arange(count) % 3
            x = rng.normal(size=(count, 2, 64)) + y[:, None, None]
            np.savez(path / f"{ward}-{part}.npz", x=x.astype(np.float32), y=y)
    return path


@pytest.mark.parametrize("how", ["given", "shuffled"])
def test_source(folder, how):
    check_source(Wards, raw=folder, options={"split": how})


def test_train_and_test_sets_stay_as_given(folder, tmp_path):
    spec = ShardSpec("Wards", split="given", scale="none", min_samples=1)
    made = shards.load(prepare(spec, tmp_path / "data", folder, False, lambda line: None, Wards()))
    assert [(len(a.y), len(b.y)) for a, b in zip(made.train, made.test, strict=True)] == list(COUNTS.values())
    for ward, client in zip(COUNTS, zip(made.train, made.test, strict=True), strict=True):
        for part, shard in zip(("train", "test"), client, strict=True):
            with np.load(folder / f"{ward}-{part}.npz") as file:
                ours, theirs = (np.lexsort(x.reshape(len(x), -1).T) for x in (shard.x, file["x"]))
                np.testing.assert_array_equal(shard.x[ours][:, :, 0], file["x"][theirs])
                np.testing.assert_array_equal(shard.y[ours], file["y"][theirs])


def test_a_federation_learns_from_them(folder, tmp_path):
    torch.set_num_threads(1)
    places = {"raw": str(folder), "data_root": str(tmp_path / "data"), "out": str(tmp_path / "runs")}
    training = {"split": "given", "batch_size": 8, "local_learning_rate": 0.1, "join_ratio": 1.0, "device": "cpu"}
    results = fedkdx.compare(
        Wards, "FedAvg", model="cnn_small", rounds=10, progress=False, backend="sequential", **places, **training
    )
    assert results.clients["windows"].tolist() == [9, 6, 12]
    assert results.table["accuracy"].iloc[0] > 0.6  # by chance 1/3


class Tensors(Centres):
    """Two centres whose items are tensors (channels, 1, time) and float labels of one value, to be split."""

    name, paper, classes, channels = "Tensors", "nobody", ("a", "b"), ("one",)
    preprocessing = Wards.preprocessing
    sets = {c: TensorDataset(torch.randn(20, 1, 1, 64), torch.arange(20.0).remainder(2)[:, None]) for c in "xy"}

    def centres(self, path):
        return self.sets


def test_tensors_of_four_dimensions_and_no_test_set(folder):
    check_source(Tensors, raw=folder)
    windows = Tensors().load(folder)
    assert windows.test is None and windows.y.tolist() == [0, 1] * 20 and windows.subjects == ("x", "y")
    assert torch.equal(torch.from_numpy(windows.x[20:]), Tensors.sets["y"].tensors[0])


@pytest.mark.parametrize(
    ("x", "y", "says"),
    [
        (torch.zeros(1, 63), 0, r"y, training item 0: x is \(1, 63\), and should be \(1, 64\) or \(1, 1, 64\)"),
        (torch.full((1, 64), torch.nan), 0, "x holds NaN or infinity"),
        (torch.zeros(1, 64), 2, r"label \[2\], and should be one of 0 to 1"),
        (torch.zeros(1, 64), 0.5, r"label \[0.5\]"),
        (torch.zeros(1, 64), [0, 1], r"label \[0, 1\]"),
    ],
)
def test_an_item_that_does_not_fit_is_named(folder, monkeypatch, x, y, says):
    monkeypatch.setattr(Tensors, "sets", {"x": Tensors.sets["x"], "y": [(x, y)]})
    with pytest.raises(UserError, match=says):
        Tensors().load(folder)


def test_centres_without_test_sets_beside_others_are_named(folder, monkeypatch):
    both = (Tensors.sets["y"], Tensors.sets["y"])
    monkeypatch.setattr(Tensors, "sets", {"x": Tensors.sets["x"], "y": both})
    with pytest.raises(UserError, match="Tensors: x: no test set, which other centres have"):
        Tensors().load(folder)


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(UserError, match="Wards is not in"):
        Wards().find(None, tmp_path, False)
