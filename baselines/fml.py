"""FML: Shen et al., Federated Mutual Learning, 2020."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from baselines.fedavg import FedAvg, FedAvgClient
from registry.functional import kd, soften
from registry.interface import Batch, Task, outputs
from registry.parameters import Params, option


@dataclass(frozen=True)
class FMLParams(Params):
    """Hyper-parameters of FML; the paper gives no α and β, and the defaults give both terms the same weight."""

    alpha: float = option(
        0.5,
        "weight α of cross-entropy in the client's own loss; 1 with beta 1 is no mutual learning",
        0.0,
        1.0,
    )
    beta: float = option(0.5, "weight β of cross-entropy in the meme model's loss", 0.0, 1.0)


class FMLClient(FedAvgClient):
    """Trains its own model and a copy of the shared meme model; each learns from the other's predictions.

        L_own  = α CE_own + (1 − α) KL(p_meme ‖ p_own)
        L_meme = β CE_meme + (1 − β) KL(p_own ‖ p_meme)

    The other's predictions are fixed in each divergence. Until the client has trained, the meme model predicts.
    """

    private = ("personal.*",)
    windows_meet = ""

    @classmethod
    def build(cls, task: Task) -> dict[str, nn.Module]:
        """Return the client's own model (`-m`), and the meme model (`-sm`)."""
        return {"personal": task.model(), "meme": task.student()}

    def serves(self) -> str:
        """Return the name of the client's own model once it has trained; until then that of the meme model."""
        return "personal" if self.trained else "meme"

    def losses(
        self, nets: Mapping[str, Callable[[Tensor], Any]], batch: Batch, context: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return L_own and L_meme."""
        personal, meme = outputs(nets, batch.x, "personal", "meme")
        log_own, log_meme = soften(personal.logits, 1.0), soften(meme.logits, 1.0)
        alpha, beta = self.params.alpha, self.params.beta
        from_meme, from_own = batch.mean(kd(log_own, log_meme, 1.0)), batch.mean(kd(log_meme, log_own, 1.0))
        return {
            "personal": alpha * batch.cross_entropy(personal.logits) + (1 - alpha) * from_meme,
            "meme": beta * batch.cross_entropy(meme.logits) + (1 - beta) * from_own,
        }


class FML(FedAvg):
    """Averages a shared "meme" model as FedAvg does; it and each client's own model learn from each other.

    A client's own model may have another architecture (`-m`) than the meme model (`-sm`).
    """

    paper = "Shen et al. 2020, arXiv:2006.16765"
    sends = "meme model down and up; own model"
    Client = FMLClient
    Params = FMLParams
