"""PullAvg: models of the clients' own, pulled towards their average: FedKDX+ without teacher and distillation."""

from __future__ import annotations

from baselines.fedavgft import FedAvgFT, FedAvgFTClient
from fedkdx_plugin.algorithm.pull import PullParams, pull, pull_share
from registry.interface import Message, Round, float_state
from registry.tensors import copied


class PullAvgClient(FedAvgFTClient):
    """Trains its own model, W_k ← W_k + s (W − W_k) before it trains, and predicts with the result.

    W is the global model received. The share s goes from `pull_start` to `pull_end` over the rounds; a client that
    trains for the first time starts from W, and one that is rarely selected follows its own rounds (`own_progress`).
    """

    windows_meet = ""

    def receive(self, message: Message) -> None:
        """Install the global model, or the client's own one on the way to it."""
        own = copied(float_state({"model": self.nets["personal"]}))
        super().receive(message)
        if self.trained:
            share = pull_share(self.params, message.meta["progress"], self.trained, message.meta["expected"])
            pull(own, float_state({"model": self.nets["model"]}), share)
            self.load(own)


class PullAvg(FedAvgFT):
    """Averages the models that clients train on their own, each pulled towards the average as in FedKDX+.

    The plain baseline of FedKDX+: its schedule and nothing else, neither teacher, distillation nor compression. With a
    share of 1 in all rounds it is FedAvgFT; with 0 every client trains alone after its first start from the average.
    """

    paper = "the schedule of FedKDX+ alone, of this project"
    sends = "model down, model up; own model"
    Client = PullAvgClient
    Params = PullParams

    def message(self, client: int, round: Round) -> Message:
        """Return the global model, with ρ and the expected number of rounds in which a client trains."""
        return Message(self.weights, {"progress": round.progress, "expected": round.expected})
