"""kNN-Per: Marfoq et al., Personalized Federated Learning through Local Memorization, ICML 2022."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from baselines.beside import BesideClient
from baselines.fedavgft import FedAvgFT, FedAvgFTClient
from registry.interface import Message, Task
from registry.memory import Remembering, remember


class KNNPerClient(FedAvgFTClient):
    """Trains the global model as FedAvg does; remembers its windows under the global model received, to predict.

    λ is the share, of 0, 0.1, ..., 1, under which its own windows are most likely, each predicted without itself.
    """

    private = ("personal.keys", "personal.labels", "personal.share")
    windows_meet = "remembers its windows' features"

    @classmethod
    def build(cls, task: Task) -> dict[str, nn.Module]:
        """Return the model, and a copy with a memory, which no loss trains: `receive` fills it."""
        return {"model": task.model(), "personal": Remembering(task.model())}

    def trains(self, epoch: int, epochs: int) -> Sequence[str]:
        """Return all but the copy, which an optimiser with weight decay would move away from what it remembers."""
        return ("*", "!personal.*")

    def receive(self, message: Message) -> None:
        """Install the global model in both networks, and remember the client's windows."""
        super().receive(message)
        remember(self, "model", "personal")

    def reply(self) -> Message:
        """Return the trained model."""
        return BesideClient.reply(self)


class KNNPer(FedAvgFT):
    """Averages models as FedAvg does; each client mixes predictions with its nearest own windows, by global features.

    The features and the model are those of the global model that the client received last, as features that it has
    trained since would no longer fit. Deviations: the paper remembers all windows and chooses λ on held-out ones; here
    at most 1024 windows are remembered, every n-th of a class by turns, and λ is chosen on the remembered windows, each
    left out of its own prediction. A client with a single window predicts with the model alone. An exported model holds
    the memory: features of the client's windows, and their labels.
    """

    paper = "Marfoq et al. 2022, arXiv:2111.09360"
    sends = "model down, model up; model received last with a memory of own windows"
    Client = KNNPerClient
