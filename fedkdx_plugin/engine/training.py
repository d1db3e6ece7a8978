"""Local training of one client: epochs and batches; see `steps` for a single step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedkdx_plugin.engine.attacks import Attack
from fedkdx_plugin.engine.augmentation import Augment, Augmenter
from fedkdx_plugin.engine.dp_sgd import PrivateSteps, WindowPrivacy, lots, out_of_sight
from fedkdx_plugin.engine.faults import Faults
from fedkdx_plugin.engine.optimizers import SGD
from fedkdx_plugin.engine.randomness import generator, seeded
from fedkdx_plugin.engine.steps import Steps
from fedkdx_plugin.privacy.options import EXAMPLE, Privacy
from registry import contract
from registry.errors import UserError
from registry.interface import Batch, Client, NonFinite, Round

ALIKE, BALANCED = "none", "balanced"
CLASS_WEIGHTS = (ALIKE, BALANCED)


@dataclass(frozen=True)
class Settings:
    """Options of local training; the defaults are the paper's protocol.

    Attributes:
        batch_size: windows in a batch; the last one of an epoch may be smaller.
        local_epochs: passes over a client's windows in a round.
        learning_rate: learning rate.
        decay: factor on a client's learning rate after each round in which it trained (1: none).
        clip_norm: bound on the norm of each network's gradient (0: none).
        optimizer: how parameters move, a name of `optimizers.NAMES`.
        class_weights: weights of the classes in cross-entropies, one of `CLASS_WEIGHTS`.
        augment: augmentations of the windows of each step.
        seed: seed of all random numbers.
        faults: probabilities of injected faults.
        attack: which clients attack, and how.
        privacy: whose data are protected by noise, and how much of it.
        dp_sgd: bound and noise of DP-SGD, which hides each window of a client; None: plain training.
        mixed: whether training steps are in mixed precision (see `precision`); DP-SGD's never are.
    """

    batch_size: int = 32
    local_epochs: int = 4
    learning_rate: float = 0.01
    decay: float = 0.99
    clip_norm: float = 10.0
    optimizer: str = SGD
    class_weights: str = ALIKE
    augment: Augment = field(default_factory=Augment)
    seed: int = 0
    faults: Faults = field(default_factory=Faults)
    attack: Attack = field(default_factory=Attack)
    privacy: Privacy = field(default_factory=Privacy)
    dp_sgd: WindowPrivacy | None = None
    mixed: bool = False

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
        mean over the round's windows of the summed losses: a scalar on the device, not synchronised; NaN if DP-SGD drew
        no window at all.

    Raises:
        UserError: each window is to be protected, and nobody has said with how much noise (a site, say, which has no
            budget).
    """
    if settings.privacy.level == EXAMPLE and settings.dp_sgd is None:
        raise UserError("--dp example: nobody has computed the noise that its budget takes; nothing was trained")
    windows = windows_of(client)
    with unseen(client, settings):
        steps = _steps(client, windows, round, settings)
        plan = _planned(windows, round, client, settings)
        times = 1 if settings.dp_sgd else contract.repeats(client)
        augmented = _augmented(windows, round, client.id, settings)
        sums: list[Tensor] = []
        rows: list[int] = []
        with seeded(settings.seed, "dropout", round.index, client.id):
            for epoch, indices in enumerate(plan):
                still = steps.still(contract.trains(client, epoch, len(plan)))
                for index in indices:
                    batch = augmented(windows.rows(index), len(sums) // times)
                    for _ in range(times):
                        with named(f"client {client.id}, round {round.index}, step {len(sums) + 1}"):
                            sums.append(steps.take(batch, still))
                            rows.append(len(index))
        losses_of_batches = torch.stack(sums)
        weights = torch.tensor(rows, dtype=losses_of_batches.dtype).to(windows.y.device)
        return losses_of_batches @ weights / weights.sum()


def unseen(client: Client, settings: Settings) -> AbstractContextManager[None]:
    """Withhold a client's windows from its own methods in the block, if each of them is to be hidden."""
    return out_of_sight(client) if settings.dp_sgd else nullcontext()


def _steps(client: Client, windows: Batch, round: Round, settings: Settings) -> Steps:
    """Return the training steps of a round."""
    context, bound, optimizer = contract.context(client), settings.clip_norm, settings.optimizer
    if settings.dp_sgd is None:
        return Steps(client, client.nets, context, bound, optimizer, settings.mixed)
    if len(windows.y) != client.samples:
        raise UserError(f"--dp example: {type(client).__name__} holds windows out, so that others are drawn more often")
    size, shape = min(settings.batch_size, len(windows.y)), windows.x.shape[1:]
    which = f"{type(client).__name__} {client.params} {settings}"  # runs of one seed must not share their noise
    rng = generator(settings.seed, "noise of gradients", which, round.index, client.id)
    return PrivateSteps(client, client.nets, context, bound, optimizer, settings.dp_sgd, size, shape, rng)


def _augmented(windows: Batch, round: Round, client: int, settings: Settings) -> Callable[[Batch, int], Batch]:
    """Return a function that augments a batch of a client's windows, given its number in the round, from 0."""
    if not settings.augment.names:
        return lambda batch, number: batch
    most = len(windows.y) if settings.dp_sgd else settings.batch_size
    augmenter = Augmenter(settings.augment, windows.x, most)
    keys = torch.tensor(settings.augment.keys(settings.seed, round.index, client)).to(windows.x.device)
    return lambda batch, number: replace(batch, x=augmenter(batch.x, keys, number)) if len(batch.y) else batch


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


def _planned(windows: Batch, round: Round, client: Client, settings: Settings) -> list[Sequence[Tensor]]:
    """Return the positions of each batch, for each epoch of a round: as of `batches`, or lots of DP-SGD.

    Each step of DP-SGD has a lot of its own, also where an algorithm repeats steps on a batch, since the accounting is
    of such steps; an epoch has as many steps as otherwise.
    """
    count, device = len(windows.y), windows.y.device
    if settings.dp_sgd is None:
        return [
            order.split(settings.batch_size) for order in permutations(count, round, client.id, settings).to(device)
        ]
    epochs, size = settings.epochs(round, client.id), settings.batch_size
    steps = steps_of(count, 1, contract.repeats(client), size)
    drawn = [lot.to(device) for lot in lots(count, size, epochs * steps, settings.seed, round.index, client.id)]
    return [drawn[epoch * steps :][:steps] for epoch in range(epochs)]


def planned_steps(client: Client, round: Round, settings: Settings) -> int:
    """Return the number of training steps that a client makes in a round."""
    epochs, times = settings.epochs(round, client.id), contract.repeats(client)
    return steps_of(len(windows_of(client).y), epochs, times, settings.batch_size)


def steps_of(windows: int, epochs: int, repeats: int, batch_size: int) -> int:
    """Return the number of training steps of so many epochs, with so many steps on each batch."""
    return epochs * -(-windows // batch_size) * repeats


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
    training, validation = map(data.rows, parts)
    return training, validation
