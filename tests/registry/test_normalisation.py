"""What takes the place of batch norm: the right layers, by their formulas, trained on every backend."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from baselines.fedavg import FedAvg
from fedkdx_plugin.configuration.config import Config, Options
from registry import catalog
from registry.errors import UserError
from registry.interface import Task, private_names
from registry.normalisation import NORMS, with_norm
from tests.conftest import CLASSES, SHAPE, TinyNet
from tests.fedkdx_plugin.stacked_runs import assert_alike, both


def net():
    return nn.Sequential(nn.Conv2d(3, 12, (1, 3)), nn.Sequential(nn.BatchNorm2d(12, eps=1e-3), nn.ReLU()))


def test_the_choices_of_the_option_are_those_there_are():
    (own,) = (field for field in dataclasses.fields(Options) if field.name == "norm")
    assert own.metadata["choices"] == NORMS


@pytest.mark.parametrize(("norm", "groups"), [("group", 4), ("layer", 1)])
def test_windows_are_normalised_by_groups_of_channels(norm, groups, double):
    """12 channels are divided by 4, the largest divisor that they share with 8."""
    x = torch.randn(5, 12, 1, 7)
    layer = with_norm(net(), norm)[1][0]
    assert type(layer) is nn.GroupNorm and layer.num_groups == groups
    by_group = x.numpy().reshape(5, groups, -1)
    means, deviations = by_group.mean(2, keepdims=True), np.sqrt(by_group.var(2, keepdims=True) + 1e-3)
    np.testing.assert_allclose(
        layer(x).detach().numpy(), ((by_group - means) / deviations).reshape(x.shape), 1e-10, 1e-12
    )


def test_batch_norm_stays_or_goes():
    assert type(with_norm(net(), "batch")[1][0]) is nn.BatchNorm2d
    assert type(with_norm(net(), "none")[1][0]) is nn.Identity
    assert type(with_norm(nn.BatchNorm1d(4), "layer")) is nn.GroupNorm


@pytest.mark.parametrize("norm", ["group", "layer", "none"])
@pytest.mark.parametrize("name", list(catalog.BUILT_IN["models"]))
def test_every_model_takes_every_norm(name, norm):
    task = Task((3, 1, 40), 5, *[catalog.load("models", name)] * 2, norm=norm)
    for model in (task.model(), task.student()):
        assert not any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in model.modules())
        assert (
            private_names(FedAvg.Client, Task((3, 1, 40), 5, TinyNet, TinyNet, True), {"model": model}) == frozenset()
        )
        assert model(torch.randn(1, 3, 1, 40)).logits.isfinite().all()  # and a batch of one window trains


@pytest.mark.parametrize("norm", ["group", "layer", "none"])
def test_stacked_training_is_the_references(norm, double, capsys):
    one, other = both(FedAvg, task=Task(SHAPE, CLASSES, TinyNet, TinyNet, norm=norm))
    assert_alike(one, other, 1e-9)
    assert capsys.readouterr().err == ""


def test_local_batch_norm_needs_batch_norm():
    with pytest.raises(UserError, match="--norm group leaves no batch norm"):
        Config(bn="local", norm="group")
