"""FedRoD: Chen and Chao, On Bridging Generic and Personalized Federated Learning, ICLR 2022."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from baselines.beside import BesideClient
from baselines.fedavgft import FedAvgFT, FedAvgFTClient
from registry.interface import Batch, Message, Model, Output, Task, float_state

COUNTS = "counts"


class TwoHeads(Model):
    """Model with a second head: its logits are the sum of both heads'."""

    def __init__(self, base: Model) -> None:
        channels, height, time = base.shape
        super().__init__((channels, height, time), base.classes)
        self.base, self.feature_size, self.head = base, base.feature_size, base.head
        self.personal = nn.Linear(base.feature_size, base.classes)
        base.head = nn.Identity()

    def features(self, x: Tensor) -> Tensor:
        """Compute the features of windows with the base model."""
        return self.base.features(x)

    def forward(self, x: Tensor) -> Output:
        """Compute features, and the sum of both heads' logits."""
        features = self.features(x)
        return Output(features, self.head(features) + self.personal(features))


class FedRoDClient(FedAvgFTClient):
    """Trains the generic model by balanced softmax, and on its fixed features and logits a head of its own.

    With the features z, the generic logits g and n_c of the client's windows in class c:

        generic:   L_BSM = −log (n_y e^{g_y} / Σ_c n_c e^{g_c}), over body and generic head
        personal:  cross-entropy of softmax(g + h(z)), over h alone

    The network `personal` predicts with g + h(z), as the client trained all three last; until then, the generic model.
    """

    private = ("second.*", "personal.personal.*")
    windows_meet = "counts its windows of each class"

    @classmethod
    def build(cls, task: Task) -> dict[str, nn.Module]:
        """Return the generic model, the client's own head, and both together, which `reply` fills."""
        model = task.model()
        second = nn.Linear(model.feature_size, task.classes)
        nn.init.zeros_(second.weight)  # the first prediction is the generic one
        nn.init.zeros_(second.bias)
        return {"model": model, "second": second, "personal": TwoHeads(task.model())}

    def context(self) -> Mapping[str, Tensor]:
        """Return n_c, (classes,)."""
        assert self.data is not None  # the engine sets it while the client works
        return {COUNTS: torch.bincount(self.data.y, minlength=self.task.classes).to(self.data.x.dtype)}

    def losses(
        self, nets: Mapping[str, Callable[[Tensor], Any]], batch: Batch, context: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return both losses."""
        features, logits = nets["model"](batch.x)
        own = nets["second"](features.detach())
        return {
            "model": batch.mean(balanced_softmax(logits, batch.y, context[COUNTS])),
            "second": batch.cross_entropy(logits.detach() + own),
        }

    def reply(self) -> Message:
        """Return the generic model, and keep it together with the client's own head."""
        own = float_state({"personal.personal": self.nets["second"]})
        for name, tensor in float_state({"personal": self.nets["model"]}).items():
            own[name if name.startswith("personal.head.") else name.replace("personal", "personal.base", 1)] = tensor
        self.load(own)
        return BesideClient.reply(self)


class FedRoD(FedAvgFT):
    """Averages a generic model trained by balanced softmax; each client adds the logits of a head of its own.

    This is the paper's linear variant (no hypernetwork). As there, the personal prediction is made with the local model
    of the client's last training, the generic one with the average. The server learns no class counts.
    """

    paper = "Chen and Chao 2022, arXiv:2107.00778"
    sends = "model down, model up; own last training and second head"
    Client = FedRoDClient


def balanced_softmax(logits: Tensor, y: Tensor, counts: Tensor) -> Tensor:
    """Return −log (n_y e^{g_y} / Σ_c n_c e^{g_c}), (n,); classes that the client does not have take no part.

    Args:
        logits: g, (n, classes).
        y: labels, (n,), of classes that the client has.
        counts: n_c, (classes,).
    """
    return F.cross_entropy(logits + counts.log(), y, reduction="none")
