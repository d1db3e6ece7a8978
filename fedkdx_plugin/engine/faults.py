"""Injected faults: clients that drop out, that are too slow, whose replies arrive damaged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import torch

from fedkdx_plugin.engine.randomness import derive, uniform
from registry.errors import UserError
from registry.messages import Message

DROPOUT, STRAGGLER = "dropout", "straggler"
# a NaN in a tensor, an additional dimension, a missing tensor, a tensor or message of another algorithm, random bytes
KINDS = ("nan", "shape", "missing", "foreign tensor", "foreign message", "noise")
FOREIGN = {"foreign": torch.zeros(3)}
Damage = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Faults:
    """Probabilities of faults, drawn from (seed, round, client): the same for every algorithm.

    Attributes:
        dropout: probability that a selected client drops out of the round; it does no work.
        stragglers: probability that a selected client is slow, with time for 1 to all local epochs, each equally likely
            (FedProx, arXiv:1812.06127, section 5.2).
        corrupt: probability that its reply arrives damaged.
    """

    dropout: float = 0.0
    stragglers: float = 0.0
    corrupt: float = 0.0

    def check(self) -> None:
        """Raise UserError for a probability outside [0, 1)."""
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 <= value < 1:
                raise UserError(
                    f"--{field.name} {value:g}: the probability must be at least 0 and below 1, "
                    "or no client's work would ever count"
                )

    def drops(self, seed: int, round: int, client: int) -> bool:
        """Return whether the client drops out."""
        return uniform(seed, "fault", DROPOUT, round, client) < self.dropout

    def slows(self, seed: int, round: int, client: int) -> bool:
        """Return whether the client is a straggler."""
        return uniform(seed, "fault", STRAGGLER, round, client) < self.stragglers

    def epochs(self, seed: int, round: int, client: int, planned: int) -> int:
        """Return how many of the planned local epochs the client has time for."""
        if not self.slows(seed, round, client):
            return planned
        return 1 + int(uniform(seed, "fault", "epochs", round, client) * planned)

    def damage(self, seed: int, round: int, client: int) -> Damage | None:
        """Return the damage to the client's reply; None if it arrives as it was sent."""
        if uniform(seed, "fault", "corrupt", round, client) >= self.corrupt:
            return None
        rng = np.random.default_rng(derive(seed, "fault", "damage", round, client))
        kind = KINDS[rng.integers(len(KINDS))]
        return lambda data: damaged(data, kind, rng)


def damaged(data: bytes, kind: str, rng: np.random.Generator) -> bytes:
    """Return a message's bytes after damage of a kind of `KINDS` at a random position.

    A message without floating-point tensors, to which most kinds do not apply, gets a foreign tensor instead.
    """
    if kind == "noise":
        return rng.bytes(len(data))
    if kind == "foreign message":
        return Message(FOREIGN).to_bytes()
    message = Message.from_bytes(data)
    tensors = dict(message.tensors)
    names = [name for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()]
    if kind == "foreign tensor" or not names:
        tensors |= FOREIGN
    else:
        name = names[rng.integers(len(names))]
        tensor = tensors.pop(name)
        if kind == "shape":
            tensors[name] = tensor.unsqueeze(0)
        elif kind == "nan":
            tensor.view(-1)[rng.integers(tensor.numel())] = torch.nan
            tensors[name] = tensor
    return Message(tensors, message.meta).to_bytes()
