"""Memory of a client's own windows, with which a network predicts: local memorization of Marfoq et al., ICML 2022.

A network with a memory mixes its predictions with those of the nearest remembered windows, by distance of features.
kNN-Per gives one to FedAvg's model; other algorithms may give one to a network of theirs with `remember`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from registry.interface import Batch, Client, Model, Output, float_state
from registry.prototypes import features_of

MEMORY = "memory"  # name of a client's network with a memory, where it is one of several
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


@torch.no_grad()
def remember(client: Client, source: str, into: str = MEMORY) -> None:
    """Copy a client's network into one with a memory, and remember the client's windows under it.

    λ is the share, of 0, 0.1, ..., 1, under which the windows are most likely, each predicted without itself; 0 for a
    client with a single window.

    Args:
        client: a client at work.
        source: name of the network to copy.
        into: name of a `Remembering`, made of the same kind of model.
    """
    net = client.nets[into]
    assert isinstance(net, Remembering) and client.data is not None  # as `build` made it; the client is at work
    state = {}
    for name, tensor in float_state({source: client.nets[source]}).items():
        part = name.removeprefix(f"{source}.")
        state[f"{into}.{part}" if part.startswith("head.") else f"{into}.base.{part}"] = tensor
    client.load(state)
    own = remembered(client.data)
    features = features_of(net, own)
    one_hot = nn.functional.one_hot(own.y, client.task.classes).to(features.dtype)
    keys, labels = (torch.zeros_like(buffer) for buffer in (net.keys, net.labels))
    keys[: len(features)], labels[: len(features)] = features, one_hot
    near = neighbours(features, keys, labels, leave_out=True)
    likely = (net.head(features).softmax(1) * one_hot).sum(1), (near * one_hot).sum(1)
    share = best_share(*likely) if len(features) > 1 else torch.zeros_like(net.share)
    client.load({f"{into}.keys": keys, f"{into}.labels": labels, f"{into}.share": share})


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
