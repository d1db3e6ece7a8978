"""FedALA: Zhang et al., Adaptive Local Aggregation for Personalized Federated Learning, AAAI 2023."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from baselines.beside import MODEL, PERSONAL, Beside, PersonalClient, of_model, renamed
from registry.interface import Batch, Message, Model, layers
from registry.parameters import Params, option

WEIGHT = "weight/"
BATCH = 32  # windows of a step of the weights
CONVERGED, RECENT, MOST = 0.1, 10, 100  # std of so many last losses, and passes at most, when weights are first learnt


@dataclass(frozen=True)
class FedALAParams(Params):
    """Hyper-parameters of FedALA: the paper's p = 1, s = 80 %, η = 1."""

    layers: int = option(1, "number p of last layers whose parameters are mixed; the others are the global model's", 1)
    share: float = option(0.8, "share s of the client's windows, on which weights are learnt", above=0, high=1)
    weight_rate: float = option(1.0, "learning rate η of the weights; 0 is FedAvgFT, weights being 1", 0.0)


class FedALAClient(PersonalClient):
    """Starts a round from Θ̂ = Θ_i + (Θ − Θ_i) ⊙ W_i, with a weight in [0, 1] for each parameter of its last layers.

    Θ is the global model and Θ_i the client's own of its last round, the network `personal`, which predicts. The
    weights start as 1 and are learnt by W ← clip(W − η ∂L/∂Θ̂ ⊙ (Θ − Θ_i)) on a random part of the windows before each
    round but the client's first: in its second round in passes until the losses settle, later in one. They
    stay in its memory. Then the client trains Θ̂ as FedAvg does.
    """

    windows_meet = "learns what to take of the mean on its windows, without noise"

    def receive(self, message: Message) -> None:
        """Install Θ̂."""
        self.load(message.tensors)
        if self.trained:
            self._mix()

    def _mix(self) -> None:
        """Learn the weights, and put the mix of the last layers in the place of the global model's."""
        model = self.nets["model"].eval()
        state = self.state()
        assert isinstance(model, Model)  # as `build` made it
        last = tuple(f"{path}." for layer in layers(model)[-self.params.layers :] for path in layer)
        mixed = {name: own for name, own in model.named_parameters() if name.startswith(last)}
        own = {name: state[PERSONAL + name].clone() for name in mixed}
        way = {name: state[MODEL + name] - own[name] for name in mixed}
        weights = {name: self.memory.get(WEIGHT + name, torch.ones_like(w)) for name, w in way.items()}

        def put() -> None:
            self.load({MODEL + name: own[name] + way[name] * weights[name] for name in mixed})

        put()
        losses: list[float] = []
        for windows in self._passes():
            seen = []
            for part in windows:
                loss = self.losses(self.nets, part, {})["model"]
                slopes = torch.autograd.grad(loss, list(mixed.values()))
                for name, slope in zip(mixed, slopes, strict=True):
                    weights[name] = (weights[name] - self.params.weight_rate * slope * way[name]).clamp(0, 1)
                put()
                seen.append(float(loss.detach()))
            losses.append(sum(seen) / len(seen))
            if self.memory or (len(losses) >= RECENT and statistics.pstdev(losses[-RECENT:]) < CONVERGED):
                break
        self.memory = {WEIGHT + name: own for name, own in weights.items()}

    def _passes(self) -> Iterator[list[Batch]]:
        """Yield the batches of passes over a part of the windows, drawn from (seed, client, its rounds so far)."""
        assert self.data is not None  # the engine sets it while the client works
        seed = random.Random(f"FedALA {self.task.seed} {self.id} {self.trained}").getrandbits(63)
        count = max(1, round(self.params.share * len(self.data.y)))
        order = torch.randperm(len(self.data.y), generator=torch.Generator().manual_seed(seed))[:count]
        part = self.data.rows(order.to(self.data.y.device))
        for _ in range(MOST):
            yield part.split(BATCH)

    def reply(self) -> Message:
        """Return the trained model, which is also the personal one from now on."""
        self.load(renamed(of_model(self.state()), PERSONAL))
        return super().reply()


class FedALA(Beside):
    """Averages models as FedAvg does; each client learns what to take of the mean, parameter by parameter.

    The losses by which weights are learnt are by running statistics of batch norm, which are the global model's, as
    are all layers but the last p. Learning the weights first ends when the standard deviation of ten passes' losses is
    below 0.1, the authors' threshold, or after 100 passes. Weights of a client whose reply was lost stay learnt.

    The authors evaluate Θ̂ before it is trained. Here a client predicts with Θ_i as its last training left it, as with
    other algorithms whose clients have models of their own, and far more accurately.
    """

    paper = "Zhang et al. 2023, arXiv:2212.01197"
    sends = "model down, model up; own model"
    Client = FedALAClient
    Params = FedALAParams
