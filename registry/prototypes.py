"""Prototypes, which several algorithms exchange: a client's mean feature vector of each class that it has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from registry.interface import Batch, Model
from registry.messages import MOST_SAMPLES, BadMessage, Message
from registry.normalisation import is_batch_norm, statistics_kept
from registry.text import shown

PROTOTYPES, COUNTS = "prototypes", "counts"
CHUNK = 512  # windows in a forward pass, to bound memory for a client with many windows
BATCH = 32  # windows at most of which batch norm takes the statistics: a batch of training, by default


@torch.no_grad()
def features_of(model: nn.Module, data: Batch) -> Tensor:
    """Return the features (n, d) of a model for a client's windows, in evaluation mode."""
    assert isinstance(model, Model)  # as `Client.build` made it
    model.eval()
    return torch.cat([model.features(chunk) for chunk in data.x.split(CHUNK)])


@torch.no_grad()
def training_features_of(model: nn.Module, data: Batch) -> Tensor:
    """Return the features (n, d) of a model for a client's windows as a loss in training sees them.

    Batch norm takes the statistics of each batch; its running ones stay, and dropout is off. A loss that draws features
    to their means must draw them to means of these: those of `features_of`, by running statistics, lie elsewhere, and
    a client that follows them moves them further in every round.

    Batches have at most `BATCH` windows, in numbers that differ by 1 at most, so that none is of a single window unless
    the client has no other. Each takes windows at equal distances, as neighbours are often of one class.
    """
    assert isinstance(model, Model)  # as `Client.build` made it
    model.eval()
    for part in filter(is_batch_norm, model.modules()):
        part.train()
    count = -(-len(data.y) // BATCH)
    places = [torch.arange(first, len(data.y), count, device=data.y.device) for first in range(count)]
    with statistics_kept([model]):
        features = torch.cat([model.features(data.x[own]) for own in places])
    model.eval()
    return features[torch.cat(places).argsort()]


def class_counts(y: Tensor, classes: int) -> list[int]:
    """Return the number of windows of each class."""
    counts: list[int] = torch.bincount(y, minlength=classes).tolist()
    return counts


def class_means(features: Tensor, y: Tensor, classes: int) -> Tensor:
    """Return the mean of the features (n, d) of each class, (classes, d); 0 for a class without windows."""
    one_hot = nn.functional.one_hot(y, classes).to(features.dtype)
    return one_hot.T @ features / one_hot.sum(0).clamp(min=1).unsqueeze(1)


def check_counts(reply: Message, classes: int) -> list[int]:
    """Return the numbers of windows of each class that a reply states. Raises BadMessage unless there are some."""
    counts = reply.meta.get(COUNTS)
    if not isinstance(counts, list) or len(counts) != classes:
        raise BadMessage(f"'{COUNTS}' must be a list of {classes} numbers")
    for count in counts:
        if type(count) is not int or not 0 <= count <= MOST_SAMPLES:
            raise BadMessage(f"'{COUNTS}' must hold whole numbers from 0 to {MOST_SAMPLES}, not {shown(repr(count))}")
    if not any(counts):
        raise BadMessage(f"'{COUNTS}' must not all be 0")
    return counts


class Prototypes:
    """The prototypes of all clients together, as a server keeps them.

    Attributes:
        means: (classes, d); 0 for a class of which no client has sent a prototype.
        known: the other classes, ascending.
    """

    def __init__(self, classes: int, size: int) -> None:
        self.means, self.known = torch.zeros(classes, size), list[int]()

    def update(self, means: Sequence[Tensor], counts: Sequence[Sequence[int]]) -> None:
        """Set the prototype of each class that some client has to C_c = Σ_k n_kc c_kc / Σ_k n_kc; others stay.

        Args:
            means: c_k of each client, (classes, d).
            counts: n_k of each client, (classes,).
        """
        n = torch.tensor(counts, dtype=torch.float64, device=means[0].device)
        shares = n / n.sum(0).clamp(min=1)
        new = torch.zeros_like(means[0])
        for own, share in zip(means, shares, strict=True):
            new = new + share.to(own.dtype).unsqueeze(1) * own
        there = n.sum(0) > 0
        self.means = torch.where(there.unsqueeze(1), new, self.means.to(new))
        self.known = sorted({*self.known, *there.nonzero().flatten().tolist()})

    def message(self) -> Message:
        """Return them, and which are known."""
        return Message({PROTOTYPES: self.means}, {"known": self.known})

    def restore(self, saved: Message) -> None:
        """Restore what `message` returned."""
        self.means, self.known = saved.tensors[PROTOTYPES], list(saved.meta["known"])


def distances(features: Tensor, y: Tensor, prototypes: Tensor, known: Tensor) -> Tensor:
    """Return ‖h − C_y‖² / d of each row, (n,); 0 where the prototype of its class is not known.

    Args:
        features: h, (n, d).
        y: (n,).
        prototypes: C, (classes, d).
        known: (classes,), 1 or 0.
    """
    return known[y] * (features - prototypes[y]).square().mean(1)
