"""Local training of one client: epochs, batches, one backward for all its networks, clipping, plain SGD."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn

from fedkdx_plugin.engine.attacks import Attack
from fedkdx_plugin.engine.faults import Faults
from fedkdx_plugin.engine.randomness import generator, seeded
from fedkdx_plugin.native.sgd import ClipAndMove, clip_and_move
from registry.errors import UserError
from registry.interface import Batch, Client, NonFinite, Round


@dataclass(frozen=True)
class Settings:
    """Options of local training; the defaults are the paper's protocol.

    Attributes:
        batch_size: windows in a batch; the last one of an epoch may be smaller.
        local_epochs: passes over a client's windows in a round.
        learning_rate: learning rate of plain SGD.
        decay: factor on a client's learning rate after each round in which it trained (1: none).
        clip_norm: bound on the norm of each network's gradient (0: none).
        seed: seed of all random numbers.
        faults: probabilities of injected faults.
        attack: which clients attack, and how.
    """

    batch_size: int = 32
    local_epochs: int = 4
    learning_rate: float = 0.01
    decay: float = 0.99
    clip_norm: float = 10.0
    seed: int = 0
    faults: Faults = field(default_factory=Faults)
    attack: Attack = field(default_factory=Attack)

    def epochs(self, round: Round, client: int) -> int:
        """Return a client's number of epochs in this round: `local_epochs`, or fewer for a straggler."""
        return self.faults.epochs(self.seed, round.index, client, self.local_epochs)


def train(client: Client, round: Round, settings: Settings) -> Tensor:
    """Train `client.nets`, except frozen ones, on `client.data`.

    Args:
        client: a client with its networks and data in place that has received the server's message.
        round: the round.
        settings: options of local training.

    Returns:
        mean over the round's windows of the summed losses: a scalar on the device, not synchronised.
    """
    context = client.context()
    trained = {name: net for name, net in client.nets.items() if name not in client.frozen}
    parameters = {name: list(net.parameters()) for name, net in trained.items()}
    move = mover(list(parameters.values()), client.learning_rate, settings.clip_norm)
    x, y, _ = windows_of(client)
    sums: list[Tensor] = []
    rows: list[int] = []
    for name, net in client.nets.items():
        net.train(name in trained)
        net.zero_grad()
    with seeded(settings.seed, "dropout", round.index, client.id):
        for step, index in enumerate(batches(len(y), round, client.id, settings, x.device), 1):
            with named(f"client {client.id}, round {round.index}, step {step}"):
                losses = client.losses(client.nets, Batch(x[index], y[index]), context)
                loss = reduce(add, losses.values())
                loss.backward()
                move()
                sums.append(loss.detach())
                rows.append(len(index))
    losses_of_batches = torch.stack(sums)
    weights = torch.tensor(rows, dtype=losses_of_batches.dtype).to(x.device)
    return losses_of_batches @ weights / weights.sum()


def windows_of(client: Client) -> Batch:
    """Return the training windows of a client at work.

    Raises:
        RuntimeError: it is not at work, so that none are in place.
    """
    if client.data is None:
        raise RuntimeError(f"client {client.id}: its windows are in place only while it works")
    return client.data


class ClientError(RuntimeError):
    """An algorithm failed at a client; the text names the client, the step and the error."""


@contextmanager
def named(where: str) -> Iterator[None]:
    """Add the position to every error of a block; errors with their own message for the user pass unchanged."""
    try:
        yield
    except (NonFinite, UserError, ClientError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        raise ClientError(f"{where}: {type(error).__name__}: {error}") from error


def permutations(n: int, round: Round, client: int, settings: Settings) -> Tensor:
    """Draw the order of a client's windows in each epoch of a round: (epochs, n), int64."""
    rng = generator(settings.seed, "batches", round.index, client)
    return torch.stack([torch.randperm(n, generator=rng) for _ in range(settings.epochs(round, client))])


def batches(n: int, round: Round, client: int, settings: Settings, device: torch.device) -> Iterator[Tensor]:
    """Yield the index tensors of a round's batches: one permutation for each epoch."""
    for order in permutations(n, round, client, settings).to(device):
        yield from order.split(settings.batch_size)


def hold_out(data: Batch, share: float, client: int, seed: int) -> tuple[Batch, Batch | None]:
    """Divide a client's windows into (training, validation), in the same way in every round.

    At least one window is held out and one left; a client with a single window trains and validates on it.
    """
    count = len(data.y)
    if share <= 0:
        return data, None
    if count == 1:
        return data, data
    order = torch.randperm(count, generator=generator(seed, "validation", client)).to(data.y.device)
    held = min(max(int(share * count), 1), count - 1)
    parts = (order[held:].sort().values, order[:held].sort().values)
    training, validation = (Batch(data.x[part], data.y[part]) for part in parts)
    return training, validation


def mover(groups: Sequence[Sequence[nn.Parameter]], rate: float, bound: float) -> Callable[[], None]:
    """Return a function that makes a step of plain SGD for several networks and clears the gradients.

    Args:
        groups: each network's parameters.
        rate: learning rate.
        bound: bound on the norm of each network's gradient (0: none).
    """
    everything = [parameter for group in groups for parameter in group]
    make = ClipAndMove if ClipAndMove.takes(everything) else clip_and_move
    return make(groups, rate, bound)
