"""FedRep: Collins et al., Exploiting Shared Representations for Personalized Federated Learning, ICML 2021."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baselines.fedper import HEAD, FedPer, FedPerClient
from registry.parameters import Params, option


@dataclass(frozen=True)
class FedRepParams(Params):
    """Hyper-parameters of FedRep; the paper trains the head for ten epochs and the representation for one or five."""

    body_epochs: int = option(
        1, "epochs of a round, its last ones, that train the shared representation; all before them train the head", 1
    )


class FedRepClient(FedPerClient):
    """Trains its head on the fixed representation received, then the representation under the fixed head.

    At least the first epoch of a round trains the head. A round of a single epoch cannot be divided: it trains both at
    once, which is a round of FedPer.
    """

    windows_meet = ""

    def trains(self, epoch: int, epochs: int) -> Sequence[str]:
        """Return the head in the first epochs, and all else in the last `body_epochs`."""
        if epochs == 1:
            return ("*",)
        head = max(1, epochs - self.params.body_epochs)
        return (HEAD,) if epoch < head else ("*", f"!{HEAD}")


class FedRep(FedPer):
    """Averages the representations as FedPer does; each client trains its own head first, then the representation.

    Deviation from Algorithm 1, where a head is fitted by many steps for one step of the representation: both have whole
    epochs, as in the paper's experiments. They are those of the round, so that it costs what it costs with other
    algorithms. Batch-norm statistics belong to the representation.
    """

    paper = "Collins et al. 2021, arXiv:2102.07078"
    sends = "model without head down and up; own head"
    Client = FedRepClient
    Params = FedRepParams
