"""Scaling by what the clients' windows have in common: agreed once, in the first round in which anybody can train."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dataset_utils.scaling import Scaling, Statistics, pooled
from fedkdx_plugin.engine.data import DeviceData
from registry.interface import BadMessage, Message, Round

CHUNK = 4096  # windows scaled at once: what it takes in float64 stays small


@dataclass(frozen=True)
class Agreement:
    """What the server has made of the clients' statistics.

    Attributes:
        pooled: over all training windows of those who were there.
        round: the one in which it is exchanged.
        up, down: bytes of that, as serialised, all clients together.
    """

    pooled: Statistics
    round: int
    up: int = 0
    down: int = 0


def agree(
    statistics: Sequence[Statistics | None] | None,
    rounds: Iterable[Round],
    reachable: Callable[[Round], list[int]],
    receivers: int,
) -> Agreement | None:
    """Pool the statistics of the clients that can be selected in the first round in which there are any.

    Each of them sends its own, and every client that takes part gets the pooled ones, once.

    Args:
        statistics: of each client, where it said; None: the windows are as they are to be.
        reachable: who can be selected in a round.
        receivers: how many clients take part.
    """
    if statistics is None:
        return None
    for round in rounds:
        there = [own for id in reachable(round) if (own := statistics[id]) is not None]
        if there:
            common = pooled(there)
            up = sum(len(to_message(own).to_bytes()) for own in there)
            return Agreement(common, round.index, up, receivers * len(to_message(common).to_bytes()))
    return None


def apply(data: DeviceData, common: Statistics) -> DeviceData:
    """Every client's windows scaled by the pooled statistics, those of clients that did not contribute, too.

    The last result is kept with the data: runs of one comparison share it.
    """
    key = to_message(common).to_bytes()
    if key not in data.scaled:
        scaling = common.scaling()
        data.scaled.clear()
        data.scaled[key] = replace(
            data,
            train_x=[_scaled(x, scaling) for x in data.train_x],
            test_x=_scaled(data.test_x, scaling),
            statistics=None,
            scaled={},
        )
    return data.scaled[key]


def to_message(statistics: Statistics) -> Message:
    """As it travels, either way."""
    return Message({name: torch.from_numpy(values) for name, values in statistics._asdict().items()}, {})


def from_tensors(tensors: dict[str, Tensor], channels: int, samples: int | None = None) -> Statistics:
    """What came over a wire; see `Statistics.from_dict`. Raises BadMessage."""
    try:
        return Statistics.from_dict({name: tensor.tolist() for name, tensor in tensors.items()}, channels, samples)
    except ValueError as error:
        raise BadMessage(str(error)) from error


def _scaled(x: Tensor, scaling: Scaling) -> Tensor:
    """As `Scaling.__call__`, in float64 and rounded once, so that it is the same bits on every device."""
    offset, scale = (torch.from_numpy(values).to(x.device)[:, None, None] for values in scaling)
    result = torch.empty_like(x)
    for part, place in zip(x.split(CHUNK), result.split(CHUNK), strict=True):
        place.copy_((part.double() - offset) / scale)
    return result
