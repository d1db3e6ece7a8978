"""Ditto: Li et al., Ditto: Fair and Robust Federated Learning Through Personalization, ICML 2021."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from baselines.beside import Beside, PersonalClient, of_model
from registry.functional import beside, squared_distance
from registry.interface import Batch, outputs
from registry.parameters import Params, option


@dataclass(frozen=True)
class DittoParams(Params):
    """Hyper-parameters of Ditto; the paper chooses λ among 0.05, 0.1, 1 and 2, by data set."""

    lam: float = option(1.0, "weight λ of the distance to the global model; 0 is Local with local_rounds=selected", 0.0)


class DittoClient(PersonalClient):
    """Trains the global model as FedAvg does, and beside it its own model v on F_k(v) + λ/2 ‖v − W^t‖².

    W^t is the global model received. The distance is over the parameters, without batch-norm statistics, and without
    what stays with `--bn local`. Both models see the same batches and make the same number of steps.
    """

    windows_meet = ""

    def context(self) -> Mapping[str, Tensor]:
        """Return W^t."""
        return {name: tensor.clone() for name, tensor in of_model(self.shared()).items()}

    def losses(
        self, nets: Mapping[str, Callable[[Tensor], Any]], batch: Batch, context: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return F_k of both models, and the distance."""
        model, personal = outputs(nets, batch.x, "model", "personal")
        distance = squared_distance(beside(nets["personal"], context), batch.x)
        return {
            "model": batch.cross_entropy(model.logits),
            "personal": batch.cross_entropy(personal.logits) + self.params.lam / 2 * distance,
        }


class Ditto(Beside):
    """Averages models as FedAvg does; each client's own model is drawn towards the average: + λ/2 ‖v − W^t‖².

    A client's work in a round is that of two models. Its own model is never sent.
    """

    paper = "Li et al. 2021, arXiv:2012.04221"
    sends = "model down, model up; own model beside it"
    Client = DittoClient
    Params = DittoParams
