"""FedAvgFT: Cheng, Chadha and Duchi, Fine-tuning in Federated Learning: a Simple but Tough-to-Beat Baseline, 2021."""

from __future__ import annotations

from baselines.beside import PERSONAL, Beside, PersonalClient, of_model, renamed
from registry.interface import Message


class FedAvgFTClient(PersonalClient):
    """Trains the global model as FedAvg does, and keeps the result, with which it predicts.

    Until the client has trained, the global model predicts.
    """

    windows_meet = ""

    def reply(self) -> Message:
        """Return the trained model, and keep a copy of it."""
        self.load(renamed(of_model(self.state()), PERSONAL))
        return super().reply()


class FedAvgFT(Beside):
    """Averages models as FedAvg does; each client predicts with the model of its own last local training.

    This is FedAvg with fine-tuning (FTFA) at no cost: local training from the global model is the fine-tuning, over as
    many epochs as a round has. The paper fine-tunes the last global model; here a client's model is fine-tuned from the
    global model of its own last round, so that predictions between rounds need no further training.
    """

    paper = "Cheng, Chadha and Duchi 2021, arXiv:2108.07313"
    sends = "model down, model up; own last training"
    Client = FedAvgFTClient
