"""State that a client of an app keeps to itself between rounds: arrays in the state of Flower's context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from registry.errors import UserError

PREFIX = "fedkdx"
KEPT, MEMORY, TRAINED = "kept", "memory", "trained"


class ContextState:
    """A client's private state after the last rounds in which it trained, as `site.StateFolder` keeps it on disk.

    Args:
        state: `Context.state`, which Flower keeps for this node until the run ends.
    """

    def __init__(self, state: RecordDict) -> None:
        self.state = state

    def rounds(self) -> list[int]:
        """Return the rounds whose state is there, ascending."""
        names = (name.split(".") for name in self.state.config_records if name.startswith(f"{PREFIX}."))
        return sorted(int(round) for _, round, _ in names)

    def load(self, round: int) -> tuple[dict[str, Tensor], dict[str, Tensor], int]:
        """Return the tensors a client kept, its memory, and how often it had trained, after a round (0: nothing).

        Raises:
            UserError: the state of that round is not there.
        """
        if not round:
            return {}, {}, 0
        if round not in self.rounds():
            there = ", ".join(map(str, self.rounds())) or "none"
            raise UserError(
                f"the server goes on from round {round}, but this node's context has state of rounds: {there}; was the "
                "node started anew? Begin a new run"
            )
        kept, memory = (_tensors(self.state.array_records[_name(round, part)]) for part in (KEPT, MEMORY))
        trained = self.state.config_records[_name(round, TRAINED)][TRAINED]
        return kept, memory, cast(int, trained)  # as `save` wrote it

    def save(self, round: int, kept: dict[str, Tensor], memory: dict[str, Tensor], trained: int) -> None:
        """Keep the state after a round."""
        self.state[_name(round, KEPT)] = arrays(kept)
        self.state[_name(round, MEMORY)] = arrays(memory)
        self.state[_name(round, TRAINED)] = ConfigRecord({TRAINED: trained})

    def settle(self, accepted: int, durable: int) -> None:
        """Delete all states but the one that the server goes on from.

        Args:
            accepted: round of the last reply that reached the server.
            durable: not used: what a server of an app knows ends with it.
        """
        for round in self.rounds():
            if round != accepted:
                for part in (KEPT, MEMORY, TRAINED):
                    del self.state[_name(round, part)]


def _name(round: int, part: str) -> str:
    return f"{PREFIX}.{round}.{part}"


def arrays(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return tensors as Flower's arrays, by name."""
    return ArrayRecord({name: Array(tensor.detach().cpu().contiguous().numpy()) for name, tensor in tensors.items()})


def _tensors(record: ArrayRecord) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array.numpy()) for name, array in record.items()}
