"""kNN-Per: Marfoq et al., Personalized Federated Learning through Local Memorization, ICML 2022."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from baselines.beside import BesideClient
from baselines.fedavgft import FedAvgFT, FedAvgFTClient
from registry.interface import Batch, Message, Model, Output, Task, float_state
from registry.prototypes import features_of

NEIGHBOURS = 10  # k, as in the paper
CAPACITY = 1024  # windows that a client remembers at most; the paper has no bound
SHARES = 11  # values of λ that are tried: 0, 0.1, ..., 1
SMALLEST = 1e-6  # probability that the mixture gives to any class, so that its logarithm is finite


class Remembering(Model):
    """Model whose predictions are mixed with those of the k nearest remembered windows, by distance of features.

    With the features h of the model, the remembered pairs (h_i, y_i) and their nearest k, N(x):

        p(c|x) = λ Σ_{i in N(x), y_i = c} e^{−‖h(x) − h_i‖} / Σ_{i in N(x)} e^{−‖h(x) − h_i‖} + (1 − λ) p_model(c|x)

    The logits are log p. Nothing is remembered at first, and λ is 0.

    Attributes:
        keys: h_i, (CAPACITY, d).
        labels: y_i, one-hot, (CAPACITY, classes); 0 in places that hold nothing.
        share: λ, ().
    """

    keys: Tensor
    labels: Tensor
    share: Tensor

    def __init__(self, base: Model) -> None:
        channels, height, time = base.shape
        super().__init__((channels, height, time), base.classes)
        self.base, self.feature_size, self.head = base, base.feature_size, base.head
        base.head = nn.Identity()
        self.register_buffer("keys", torch.zeros(CAPACITY, base.feature_size))
        self.register_buffer("labels", torch.zeros(CAPACITY, base.classes))
        self.register_buffer("share", torch.zeros(()))

    def features(self, x: Tensor) -> Tensor:
        """Compute the features of windows with the base model."""
        return self.base.features(x)

    def forward(self, x: Tensor) -> Output:
        """Compute features, and log p."""
        features = self.features(x)
        near = neighbours(features, self.keys, self.labels)
        return Output(features, mixed(self.head(features).softmax(1), near, self.share).log())


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

    @torch.no_grad()
    def receive(self, message: Message) -> None:
        """Install the global model in both networks, and remember the client's windows."""
        super().receive(message)
        state = {}
        for name, tensor in float_state({"personal": self.nets["model"]}).items():
            state[name if name.startswith("personal.head.") else name.replace("personal", "personal.base", 1)] = tensor
        self.load(state)
        assert self.data is not None  # the engine sets it while the client works
        net, own = self.nets["personal"], remembered(self.data)
        assert isinstance(net, Remembering)  # as `build` made it
        features = features_of(net, own)
        one_hot = nn.functional.one_hot(own.y, self.task.classes).to(features.dtype)
        keys, labels = (torch.zeros_like(buffer) for buffer in (net.keys, net.labels))
        keys[: len(features)], labels[: len(features)] = features, one_hot
        near = neighbours(features, keys, labels, leave_out=True)
        likely = (net.head(features).softmax(1) * one_hot).sum(1), (near * one_hot).sum(1)
        share = best_share(*likely) if len(features) > 1 else torch.zeros_like(net.share)
        self.load({"personal.keys": keys, "personal.labels": labels, "personal.share": share})

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


def remembered(data: Batch) -> Batch:
    """Return the windows to remember: all, or `CAPACITY` of them, evenly spaced in the order of their labels."""
    order = data.y.argsort(stable=True)
    if len(order) > CAPACITY:
        order = order[torch.arange(CAPACITY, device=order.device) * len(order) // CAPACITY]
    return data.rows(order)


def neighbours(features: Tensor, keys: Tensor, labels: Tensor, leave_out: bool = False) -> Tensor:
    """Return the class shares of the nearest keys, weighted by e^{−distance}, (n, classes); 0 without any key.

    Args:
        features: (n, d).
        keys, labels: see `Remembering`.
        leave_out: whether the features are the first keys, of which each is left out of its own prediction.
    """
    squares = features.square().sum(1, keepdim=True) + keys.square().sum(1) - 2 * features @ keys.T
    distance = squares.clamp(min=0).sqrt().masked_fill(labels.sum(1) == 0, torch.inf)
    if leave_out:
        rows, places = (torch.arange(len(part), device=keys.device) for part in (features, keys))
        distance = distance.masked_fill(rows.unsqueeze(1) == places, torch.inf)
    nearest, index = distance.topk(NEIGHBOURS, largest=False)
    weights = (nearest[:, :1].nan_to_num(posinf=0.0) - nearest).exp()  # the nearest has weight 1: no division of 0 by 0
    votes = (weights.unsqueeze(2) * labels[index]).sum(1)
    return votes / votes.sum(1, keepdim=True).clamp(min=SMALLEST)


def mixed(model: Tensor, near: Tensor, share: Tensor) -> Tensor:
    """Return λ near + (1 − λ) model, (n, classes), with at least `SMALLEST` before it is scaled to sum 1."""
    p = (share * near + (1 - share) * model).clamp(min=SMALLEST)
    return p / p.sum(1, keepdim=True)


def best_share(model: Tensor, near: Tensor) -> Tensor:
    """Return the λ with the greatest likelihood of the true classes, the smallest of equals, ().

    Args:
        model, near: probabilities of each window's true class, (n,), by the model and by its neighbours.
    """
    shares = torch.linspace(0, 1, SHARES, dtype=model.dtype, device=model.device).unsqueeze(1)
    likelihood = (shares * near + (1 - shares) * model).clamp(min=SMALLEST).log().sum(1)
    return shares[likelihood.argmax(), 0]
