"""Scaling by pooled statistics of the clients' windows, exchanged once, in the first round with a reachable client."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dataset_utils.scaling import Scaling, Statistics, pooled
from fedkdx_plugin.engine.data import DeviceData
from registry.interface import BadMessage, Message, Round

CHUNK = 4096  # windows scaled at once, to bound the memory of float64


@dataclass(frozen=True)
class Agreement:
    """Pooled statistics and the cost of exchanging them.

    Attributes:
        pooled: statistics over all training windows of the clients that contributed.
        round: index of the round of the exchange.
        up, down: serialised bytes of the exchange, all clients together.
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

    Each of them sends its own statistics, and every participating client receives the pooled ones, once.

    Args:
        statistics: statistics of each client, None where not known; None as a whole if windows are scaled already.
        rounds: the rounds of the run.
        reachable: returns the clients that can be selected in a round.
        receivers: number of participating clients.
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
    """Scale every client's windows by the pooled statistics, also those of clients that did not contribute.

    The last result is cached with the data, for the runs of a comparison.
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
    """Return the message that carries statistics, in either direction."""
    return Message({name: torch.from_numpy(values) for name, values in statistics._asdict().items()}, {})


def from_tensors(tensors: dict[str, Tensor], channels: int, samples: int | None = None) -> Statistics:
    """Return statistics from a received message; see `Statistics.from_dict`. Raises BadMessage."""
    try:
        return Statistics.from_dict({name: tensor.tolist() for name, tensor in tensors.items()}, channels, samples)
    except ValueError as error:
        raise BadMessage(str(error)) from error


def _scaled(x: Tensor, scaling: Scaling) -> Tensor:
    """Scale as `Scaling.__call__` does, in float64 and rounded once, so that the bits are equal on every device."""
    offset, scale = (torch.from_numpy(values).to(x.device)[:, None, None] for values in scaling)
    result = torch.empty_like(x)
    for part, place in zip(x.split(CHUNK), result.split(CHUNK), strict=True):
        place.copy_((part.double() - offset) / scale)
    return result
