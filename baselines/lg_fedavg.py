"""LG-FedAvg: Liang et al., Think Locally, Act Globally: FL with Local and Global Representations, 2020."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from baselines.fedavg import FedAvg, FedAvgClient
from baselines.fedper import HEAD
from registry.errors import UserError
from registry.interface import Model, Task, last_layers, layers
from registry.parameters import Params, option


@dataclass(frozen=True)
class LGFedAvgParams(Params):
    """Hyper-parameters of LG-FedAvg: the authors share three of their first model's five layers."""

    layers: int = option(3, "number of last layers that are shared, the output layer among them; the first stays", 1)


class LGFedAvgClient(FedAvgClient):
    """Keeps its first layers, its local representation; trains them together with the last ones, which are shared."""

    private = ("model.*", f"!{HEAD}")
    windows_meet = ""

    @classmethod
    def private_in(cls, task: Task, nets: Mapping[str, nn.Module]) -> tuple[str, ...]:
        """Return all but the last layers."""
        model = nets["model"]
        assert isinstance(model, Model)  # as `build` made it
        shared = last_layers(model, task.params.layers)
        return (*cls.private, *(f"!model.{path}.*" for layer in shared for path in layer))


class LGFedAvg(FedAvg):
    """Averages the last layers alone; each client keeps its own representation: h = g(l_k(x)), g ← Σ (n_k/n) g_k.

    A layer has weights, and the norms after it; a residual block counts as one. With `cnn`, of two convolutions and
    three dense layers, the last three are those that are dense, as the authors share three of five layers of their
    model for MNIST and two of five for CIFAR. The first layer stays, whatever `layers` says: of three layers two are
    shared.

    Of the paper's auxiliary tasks for the local representation this is the supervised one. The authors start from a
    model that FedAvg has trained; here all start from the same random one, as in every other algorithm, and the shared
    layers see what has been learnt apart. A client that has never trained has the initial representation.
    """

    paper = "Liang et al. 2020, arXiv:2001.01523"
    sends = "last layers down and up; own representation"
    Client = LGFedAvgClient
    Params = LGFedAvgParams

    @classmethod
    def check(cls, task: Task, params: Any) -> None:
        """Raise UserError for a model of a single layer, of which nothing would be kept."""
        if len(layers(task.model())) < 2:
            raise UserError(f"LG-FedAvg: {task.model_class.__name__} has a single layer to keep or share")
